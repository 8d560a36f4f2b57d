"""``salve rerun=FOLDER``: repeat a run from the settings in its folder, and say whether the results are the same."""

import logging
import shlex
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from salve.artifacts import read_record
from salve.run.folder import LOG, MANIFEST, RunFolder, claimed
from salve.run.inputs import check_inputs

RERUN = "rerun="


def rerun(arguments: Sequence[str], console: Console) -> bool:
    """Repeat a run.

    Args:
        arguments: ``rerun=FOLDER``, and settings to change as ``key=value``. console: where it is shown.

    Returns:
        False if an artifact came out otherwise than before.

    Raises:
        UserError: no such run, or no such setting.
    """
    before = RunFolder(Path(next(a for a in arguments if a.startswith(RERUN)).removeprefix(RERUN)))
    config = before.settings([argument for argument in arguments if not argument.startswith(RERUN)])
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
    if not (before.path / MANIFEST).is_file():
        console.print("The earlier run did not finish; there is nothing to compare with.")
        return True
    return _compare(read_record(before.path / MANIFEST), read_record(folder / MANIFEST), console)


def _compare(old: dict[str, Any], new: dict[str, Any], console: Console) -> bool:
    same = True
    for kind, artifact in new["artifacts"].items():
        if kind not in old["artifacts"]:
            continue
        equal = artifact["digest"] == old["artifacts"][kind]["digest"]
        same &= equal
        found = ", found and not made again" if artifact["reused"] else ""
        console.print(f"{kind}: {'the same bits' if equal else 'DIFFERENT'}{found}", highlight=False, markup=False)
    for what in ("python", "git", "seed", "inputs"):
        if old.get(what) != new.get(what):
            console.print(f"{what}: {old.get(what)} then, {new.get(what)} now", highlight=False, markup=False)
    for package, version in new["versions"].items():
        if old["versions"].get(package) != version:
            console.print(
                f"{package}: {old['versions'].get(package)} then, {version} now", highlight=False, markup=False
            )
    return same
