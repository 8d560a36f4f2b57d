# SPDX-License-Identifier: MIT
"""Write numbers and names the same way in the terminal, in tables and in figures."""

import math
import re
import string
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


def points(fraction: Any, signed: bool = True, decimals: int = 1) -> str:
    """A difference of fractions in percentage points: −0.012 → "−1.2"."""
    if is_missing(fraction) or math.isnan(float(fraction)):
        return MISSING
    value = round(100 * float(fraction), decimals) + 0.0  # + 0.0 turns −0.0 into 0.0
    return with_minus(f"{value:{'+' if signed and value else ''}.{decimals}f}")


#: Means of which not even this much is sure have no decimal where a format says ``~±``.
UNSURE = 0.03
#: A half interval below this is rounding: what was measured did not vary.
NOTHING = 1e-9


def points_and_half(fraction: Any, half: Any, signed: bool = False, rounded: bool = False) -> str:
    """A mean in points with half its interval, which is left out where it is missing or nothing: "78.8 ± 0.8".

    ``rounded`` leaves out decimals where the half is ``UNSURE`` or more.
    """
    known = not is_missing(half) and float(half) > NOTHING
    decimals = 0 if rounded and known and float(half) >= UNSURE else 1
    spread = f" ± {points(half, False, decimals)}" if known and not is_missing(fraction) else ""
    return points(fraction, signed, decimals) + spread


class Formatter(string.Formatter):
    """Formats texts whose fields are numbers, beyond Python's formats:

    ``.1%`` percent, ``.1p`` percentage points, ``.2n`` significant digits, ``of 10`` a share as a count of so many,
    ``yes`` yes or no, and ``±0.012`` points with half an interval (``~±`` without decimals where that is wide). A ``+``
    before ``.1p`` and ``±`` writes the sign. A half or a count may be a field itself: ``{drift:±{drift_half}}``.
    """

    def format_field(self, value: Any, spec: str) -> str:
        if own := re.fullmatch(r"(\+?)\.(\d)([%pn])", spec):
            signed, digits, unit = bool(own[1]), int(own[2]), own[3]
            return {"%": percent, "n": number}[unit](value, digits) if unit != "p" else points(value, signed, digits)
        if own := re.fullmatch(r"(\+?)(~?)±(.*)", spec):
            half = float(own[3]) if own[3] else math.nan
            return points_and_half(value, half, signed=bool(own[1]), rounded=bool(own[2]))
        if spec == "yes":
            return yes_no(value)
        if own := re.fullmatch(r"of (\d+)", spec):
            return MISSING if is_missing(value) else f"{number(float(value) * int(own[1]))} of {own[1]}"
        text = str(super().format_field(value, spec))
        return with_minus(text) if spec and isinstance(value, int | float) else text


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
