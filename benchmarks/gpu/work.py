"""What each part of a check is given."""

import time
from dataclasses import dataclass
from pathlib import Path

from gpu.report import Record


@dataclass(frozen=True)
class Work:
    """A part's orders.

    Attributes:
        part: its name. device: ``cuda`` or ``cpu``. quick: toy sizes and one round, to try the script.
        deadline: on the clock of :func:`time.monotonic`; a part starts nothing new after it.
        record: takes what is measured. scratch: a folder that is removed afterwards.
    """

    part: str
    device: str
    quick: bool
    deadline: float
    record: Record
    scratch: Path

    @property
    def rounds(self) -> int:
        """Rounds of every measurement that has time for all."""
        return 1 if self.quick else 5

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def cut(self, what: str) -> None:
        """Record that something is left out for lack of time."""
        print(f"No time is left for {what}.", flush=True)
        self.record.note(**{f"cut {what}": f"{self.part}: no time was left for {what}."})
