"""What a follower does that is a fork: ``python -m tests.integration.rank TARGET LEADER``."""

import multiprocessing.process
import pickle
import sys
import time
from types import SimpleNamespace

from salve.ending import _runs


def _join(process: int) -> None:
    while _runs(process):
        time.sleep(0.1)


if __name__ == "__main__":
    target, args = pickle.loads(bytes.fromhex(sys.argv[1]))
    leader = int(sys.argv[2])
    multiprocessing.process._parent_process = SimpleNamespace(join=lambda: _join(leader))  # type: ignore[attr-defined]
    target(*args)
