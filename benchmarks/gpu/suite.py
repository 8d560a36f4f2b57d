"""The tests marked ``gpu``, in a process of their own."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from gpu.work import Work

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/gpu"
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
NONE_COLLECTED = 5


def run_tests(work: Work) -> None:
    """Run them, and record how many passed, failed and were skipped, and the names of those that failed.

    Raises:
        SystemExit: with status 1 if a test failed or pytest itself did.
    """
    if not (ROOT / TESTS).is_dir():
        work.record.note(outcome=f"there is no {TESTS}")
        print(f"There is no {TESTS}.", flush=True)
        return
    # Warnings are errors for the versions that this project is developed with; a GPU machine has others.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", TESTS, "-v", "-W", "default", "-p", "no:cacheprovider"]
    command += ["--basetemp", str(work.scratch / "pytest"), "--tb=short", "--color=no"]
    counts, failed = Counter[str](), list[str]()
    pipe, environment = subprocess.PIPE, os.environ | {"SALVE_GPU_TESTS_ON": work.device}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := OUTCOME.match(line):
                counts[found[2].lower()] += 1
                failed += [found[1]] if found[2] in ("FAILED", "ERROR") else []
                work.record.note(outcome=counted(counts), failed=failed)
    if process.returncode == NONE_COLLECTED:
        work.record.note(outcome=f"{TESTS} has no test marked gpu")
    elif process.returncode:
        if not failed:
            work.record.note(outcome=f"pytest ended with status {process.returncode}")
        sys.exit(1)


def counted(counts: Counter[str]) -> str:
    """Such as ``12 passed, 1 failed``."""
    return ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
