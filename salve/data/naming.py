"""Lists of names for messages."""

from collections.abc import Sequence

from salve.untrusted import shown


def listing(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` names and how many more there are: ``'a', 'b' and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(shown(repr(name)) for name in names[:most]) + more
