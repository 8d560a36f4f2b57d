"""Carry wheels to a machine without a network, and use there only those that it lacks.

Only the standard library is imported here, because this runs before anything else is importable.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

#: Bytes that may be carried.
MOST = 60 * 2**20

#: Pure-Python packages that ``salve`` and its tests need and that a machine with PyTorch may lack. The versions of the
#: first three belong together.
NEEDED = (
    "hydra-core==1.3.8",
    "omegaconf==2.3.1",
    "antlr4-python3-runtime==4.9.3",
    "jaxtyping",
    "wadler-lindig",
    "beartype",
    "filelock",
    "jinja2",
    "rich",
    "markdown-it-py",
    "mdurl",
    "pygments",
    "pytest",
    "pytest-timeout",
    "iniconfig",
    "pluggy",
    "packaging",
    "cloudpickle",
)
#: Libraries to compare with (``contenders.py`` has the same versions), and the pure-Python packages they import.
PEERS = (
    "overcomplete==0.3.0",
    "dictionary-learning==0.1.0",
    "eai-sparsify==1.3.3",
    "sae-lens==6.54.12",
    "saev==0.1.0",
    "einops",
    "natsort",
    "schedulefree",
    "simple-parsing",
    "docstring-parser",
    "datasets",
    "dill",
    "multiprocess",
    "nltk",
    "python-dotenv",
    "tenacity",
    "transformer-lens<4",
    "fancy-einsum",
    "better-abc",
    "typeguard",
)


class Wheel(NamedTuple):
    """A wheel's file, the name and version of its package, and the top-level modules in it."""

    file: Path
    name: str
    version: str
    modules: tuple[str, ...]


def read_wheel(file: Path) -> Wheel:
    """What a wheel holds.

    Args:
        file: ``NAME-VERSION-….whl``.
    """
    name, version = file.name.split("-")[:2]
    with zipfile.ZipFile(file) as archive:
        paths = [Path(entry).parts for entry in archive.namelist() if entry.endswith(".py")]
    modules = {parts[0].removesuffix(".py") for parts in paths if not parts[0].endswith((".dist-info", ".data"))}
    return Wheel(file, normalised(name), version, tuple(sorted(modules)))


def normalised(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_missing(wheel: Wheel) -> bool:
    """Whether this Python has neither the package nor all of its modules."""
    if any(True for _ in metadata.distributions(name=wheel.name)):
        return False
    return any(find_spec(module) is None for module in wheel.modules)


def unpack_missing(folder: Path, target: Path) -> list[Wheel]:
    """Unpack the wheels that this Python lacks.

    What this Python has itself is never hidden, whatever its version.

    Args:
        folder: of wheels. target: where they are unpacked; goes on ``sys.path``.

    Returns:
        The wheels that were unpacked, by name.
    """
    missing = [wheel for wheel in map(read_wheel, sorted(folder.glob("*.whl"))) if is_missing(wheel)]
    for wheel in missing:
        there = {module for module in wheel.modules if find_spec(module) is not None}
        with zipfile.ZipFile(wheel.file) as archive:
            entries = archive.namelist()
            archive.extractall(target, [it for it in entries if it.split("/")[0].removesuffix(".py") not in there])
    return missing


def declare(root: Path, target: Path) -> None:
    """Make this repository count as an installed package, if ``salve`` is not installed: runs record its version.

    Args:
        root: of the repository. target: a folder on ``sys.path``.
    """
    if any(True for _ in metadata.distributions(name="salve")):
        return
    found = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, "pyproject.toml has no version"
    folder = target / f"salve-{found[1]}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: salve\nVersion: {found[1]}\n")


def collect(folder: Path, python: str = "3.12", requirements: Iterable[str] = (*NEEDED, *PEERS)) -> list[str]:
    """Download pure-Python wheels with pip, without what they depend on; build those that are published as source only.

    Args:
        folder: where the wheels go; wheels that are there stay.
        python: version of the Python that will use them.
        requirements: what pip is asked for.

    Returns:
        A sentence for each requirement that was left out because it has no pure-Python wheel.

    Raises:
        SystemExit: the wheels are too large to carry, or one that ``salve`` needs cannot be had.
    """
    lacking: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        for requirement in requirements:
            if (why := _download(requirement, Path(scratch), python)) and requirement in NEEDED:
                sys.exit(f"{requirement} cannot be had as a wheel: {why}")
            if why:
                lacking.append(f"{requirement} was left out: {why}")
        found = sorted(Path(scratch).glob("*.whl"))
        lacking += [f"{file.name} was left out: it is not pure Python." for file in found if not _is_pure(file)]
        folder.mkdir(parents=True, exist_ok=True)
        for file in filter(_is_pure, found):
            shutil.copy(file, folder)
    size = sum(file.stat().st_size for file in folder.glob("*.whl"))
    if size > MOST:
        sys.exit(f"{folder} has {size / 2**20:.0f} MiB of wheels; at most {MOST / 2**20:.0f} MiB may be carried.")
    return lacking


def _is_pure(file: Path) -> bool:
    return file.name.endswith("-none-any.whl")


def _download(requirement: str, folder: Path, python: str) -> str:
    """Put a wheel into the folder; returns why it could not be had, or nothing."""
    pip = [sys.executable, "-m", "pip"]
    pure = ["--platform", "any", "--abi", "none", "--python-version", python, "--only-binary=:all:"]
    command = [*pip, "download", "--quiet", "--no-deps", *pure, "--dest", str(folder), requirement]
    if subprocess.run(command, capture_output=True).returncode == 0:
        return ""
    command = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), requirement]
    ran = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
    return "" if ran.returncode == 0 else (errors or ["pip gives no reason."])[-1]
