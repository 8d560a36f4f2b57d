# SPDX-License-Identifier: MIT
"""Write settings and their values for people: in tables, figures and names of runs."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from salve.report.text import MISSING, is_missing


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """By dotted key, its shortest tail that no other key shares: ``sae.sparsity`` → ``sparsity``.

    ``backbone.name`` counts as ``backbone``: a "name" alone says little.
    """
    split = {key: key.removesuffix(".name").split(".") for key in keys}

    def tail(key: str) -> str:
        parts = split[key]
        for length in range(1, len(parts)):
            if not any(other[-length:] == parts[-length:] for name, other in split.items() if name != key):
                return ".".join(parts[-length:])
        return ".".join(parts)

    return {key: tail(key) for key in split}


def value_text(value: Any) -> str:
    """A setting's value in few characters: 2.0 → "2", a list as JSON, – for a missing one."""
    if isinstance(value, bool):
        return str(value).lower()
    if is_missing(value):
        return MISSING
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"{value:g}" if isinstance(value, float) else str(value)


def with_values(values: Mapping[str, Any], separator: str = " ") -> str:
    """``sparsity=2 dictionary_size=64``."""
    names = short_names(values)
    return separator.join(f"{names[key]}={value_text(value)}" for key, value in values.items())
