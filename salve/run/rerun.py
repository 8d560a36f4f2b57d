# SPDX-License-Identifier: MIT
"""``salve rerun=FOLDER``: repeat a run from the settings in its folder, and compare the results."""

import logging
import os
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from salve.integrity import MANIFEST, SETTINGS, damage_of_run, read_manifest
from salve.run.explain import conf_dir
from salve.run.folder import LOG, RunFolder, claimed
from salve.run.inputs import check_inputs
from salve.run.schema import Config, LoggerSettings
from salve.types import UserError

RERUN = "rerun="


def rerun(arguments: Sequence[str], console: Console) -> bool:
    """Repeat a run.

    The folder may come from somebody else. It decides what is computed, and from which images and weights. The caller
    decides where results go: ``output_dir`` and ``logger`` are those of the command or the defaults, and nothing is
    downloaded unless the command says ``data.download=true``.

    Args:
        arguments: ``rerun=FOLDER``, and settings to change as ``key=value``.
        console: where progress and the comparison are shown.

    Returns:
        False if an artifact differs from the earlier run's.

    Raises:
        UserError: there is no such run, or its record is damaged; or see :func:`salve.run.stored.stored_settings`.
    """
    before = RunFolder(Path(next(a for a in arguments if a.startswith(RERUN)).removeprefix(RERUN)))
    earlier = _manifest(before.path)
    config = before.settings([a for a in arguments if not a.startswith(RERUN)], instead=callers_own())
    folder = run_again(config, "salve " + shlex.join(arguments), console)
    if earlier is None:
        console.print("The earlier run did not finish; there is nothing to compare with.")
        return True
    return _compare(earlier, read_manifest(folder), console)


def run_again(config: Config, command: str, console: Console) -> Path:
    """Make a run with settings that were read from a folder.

    Args:
        config: the settings. command: how it was started, for the report. console: where progress is shown.

    Returns:
        The folder of the new run.
    """
    check_inputs(config)
    from salve.run.execute import execute  # only now, since it takes seconds

    wanted = Path(config.output_dir) / "runs" / config.name / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    with claimed(wanted) as folder:
        logging.basicConfig(
            format="%(asctime)s  %(message)s",
            datefmt="%H:%M:%S",
            level=logging.INFO,
            handlers=[logging.StreamHandler(), logging.FileHandler(folder / LOG)],
            force=True,
        )
        execute(config, folder, command, console)
    return folder


def callers_own() -> dict[str, Any]:
    """The settings that a rerun does not take from the folder, with their defaults."""
    usual = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    return {"output_dir": usual["output_dir"], "logger": LoggerSettings(kind="csv"), "data.download": False}


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the run that is repeated; None if the run did not finish."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    if damage := damage_of_run(folder, (SETTINGS,)):
        raise UserError(
            f"The run in {folder} is damaged and cannot be compared with: {damage}; remove its {MANIFEST} to repeat "
            "the run without a comparison."
        )
    return read_manifest(folder)


def _compare(old: dict[str, Any], new: dict[str, Any], console: Console) -> bool:
    same = True
    for kind, artifact in new["artifacts"].items():
        if kind not in old["artifacts"]:
            continue
        equal = artifact["digest"] == old["artifacts"][kind].get("digest")
        same &= equal
        found = ", found and not made again" if artifact["reused"] else ""
        console.print(f"{kind}: {'the same bits' if equal else 'DIFFERENT'}{found}", highlight=False, markup=False)
    for what in ("python", "git", "seed", "inputs"):
        if old.get(what) != new.get(what):
            console.print(f"{what}: {old.get(what)} then, {new.get(what)} now", highlight=False, markup=False)
    before = old.get("versions", {})
    for package, version in new["versions"].items():
        if before.get(package) != version:
            console.print(f"{package}: {before.get(package)} then, {version} now", highlight=False, markup=False)
    return same
