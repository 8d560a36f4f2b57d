"""A virtual environment for each library that the benchmarks compare with.

It holds the library and what it depends on, and falls back to the packages of the Python that runs the benchmark. So
all use the same torch, which is not copied, and one library's pins affect neither the others nor this project. It needs
``venv``, pip, and a network for what is not installed yet.
"""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from salve.types import UserError

#: Folder of all environments; git ignores it.
FOLDER = Path("outputs/benchmarks/environments")
#: Never replaced by a peer's own choice of version.
SHARED = ("torch", "torchvision", "triton")


def environment(name: str, requirements: Sequence[str], alone: Sequence[str] = (), folder: Path = FOLDER) -> Path:
    """Make an environment with these packages if it is not there yet, and return its Python.

    Args:
        name: of the environment's folder. folder: of all environments.
        requirements: what pip installs with dependencies.
        alone: what pip installs without dependencies, where these conflict or are not needed.

    Raises:
        UserError: pip could not install them; the message ends with pip's last lines.
    """
    home = (folder / name).resolve()
    python, done = home / "bin" / "python", home / "done.json"
    shared = {package: metadata.version(package) for package in SHARED if _installed(package)}
    wanted = json.dumps([sys.version, sys.prefix, shared, list(requirements), list(alone)])
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if done.is_file() and done.read_text() == wanted:
            return python
        shutil.rmtree(home, ignore_errors=True)
        print(f"Making an environment for {name} …", file=sys.stderr, flush=True)
        venv.create(home, with_pip=False, symlinks=True)
        # Behind the environment's own packages, and without the .pth files in there: no editable installs.
        behind = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        [own] = home.glob("lib/python*/site-packages")
        (own / "behind.pth").write_text("\n".join(behind) + "\n")
        pins = home / "constraints.txt"
        pins.write_text("".join(f"{package}=={version}\n" for package, version in shared.items()))
        _install(name, python, ["--constraint", str(pins), *requirements])
        if alone:
            _install(name, python, ["--no-deps", *alone])
        done.write_text(wanted)
    return python


def _installed(package: str) -> bool:
    return bool(list(metadata.distributions(name=package)))


def _install(name: str, python: Path, arguments: list[str]) -> None:
    """Run this Python's pip in another environment."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-warn-script-location"]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if ran.returncode:
        said = " | ".join(ran.stderr.strip().splitlines()[-3:])
        raise UserError(f"The environment for {name} ({' '.join(arguments)}) could not be made: {said}")
