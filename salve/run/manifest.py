"""What a run was: settings, versions, inputs."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from salve.artifacts import Artifact, write_record

PACKAGES = ("salve", "torch", "torchvision", "timm", "pytorch-lightning", "hydra-core", "torchmetrics")


def write_manifest(folder: Path, seed: int, artifacts: Mapping[str, Artifact]) -> None:
    """Write ``manifest.json``: versions, git state, seed, and the key and digest of every artifact used."""
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).parent),
        "seed": seed,
        "artifacts": {kind: {"key": a.key, "digest": a.digest, "reused": a.reused} for kind, a in artifacts.items()},
    }
    write_record(folder / "manifest.json", record)


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
