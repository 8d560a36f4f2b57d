"""After a training, memory that is freed goes back to the system, also from between what stays."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from salve.sae import memory

PROGRAM = """
import runpy, sys
import numpy as np

functions = runpy.run_path(sys.argv[1])


def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def churn():
    large, small = [], []
    for _ in range(20):
        large.append(np.ones(2**20))  # 8 MiB
        small.append(np.ones(2**12))  # 32 KiB, which stay above each of them
    del large
    return small


before = held()
functions["keep_freed_memory"]()
kept = churn()
during = held()
functions["give_freed_memory_back"]()
after = held()
kept = None
kept = churn()
print(during - before, after - before, held() - after)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory on request")
def test_freed_memory_is_kept_while_a_training_lasts_and_no_longer() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(memory.__file__))], capture_output=True, text=True, check=True
    )
    during, after, later = map(float, done.stdout.split())
    assert during > 100
    assert after < 20
    assert later < 20
