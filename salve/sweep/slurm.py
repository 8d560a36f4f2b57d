"""What submitit leaves open on SLURM: clusters without accounting, and jobs that still run when it has given up."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

#: Seconds at most between two looks at the queue. It forgets a job some minutes after its end (SLURM's MinJobAge).
LOOK = 30

#: States of a job that will not run again, and the one of a job that the queue has forgotten.
FORGOTTEN = "FORGOTTEN"
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"),
    FORGOTTEN,
)


class QueueWatcher(SlurmInfoWatcher):
    """Asks SLURM's queue what became of jobs.

    submitit asks SLURM's accounting, which not every cluster has; without, it would wait for a killed job for ever.
    """

    def __init__(self) -> None:
        super().__init__(delay_s=LOOK)

    def _make_command(self) -> list[str] | None:
        # Of all the user's jobs: asked for one that it has forgotten, squeue fails.
        asked = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T"]
        return asked if self._registered - self._finished else None

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        """The state of each job that is watched."""
        text = string if isinstance(string, str) else string.decode()
        listed = dict(line.split("|") for line in text.split())
        return {job: {"State": listed.get(job, FORGOTTEN)} for job in self._registered - self._finished}

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        """Whether the job has ended for good; one that is being requeued has not."""
        return self.get_state(job_id, mode=mode) in ENDED

    def wait(self) -> None:
        """Return when all jobs have ended."""
        while not all(self.is_done(job) for job in self._registered):
            time.sleep(1)


@contextmanager
def watched_queue() -> Iterator[None]:
    """Around a launch by submitit on SLURM: notices jobs that die without a word, and when submitit gives up at the
    first of them, waits for the others before the exception goes on."""
    before, watcher = SlurmJob.watcher, QueueWatcher()
    SlurmJob.watcher = watcher
    try:
        yield
    except Exception:
        watcher.wait()
        raise
    finally:
        SlurmJob.watcher = before
