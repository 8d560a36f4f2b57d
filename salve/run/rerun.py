"""``salve rerun=FOLDER``: repeat a run from the settings in its folder, and say whether the results are the same."""

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
from salve.run.schema import LoggerSettings
from salve.types import UserError

RERUN = "rerun="


def rerun(arguments: Sequence[str], console: Console) -> bool:
    """Repeat a run.

    The folder may have been sent. What it says is computed again, from the images and weights that it names; where
    results are written and what is sent or fetched are the caller's: ``output_dir`` and ``logger`` are those of the
    command, or as they come, and nothing is downloaded unless the command says ``data.download=true``.

    Args:
        arguments: ``rerun=FOLDER``, and settings to change as ``key=value``. console: where it is shown.

    Returns:
        False if an artifact came out otherwise than before.

    Raises:
        UserError: no such run, one whose record is damaged, or no such setting; or see
            :func:`salve.run.stored.stored_settings`.
    """
    before = RunFolder(Path(next(a for a in arguments if a.startswith(RERUN)).removeprefix(RERUN)))
    earlier = _manifest(before.path)
    config = before.settings([a for a in arguments if not a.startswith(RERUN)], instead=_callers_own())
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
        execute(config, folder, "salve " + shlex.join(arguments), console)
    if earlier is None:
        console.print("The earlier run did not finish; there is nothing to compare with.")
        return True
    return _compare(earlier, read_manifest(folder), console)


def _callers_own() -> dict[str, Any]:
    """By setting, what a rerun does not take from the folder."""
    usual = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    return {"output_dir": usual["output_dir"], "logger": LoggerSettings(kind="csv"), "data.download": False}


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Of a run that is repeated; None if it did not finish."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    if damage := damage_of_run(folder, (SETTINGS,)):
        raise UserError(
            f"The run in {folder} is damaged, so that no other could be said to be the same: {damage}; remove its "
            f"{MANIFEST} to repeat what is left of it."
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
