# SPDX-License-Identifier: MIT
"""A sweep's runs, read from its folder."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salve.results.run import PLAN, UNREADABLE, Run, State
from salve.types import UserError

if TYPE_CHECKING:  # it takes seconds
    import pandas as pd

#: Settings that a sweep's table always has, where the runs have them.
CORE = (
    *("backbone.name", "layer", "data"),
    *("sae.variant", "sae.dictionary_size", "sae.sparsity", "sae.k", "sae.seed", "seed"),
)


def open_sweep(folder: Path | str, artifacts: Path | str | None = None) -> "Sweep":
    """Open a sweep's folder.

    Args:
        folder: ``<output_dir>/sweeps/<name>``, or where it was moved.
        artifacts: the folder ``<output_dir>/artifacts``, if the sweep no longer lies where it was made.

    Raises:
        UserError: the folder holds no sweep.
    """
    folder = Path(folder)
    try:
        planned = json.loads((folder / PLAN).read_text(encoding="utf-8"))["runs"]
        if outside := [key for key in planned if key in ("", "..") or key != Path(key).name]:
            raise ValueError(f"{outside[0]!r} is no name of a run")
        return Sweep(folder, [Run(folder / key, artifacts, entry["swept"]) for key, entry in planned.items()])
    except FileNotFoundError:
        raise UserError(
            f"{folder} is no folder of a sweep: it holds no {PLAN}; give one that `salve -m` has written, "
            "<output_dir>/sweeps/<name>."
        ) from None
    except UNREADABLE as error:
        raise UserError(
            f"{folder / PLAN} cannot be read as the plan of a sweep ({error}); the command that started it writes it "
            "anew."
        ) from error


class Sweep(Sequence[Run]):
    """The planned runs of a sweep, in their order; :func:`open_sweep` opens it.

    Attributes:
        folder: of the sweep. name: the folder's name.
    """

    def __init__(self, folder: Path, runs: Sequence[Run]) -> None:
        self.folder, self.name, self._runs = folder, folder.resolve().name, tuple(runs)

    def __repr__(self) -> str:
        return f"Sweep({str(self.folder)!r}, {len(self.finished)} of {len(self)} runs finished)"

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __getitem__(self, at: Any) -> Any:
        """A run by its position or its key, or a slice of the runs."""
        if not isinstance(at, str):
            return self._runs[at]
        found = [run for run in self._runs if run.key == at]
        if not found:
            raise UserError(f"The sweep {self.name} planned no run {at}.")
        return found[0]

    def in_state(self, state: State) -> list[Run]:
        """The runs that are finished, failed, running, interrupted or not begun."""
        return [run for run in self if run.state == state]

    @property
    def finished(self) -> list[Run]:
        """The runs that left results."""
        return self.in_state("finished")

    @property
    def unfinished(self) -> list[Run]:
        """All others; each has a ``state``, and a ``reason`` if it failed."""
        return [run for run in self if not run.finished]

    @cached_property
    def table(self) -> "pd.DataFrame":
        """One row per finished run.

        Columns: ``run`` (the key); the settings ``CORE``, then every other one that varies among the runs or was swept,
        by dotted name (lists as JSON); the metrics. Sorted by the settings.
        """
        import pandas as pd

        done = self.finished
        settings = pd.DataFrame([{name: _cell(value) for name, value in run.flat_settings.items()} for run in done])
        swept = {name for run in self for name in run.swept}
        core = [name for name in CORE if name in settings]
        others = [name for name in settings if name not in core and (name in swept or varies(settings[name]))]
        metrics = pd.DataFrame([run.metrics for run in done], index=settings.index)
        keys = pd.DataFrame({"run": [run.key for run in done]}, index=settings.index, dtype=str)
        table = pd.concat([keys, settings[[*core, *others]], metrics], axis=1)
        if table.empty:
            return table
        by = [name for name in (*core, *others) if varies(table[name])]

        def sortable(values: "pd.Series") -> "pd.Series":
            return values if pd.api.types.is_numeric_dtype(values) else values.astype(str)

        return table.sort_values([*by, "run"], key=sortable, kind="stable", ignore_index=True)


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return value


def varies(values: "pd.Series") -> bool:
    """Whether a column holds more than one value."""
    return len(values.drop_duplicates()) > 1
