# SPDX-License-Identifier: MIT
"""Write ``manifest.json``, the record of a finished run: versions, inputs, artifacts and files."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from salve.artifacts import Artifact, digest_of_file, write_whole
from salve.files import file_digests, flush
from salve.integrity import MANIFEST, METRICS, SETTINGS, sealed
from salve.run.schema import Config
from salve.stages import StageContext

#: Files and folders in a run's folder that the manifest vouches for.
LEAVES = (SETTINGS, METRICS, "index.html", "explorer.html", "tables", "figures", "edits")
PACKAGES = ("salve", "torch", "torchvision", "timm", "pytorch-lightning", "hydra-core", "torchmetrics")


def write_manifest(folder: Path, config: Config, context: StageContext, artifacts: Mapping[str, Artifact]) -> None:
    """Write ``manifest.json``: versions, git state, seed, digests of inputs, and the key, digest and path of artifacts.

    It also holds the digests of the run's own files, which reach the disk before it, and of itself.
    """
    weights = Path(config.backbone.weights)
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).parent),
        "seed": config.seed,
        "inputs": {
            "data": context.data.fingerprint(),
            "weights": digest_of_file(weights) if weights.is_file() else config.backbone.weights,
        },
        "artifacts": {
            kind: {"key": a.key, "digest": a.digest, "reused": a.reused, "path": _path_from(folder, a.path)}
            for kind, a in artifacts.items()
        },
        "files": _flushed(folder),
    }
    # It marks a finished run, so it must be there as a whole or not at all.
    write_whole(folder / MANIFEST, json.dumps(sealed(record), indent=2) + "\n")


def _flushed(folder: Path) -> dict[str, str]:
    """Flush the run's files to disk; return their digests by their path from its folder."""
    found = [path for name in LEAVES for path in (folder / name, *sorted((folder / name).rglob("*")))]
    for path in found:
        if path.exists():
            flush(path)
    names = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
    return dict(zip(names, file_digests(folder, names, own=True), strict=True))


def _path_from(folder: Path, path: Path) -> str:
    """An artifact's path from the run's folder, which stays right when both are moved together."""
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit, and whether files differ from it; None where salve does not run from its repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__)))  # fails if git does not track this file
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", "-uno") != ""}
    except (OSError, subprocess.CalledProcessError):
        return None
