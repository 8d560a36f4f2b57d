"""What a sweep's folder holds: which runs were planned, what became of each, and the numbers of the finished ones."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from filelock import FileLock, Timeout

from salve.integrity import MANIFEST, METRICS, SETTINGS, damage_of_run
from salve.report.names import data_name, value_text
from salve.types import UserError

State = Literal["finished", "failed", "running", "interrupted", "not begun"]

#: Parts of the settings that say how and where a run is made, not what it computes.
IDLE = ("name", "output_dir", "trainer", "logger", "sweep")
IDLE_LEAVES = ("data._target_", "data.num_workers", "sae.ensemble")

#: Settings that the table always has, where the runs have them.
CORE = (
    *("backbone.name", "layer", "data"),
    *("sae.variant", "sae.dictionary_size", "sae.sparsity", "sae.k", "sae.seed", "seed"),
)

#: PyYAML's parser in C, where it was built with it, is ten times as fast.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class SweptRun:
    """One planned run of a sweep.

    Attributes:
        key: name of its folder. swept: values of the settings that the sweep varies, by dotted name.
        state: what became of it. reason: why it failed, else empty.
        settings: all its settings by dotted name, and metrics: its numbers; both empty unless it is finished.
    """

    key: str
    swept: Mapping[str, Any]
    state: State
    reason: str
    settings: Mapping[str, Any]
    metrics: Mapping[str, Any]


def read_sweep(folder: Path) -> list[SweptRun]:
    """Every run that was planned in a sweep's folder, from that folder alone.

    Raises:
        UserError: the folder holds no sweep.
    """
    try:
        planned = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["runs"]
        if outside := [key for key in planned if key in ("", "..") or key != Path(key).name]:
            raise ValueError(f"{outside[0]!r} is no name of a run")
        return [_read_run(folder, key, entry["swept"]) for key, entry in planned.items()]
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no folder of a sweep, since it holds no sweep.json; give one that `salve -m` has written, "
            "<output_dir>/sweeps/<name>."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'sweep.json'} cannot be read as the plan of a sweep ({error}); the command that started it "
            "writes it anew."
        ) from error


def _read_run(sweep: Path, key: str, swept: Mapping[str, Any]) -> SweptRun:
    folder = sweep / key
    if not os.path.lexists(folder / MANIFEST):
        return SweptRun(key, swept, *_unfinished(sweep, key), {}, {})
    if damage := damage_of_run(folder):
        return SweptRun(key, swept, "failed", f"its record is damaged: {damage}", {}, {})
    try:
        with (folder / SETTINGS).open(encoding="utf-8") as file:
            config = yaml.load(file, _LOADER)
        settings = _leaves(config) | {"data": data_name(config)}
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        return SweptRun(key, swept, "finished", "", settings, dict(metrics))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        return SweptRun(key, swept, "failed", f"its files cannot be read ({' '.join(str(error).split())})", {}, {})


def _unfinished(sweep: Path, key: str) -> tuple[State, str]:
    folder = sweep / key
    if (folder / "running.json").is_file():
        return ("running" if _held(sweep / ".locks" / f"{key}.lock") else "interrupted"), ""
    if (folder / "failure.json").is_file():
        try:
            return "failed", str(json.loads((folder / "failure.json").read_text(encoding="utf-8"))["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return "failed", "its failure.json cannot be read"
    return "not begun", ""


def _held(lock: Path) -> bool:
    """True while a process holds the lock; the operating system takes it from one that ends, however it ends."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except (Timeout, OSError):
        return True


def _leaves(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Settings by dotted name; a list is one value."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if not path and name in IDLE:
            continue
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{path}{name}.")
        elif f"{path}{name}" not in IDLE_LEAVES:
            found[f"{path}{name}"] = value
    return found


def tidy_table(runs: list[SweptRun]) -> pd.DataFrame:
    """One row per finished run.

    Returns:
        Columns: ``run`` (the key); the settings ``CORE``, then every other one that varies among the runs or was
        swept, by dotted name (lists as JSON); the metrics. Sorted by the settings.
    """
    done = [run for run in runs if run.state == "finished"]
    settings = pd.DataFrame([{name: _cell(value) for name, value in run.settings.items()} for run in done])
    swept = {name for run in runs for name in run.swept}
    core = [name for name in CORE if name in settings]
    others = [name for name in settings if name not in core and (name in swept or _varies(settings[name]))]
    metrics = pd.DataFrame([dict(run.metrics) for run in done], index=settings.index)
    keys = pd.DataFrame({"run": [run.key for run in done]}, index=settings.index, dtype=str)
    table = pd.concat([keys, settings[[*core, *others]], metrics], axis=1)
    if table.empty:
        return table
    by = [name for name in (*core, *others) if _varies(table[name])]
    return table.sort_values([*by, "run"], key=_sortable, kind="stable", ignore_index=True)


def _cell(value: Any) -> Any:
    return value_text(value) if isinstance(value, (list, tuple)) else value


def _varies(values: pd.Series) -> bool:
    return len(values.drop_duplicates()) > 1


def _sortable(values: pd.Series) -> pd.Series:
    return values if pd.api.types.is_numeric_dtype(values) else values.astype(str)


def varying(table: pd.DataFrame, runs: list[SweptRun]) -> list[str]:
    """The settings that tell the runs apart: those that were swept, and others that do not follow from them."""
    settings = [name for name in table if name not in {"run", *(m for run in runs for m in run.metrics)}]
    values: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.swept.items():
            values.setdefault(name, set()).add(value_text(value))
    axes = [name for name, found in values.items() if len(found) > 1]
    kept: list[str] = []
    for axis in axes:  # of a group, such as backbone=…, the main settings in it
        of_group = [name for name in settings if name in CORE and name.startswith(f"{axis}.") and _varies(table[name])]
        kept += [axis] if axis in settings else [name for name in of_group if name not in kept]
    for name in settings:
        if name not in kept and _varies(table[name]) and not _follows(table, name, kept):
            kept.append(name)
    return [name for name in settings if name in kept]


def _follows(table: pd.DataFrame, name: str, known: list[str]) -> bool:
    """Whether the runs' values of one setting are fixed by those of others."""
    return bool(known) and len(table[known].drop_duplicates()) == len(table[[*known, name]].drop_duplicates())
