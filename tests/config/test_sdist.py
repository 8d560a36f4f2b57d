"""The source distribution holds every file of the repository, but for what GitHub alone reads."""

import subprocess
from pathlib import Path

import pytest

builders = pytest.importorskip("hatchling.builders.sdist")

ROOT = Path(__file__).parents[2]


def test_the_source_distribution_is_complete() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    wanted = {name for name in listed if (ROOT / name).is_file() and not name.startswith(".github/")}
    included = builders.SdistBuilder(str(ROOT)).recurse_included_files()
    found = {Path(one.path).relative_to(ROOT).as_posix() for one in included}
    assert found == wanted
    assert {"CONTRIBUTING.md", "docs/results.md", "tests/lowest.txt", "benchmarks/training.py"} <= found
