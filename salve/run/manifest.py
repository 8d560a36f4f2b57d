"""What a run was: settings, versions, inputs."""

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

#: What a run leaves in its folder that can be read later: files, and the folders of the report.
LEAVES = (SETTINGS, METRICS, "index.html", "tables", "figures", "edits")
PACKAGES = ("salve", "torch", "torchvision", "timm", "pytorch-lightning", "hydra-core", "torchmetrics")


def write_manifest(folder: Path, config: Config, context: StageContext, artifacts: Mapping[str, Artifact]) -> None:
    """Write ``manifest.json``: versions, git state, seed, digests of what went in, key, digest, path of artifacts.

    It vouches for the run's own files, which reach the disk before it, and for itself, by their digests.
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
    # The mark of a finished run: it is there as a whole or not at all.
    write_whole(folder / MANIFEST, json.dumps(sealed(record), indent=2) + "\n")


def _flushed(folder: Path) -> dict[str, str]:
    """Digests of what the run leaves, by path from its folder, once all of it is on the disk."""
    found = [path for name in LEAVES for path in (folder / name, *sorted((folder / name).rglob("*")))]
    for path in found:
        if path.exists():
            flush(path)
    names = [path.relative_to(folder).as_posix() for path in found if path.is_file()]
    return dict(zip(names, file_digests(folder, names, own=True), strict=True))


def _path_from(folder: Path, path: Path) -> str:
    """Where an artifact lies as seen from the run's folder, so that both can be moved together."""
    return Path(os.path.relpath(path.absolute(), folder.absolute())).as_posix()


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None where the package is not run from its repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", str(Path(__file__)))  # fails when git does not know this very file
        return {"commit": git("rev-parse", "HEAD"), "changed": git("status", "--porcelain", "-uno") != ""}
    except (OSError, subprocess.CalledProcessError):
        return None
