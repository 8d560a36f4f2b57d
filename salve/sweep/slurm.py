# SPDX-License-Identifier: MIT
"""Watch SLURM's queue while submitit waits for jobs.

submitit needs SLURM's accounting, which some clusters do not have, and gives up at the first job that dies, while other
jobs still run.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

#: Seconds at most between two looks at the queue, which lists a job for some minutes after its end (MinJobAge).
LOOK = 30

#: The state of a job that the queue does not list any more.
FORGOTTEN = "FORGOTTEN"
#: The states of a job that will not run again.
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"),
    FORGOTTEN,
)


class QueueWatcher(SlurmInfoWatcher):
    """Reads the states of jobs from SLURM's queue.

    submitit reads them from SLURM's accounting; on a cluster without it, it would wait for a killed job for ever.
    """

    def __init__(self) -> None:
        super().__init__(delay_s=LOOK)

    def _make_command(self) -> list[str] | None:
        # All jobs of the user, because squeue fails for a job that it does not list any more.
        command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T"]
        return command if self._registered - self._finished else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The state of each watched job, from the output of squeue."""
        text = string if isinstance(string, str) else string.decode()
        listed = dict(line.split("|") for line in text.split())
        return {job: {"State": listed.get(job, FORGOTTEN)} for job in self._registered - self._finished}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether a job has ended for good; a job that is being requeued has not."""
        return self.get_state(job_id, mode=mode) in ENDED

    def wait(self) -> None:
        """Return when all jobs have ended."""
        while not all(self.is_done(job) for job in self._registered):
            time.sleep(1)


@contextmanager
def watched_queue() -> Iterator[None]:
    """Have submitit notice jobs that die; if it then raises, wait for the other jobs first."""
    before, watcher = SlurmJob.watcher, QueueWatcher()
    SlurmJob.watcher = watcher
    try:
        yield
    except Exception:
        watcher.wait()
        raise
    finally:
        SlurmJob.watcher = before
