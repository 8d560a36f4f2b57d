# SPDX-License-Identifier: MIT
"""Lists of names for messages."""

from collections.abc import Sequence
from difflib import get_close_matches

from salve.untrusted import shown


def listing(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names and how many more there are: ``'a', 'b' and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(repr(name)) for name in names[:most]) + more


def nearest(name: str, choices: Sequence[str]) -> str:
    """The end of a sentence about an unknown name: the choices, or those that are near it if there are many."""
    near = get_close_matches(name, choices, 3, 0.5)
    if near and len(choices) > 5:
        return f"which is none of the {len(choices)}; near it: {listing(near)}"
    return f"which is none of {listing(choices, 10)}"
