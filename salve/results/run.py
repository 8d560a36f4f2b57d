# SPDX-License-Identifier: MIT
"""One run, read from its folder."""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml
from filelock import FileLock, Timeout

from salve.artifacts import Artifact, is_own, load_tensors, read_record
from salve.integrity import (
    DONE,
    KEY_SETTINGS,
    MANIFEST,
    METRICS,
    SETTINGS,
    check_artifact,
    damage_of_run,
    read_manifest,
)
from salve.results.artifacts import table_in
from salve.settings import is_computed
from salve.types import Split, UserError

if TYPE_CHECKING:  # they take seconds, and a state or a setting is read without them
    import pandas as pd
    from torch import Tensor

    from salve.activations import Captured
    from salve.sae import SAE

State = Literal["finished", "failed", "running", "interrupted", "not begun"]

#: Files of a sweep (its plan) and of a run that is not finished.
PLAN, RUNNING, FAILURE = "sweep.json", "running.json", "failure.json"

#: PyYAML's parser in C, where it was built with it, is ten times as fast.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: What Python raises for a file that cannot be read, or that holds something else.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError)


def open_run(folder: Path | str, artifacts: Path | str | None = None) -> "Run":
    """Open a run's folder.

    Args:
        folder: of the run, such as ``outputs/runs/quickstart/2026-01-31_12-00-00`` or one of a sweep's.
        artifacts: the folder ``<output_dir>/artifacts``, if the run no longer lies where it was made.

    Raises:
        UserError: there is no such folder, or it holds no run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if (folder / PLAN).is_file():
        raise UserError(f"{folder} is the folder of a sweep; open it with open_sweep.")
    if not any((folder / name).is_file() for name in (MANIFEST, SETTINGS)):
        raise UserError(f"{folder} is no folder of a run: it holds neither {MANIFEST} nor {SETTINGS}.")
    return Run(folder, artifacts)


class Run:
    """One run; :func:`open_run` opens it.

    What is read is kept, so open the run again to see how one that is still running gets on.

    Attributes:
        folder: of the run. key: the folder's name.
    """

    def __init__(
        self, folder: Path, artifacts: Path | str | None = None, swept: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.key = folder, Path(os.path.abspath(folder)).name
        self._store = None if artifacts is None else Path(artifacts)
        self._swept = swept
        self._checked: dict[str, Artifact] = {}
        self._tables: dict[tuple[str, str], pd.DataFrame] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.state})"

    # -- the run itself

    @property
    def state(self) -> State:
        """``"finished"``, ``"failed"``, ``"running"``, ``"interrupted"`` or ``"not begun"``."""
        return self._state[0]

    @property
    def reason(self) -> str:
        """Why the run failed; empty for any other state."""
        return self._state[1]

    @property
    def finished(self) -> bool:
        """Whether the run left results that can be read."""
        return self.state == "finished"

    @cached_property
    def _state(self) -> tuple[State, str]:
        if os.path.lexists(self.folder / MANIFEST):
            if self._damage:
                return "failed", f"its record is damaged: {self._damage}"
            try:
                _ = self._manifest, self._metrics, self.flat_settings
            except (UserError, *UNREADABLE) as error:
                return "failed", f"its files cannot be read ({' '.join(str(error).split())})"
            return "finished", ""
        if (self.folder / RUNNING).is_file():
            return ("running" if _held(self.folder.parent / ".locks" / f"{self.key}.lock") else "interrupted"), ""
        if (self.folder / FAILURE).is_file():
            try:
                return "failed", str(read_record(self.folder / FAILURE)["reason"])
            except (OSError, ValueError, KeyError):
                return "failed", f"its {FAILURE} cannot be read"
        return "not begun", ""

    @cached_property
    def _damage(self) -> str:
        return damage_of_run(self.folder) if os.path.lexists(self.folder / MANIFEST) else ""

    @cached_property
    def swept(self) -> Mapping[str, Any]:
        """The values of the settings that the run's sweep varies, by dotted name; empty outside of a sweep."""
        if self._swept is not None:
            return self._swept
        try:
            return dict(read_record(self.folder.parent / PLAN)["runs"][self.key]["swept"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All settings, nested: ``run.settings["sae"]["sparsity"]``.

        Raises:
            UserError: they are damaged, or cannot be read.
        """
        if self._damage:
            raise UserError(f"The record of the run {self.folder} is damaged: {self._damage}.")
        file = self.folder / SETTINGS
        try:
            with file.open(encoding="utf-8") as stream:
                settings = yaml.load(stream, _LOADER)
        except UNREADABLE as error:
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}.") from error
        if not isinstance(settings, dict):
            raise UserError(f"{file} holds no settings of a run.")
        return settings

    @cached_property
    def flat_settings(self) -> dict[str, Any]:
        """The settings that results depend on, by dotted name (``sae.sparsity``); ``data`` is the name of the data."""
        return _leaves(self.settings) | {"data": data_name(self.settings)}

    @property
    def metrics(self) -> dict[str, Any]:
        """The numbers of ``metrics.json``; :func:`salve.report.metrics.run_metrics` says what each is.

        Raises:
            UserError: the run is not finished.
        """
        self._require_finished()
        return self._metrics

    @cached_property
    def _metrics(self) -> dict[str, Any]:
        return read_record(self.folder / METRICS)

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        return read_manifest(self.folder)

    def _require_finished(self) -> None:
        if not self.finished:
            reason = f" ({self.reason})" if self.reason else ""
            raise UserError(
                f"The run {self.folder} has no results, since it is {self.state}{reason}; the command that started it "
                "finishes it."
            )

    # -- its artifacts

    @cached_property
    def artifacts(self) -> dict[str, Path]:
        """The folder of each artifact by kind (``"classifier"``, ``"sae"``, ``"control"``, …); not checked yet.

        Raises:
            UserError: the run is not finished.
        """
        self._require_finished()
        where = "path" if self._store is None else "key"
        made = {kind: entry[where] for kind, entry in self._manifest["artifacts"].items() if entry.get(where)}
        if self._store is None:
            return {kind: (self.folder / str(path)).resolve() for kind, path in made.items()}
        return {kind: self._store / kind / str(key) for kind, key in made.items()}

    def artifact(self, kind: str) -> Artifact:
        """One artifact, checked when it is first asked for.

        Raises:
            UserError: the run made no such artifact, or it was moved away or is damaged.
        """
        if kind not in self._checked:
            folder = self._folder(kind)
            if not os.path.lexists(folder):
                raise UserError(
                    f"The artifact {folder} is not there; if the run was moved, say where its artifacts are: "
                    "artifacts=<output_dir>/artifacts."
                )
            check_artifact(folder)
            key = str(self._manifest["artifacts"][kind].get("key", folder.name))
            self._checked[kind] = Artifact(kind, key, folder, read_record(folder / DONE)["digest"], reused=True)
        return self._checked[kind]

    def digest(self, kind: str) -> str:
        """The digest of an artifact's content, as the run's manifest has it."""
        self._folder(kind)
        return str(self._manifest["artifacts"][kind].get("digest", ""))

    def _folder(self, kind: str) -> Path:
        if kind not in self.artifacts:
            raise UserError(
                f"The run {self.folder} made no artifact {kind!r}; it made: {', '.join(self.artifacts) or 'none'}."
            )
        return self.artifacts[kind]

    def files(self, kind: str) -> list[str]:
        """The names of an artifact's files, sorted."""
        folder = self.artifact(kind).path
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        return sorted(name for name in names if name not in (DONE, KEY_SETTINGS))

    def _file(self, kind: str, name: str) -> Path:
        folder = self.artifact(kind).path
        path = folder / name
        if not path.is_file() or not is_own(folder, path):
            raise UserError(f"The artifact {folder} holds no {name}; it holds: {', '.join(self.files(kind))}.")
        return path

    def table(self, kind: str, name: str) -> "pd.DataFrame":
        """A CSV or Parquet table of an artifact: ``run.table("control", "curves.csv")``.

        Returns:
            A copy, with text columns as ``str``.

        Raises:
            UserError: there is no such artifact or table.
        """
        if (kind, name) not in self._tables:
            self._tables[kind, name] = table_in(self._file(kind, name))
        return self._tables[kind, name].copy()

    def tensors(self, kind: str, name: str) -> "dict[str, Tensor]":
        """Named tensors of a safetensors file: ``run.tensors("features", "class_means.safetensors")``.

        Raises:
            UserError: there is no such artifact or file.
        """
        return load_tensors(self._file(kind, name))

    def record(self, kind: str, name: str) -> dict[str, Any]:
        """A JSON record of an artifact: ``run.record("control", "verdict.json")``.

        Raises:
            UserError: there is no such artifact or record.
        """
        return read_record(self._file(kind, name))

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the labels."""
        return [str(name) for name in self.record("classifier", "classifier.json")["classes"]]

    @cached_property
    def sae(self) -> "SAE":
        """The SAE on the CPU; it takes raw activations."""
        from salve.sae import load_sae

        return load_sae(self._file("sae", "sae.safetensors"))

    def activations(self, split: str) -> "Captured":
        """Activations ``[N, M]`` and labels ``[N]`` of a split: ``train``, ``select`` or ``test``."""
        from salve.activations import load_captured

        if split not in get_args(Split):
            raise UserError(f"{split!r} is no split; choose from {', '.join(get_args(Split))}.")
        return load_captured(self.artifact("activations").path, split)

    @cached_property
    def edits(self) -> list[Path]:
        """The edit files that stage ``control`` wrote, for :func:`salve.editing.load_edit_file`."""
        folder = self.artifact("control").path
        return [folder / name for name in self.files("control") if Path(name).match("edits/*.json")]


def _held(lock: Path) -> bool:
    """True while a process holds the lock; the operating system takes it from one that ends, however it ends."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except (Timeout, OSError):
        return True


def data_name(settings: Mapping[str, Any]) -> str:
    """The name of the data in a run's settings: ``salve.data.ConceptsData`` → ``concepts``."""
    return str(settings["data"]["_target_"]).rpartition(".")[2].removesuffix("Data").lower()


def _leaves(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The settings that results depend on, by dotted name; a list is one value."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{path}{name}"
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{key}.")
        elif is_computed(key) and key != "data._target_":  # of which the name of the data says enough
            found[key] = value
    return found
