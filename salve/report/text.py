"""Write numbers and names the same way in the terminal, in tables and in figures."""

import math
import re
import unicodedata
from collections.abc import Callable
from typing import Any

from salve.untrusted import slug as slug

MISSING = "–"
NEVER = "∞"
#: The sign after a number, with a space that does not break.
PERCENT = "\u00a0%"


def is_missing(value: Any) -> bool:
    """True for None, NaN and empty text."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def number(value: Any, digits: int = 3) -> str:
    """``digits`` significant digits, ∞ for infinity, – for a missing value."""
    if is_missing(value):
        return MISSING
    value = float(value)
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return NEVER if value > 0 else "−" + NEVER
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e7:
        text = f"{value:.0f}"
    return with_minus(text)


def with_minus(text: str) -> str:
    """A number as Python writes it, with a minus sign instead of a hyphen."""
    return text.replace("-", "−")


def percent(fraction: Any, decimals: int = 1) -> str:
    """A fraction 0..1 as percent, with a space that does not break: 0.964 → "96.4 %"."""
    if is_missing(fraction) or math.isnan(float(fraction)):
        return MISSING
    value = round(100 * float(fraction), decimals) + 0.0  # + 0.0 turns −0.0 into 0.0
    return with_minus(f"{value:.{decimals}f}") + PERCENT


def points(fraction: Any, signed: bool = True) -> str:
    """A difference of fractions in percentage points: −0.012 → "−1.2"."""
    if is_missing(fraction) or math.isnan(float(fraction)):
        return MISSING
    value = round(100 * float(fraction), 1) + 0.0  # + 0.0 turns −0.0 into 0.0
    return with_minus(f"{value:+.1f}" if signed and value else f"{value:.1f}")


def times(ratio: Any) -> str:
    """A ratio that may be above one or below zero: 2.63 → "2.63×"."""
    if is_missing(ratio) or math.isnan(float(ratio)):
        return MISSING
    return with_minus(f"{round(float(ratio), 2) + 0.0:.2f}") + "×"


def span(low: Any, high: Any, write: Callable[[Any], str] = str) -> str:
    """An interval, its unit written once: (0.01, 0.052) as percent → "1.0–5.2 %"; "" where an end is missing."""
    if is_missing(low) or is_missing(high):
        return ""
    first, last = write(low), write(high)
    return first.removesuffix(PERCENT) + ("–" if not last.startswith("−") else " to ") + last


def sign_of(value: Any) -> str:
    """The sign a latent has for its class, "+" or "−"; text is passed through (sets of latents)."""
    if is_missing(value):
        return ""
    try:
        number_ = float(value)
    except ValueError:
        return str(value)
    return "" if math.isnan(number_) or number_ == 0 else ("+" if number_ > 0 else "−")


def latent_name(latent: Any, sign: Any = None) -> str:
    """A latent with its sign: "12 (+)"."""
    if is_missing(latent) or math.isnan(float(latent)):
        return MISSING
    mark = sign_of(sign)
    return f"{int(float(latent))}" + (f" ({mark})" if mark else "")


def yes_no(value: Any) -> str:
    """ "yes", "no", or – where it was not measured."""
    if is_missing(value):
        return MISSING
    return "yes" if str(value).strip().lower() in ("true", "1", "1.0", "yes") else "no"


def label(text: Any, width: int = 22) -> str:
    """A name as figures show it: one line, no control characters, shortened beyond ``width``.

    Long names lose their middle (what tells them apart is often at the end), short ones their end.
    """
    clean = "".join(ch if unicodedata.category(ch)[0] != "C" else " " for ch in str(text))
    clean = " ".join(clean.split())
    if len(clean) <= width:
        return clean
    if width < 16:
        return clean[: width - 1].rstrip() + "…"
    head = width // 2
    return clean[:head].rstrip() + "…" + clean[len(clean) - (width - 1 - head) :].lstrip()


def file_name(name: str) -> str:
    """A file's name as it is where it is safe on every disk and in a link; else with a slug for its stem."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}", name):
        return name
    stem, dot, suffix = name.rpartition(".")
    return f"{slug(stem) or 'unnamed'}{dot}{slug(suffix)}"


def count_of(value: Any) -> str:
    """A whole number with thousands set apart by a thin space."""
    return f"{int(value):,}".replace(",", "\u2009")


def plural(count: int, noun: str) -> str:
    """ "1 class", "2 classes", "3 images"."""
    ending = "" if count == 1 else ("es" if noun.endswith(("s", "x", "ch")) else "s")
    return f"{count_of(count)} {noun}{ending}"
