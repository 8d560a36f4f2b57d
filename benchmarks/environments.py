"""Environments of their own for the libraries that the benchmarks compare with.

Each peer gets a virtual environment that holds the peer and what it pins, and sees the packages of the interpreter that
runs the benchmark behind its own. So torch is there once, of the same version for all, several gigabytes are not copied
for each peer, and a pin of one peer (an older matplotlib, say) troubles neither the others nor this project. It takes
Python with ``venv`` and pip, and network for what is not yet installed.
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

#: Where environments are kept; git ignores it.
FOLDER = Path("outputs/benchmarks/environments")
#: Never replaced by a peer's own choice of version.
SHARED = ("torch", "torchvision", "triton")


def environment(name: str, requirements: Sequence[str], alone: Sequence[str] = (), folder: Path = FOLDER) -> Path:
    """The Python of an environment with these packages, made if it is not there yet.

    Args:
        name: of its folder. folder: of all environments.
        requirements: what pip installs, with what it depends on.
        alone: what pip installs without what it depends on, where that cannot be had together or is not needed.

    Raises:
        UserError: pip could not install them; its last lines say why.
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
    """This interpreter's pip, working in another environment."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-warn-script-location"]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if ran.returncode:
        said = " | ".join(ran.stderr.strip().splitlines()[-3:])
        raise UserError(f"The environment for {name} ({' '.join(arguments)}) could not be made: {said}")
