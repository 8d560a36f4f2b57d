# SPDX-License-Identifier: MIT
"""Log a run's activations, SAE and edit files as versioned W&B artifacts, with what each was made from."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salve.artifacts import Artifact, is_own
from salve.results.run import data_name

#: Kinds of artifacts that are logged, with their type in W&B. Each is made from those before it.
TYPES = {"activations": "activations", "sae": "sae", "control": "edit_file"}
#: The longest name that W&B takes.
LONGEST = 128


def log_artifacts(run: Any, artifacts: Mapping[str, Artifact], config: Mapping[str, Any]) -> None:
    """Log artifacts that the run made as its outputs, and artifacts that it reused as its inputs.

    The name says what it is (``sae-resnet18-avgpool-imagenette``), the version stands for one content, and the alias is
    the key in the store. The metadata name what each was made from, because W&B's own graph does not show it where one
    run made them all.

    Args:
        run: an open W&B run.
        artifacts: by kind.
        config: the run's resolved settings, plain.
    """
    import wandb

    if "activations" not in artifacts:
        return
    site = artifacts["activations"].record("activations.json")["site"]
    made_from: dict[str, str] = {}
    for kind, type_ in TYPES.items():
        artifact = artifacts.get(kind)
        folder = None if artifact is None else artifact.file("edits") if kind == "control" else artifact.path
        if artifact is None or folder is None or not folder.is_dir():
            continue
        name = artifact_name(type_, config["backbone"]["name"], site, data_name(config))
        facts = {"key": artifact.key, "digest": artifact.digest, "made_from": dict(made_from)}
        if kind == "sae":
            facts |= artifact.record("sae.json")
        logged = wandb.Artifact(name, type=type_, metadata=facts)
        # Activations are large, so only their records are logged. The store's files never change, so W&B can upload
        # them from where they are, without a copy.
        for path in sorted(folder.glob("*.json") if kind == "activations" else folder.rglob("*")):
            if path.is_file() and is_own(artifact.path, path):
                name_in_it = str(path.relative_to(folder))
                logged.add_file(str(path), name_in_it, policy="immutable", skip_cache=True)
        if artifact.reused:
            _use(run, logged, artifact.key)
        else:
            run.log_artifact(logged, aliases=["latest", artifact.key])
        made_from[kind] = f"{name}:{artifact.key}"


def log_explorer(run: Any, artifacts: Mapping[str, Artifact], config: Mapping[str, Any], page: Path) -> None:
    """Log the explorer, which stands alone, as an artifact of its own; :func:`log_artifacts` says more."""
    import wandb

    site = artifacts["activations"].record("activations.json")["site"]
    logged = wandb.Artifact(
        artifact_name("explorer", config["backbone"]["name"], site, data_name(config)), type="explorer"
    )
    logged.add_file(str(page), page.name)
    run.log_artifact(logged, aliases=["latest"])


def artifact_name(type_: str, *parts: str) -> str:
    """Join parts to a name that W&B accepts: letters, digits, ``-``, ``_`` and ``.``, at most 128 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join((type_, *parts)))[:LONGEST].rstrip("-")


def _use(run: Any, logged: Any, alias: str) -> None:
    if not run.settings._offline:
        run.use_artifact(logged, aliases=["latest", alias])
        return
    # Offline, `use_artifact` raises. This is what it does online with an artifact that W&B may not know yet: it is
    # written to the run's file, and `wandb sync` declares the input.
    run._log_artifact(logged, aliases=["latest", alias], is_user_created=True, use_after_commit=True)
