"""Reads what earlier stages left, forgiving of what is not there; what a link leads to elsewhere is not there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open

from salve.artifacts import is_own, read_record, read_table


class Artifacts:
    """Tables, tensors and records by stage kind and file name; what is missing is empty, never an error.

    Args:
        folders: kind (``"classifier"``, ``"sae"``, ...) to the folder that the stage wrote.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = {kind: Path(folder) for kind, folder in folders.items() if Path(folder).is_dir()}

    def __contains__(self, kind: str) -> bool:
        return kind in self.folders

    def _file(self, kind: str, name: str) -> Path | None:
        path = self.folders[kind] / name if kind in self.folders else None
        return path if path is not None and path.is_file() and is_own(self.folders[kind], path) else None

    def table(self, kind: str, name: str) -> pd.DataFrame:
        """A table with text columns as ``str`` ("" where empty); no rows and no columns where there is no file."""
        path = self._file(kind, name)
        if path is None:
            return pd.DataFrame()
        try:
            return read_table(path)
        except pd.errors.EmptyDataError:
            return pd.DataFrame()

    def tensors(self, kind: str, name: str, first: int | None = None) -> dict[str, np.ndarray]:
        """Named arrays of a safetensors file, of each only its ``first`` rows; empty where there is no file."""
        path = self._file(kind, name)
        if path is None:
            return {}
        found = {}
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118
                shape = file.get_slice(key).get_shape()
                # Images of a thousand classes would not fit into memory.
                part = first is not None and bool(shape) and shape[0] > first
                found[key] = file.get_slice(key)[:first] if part else file.get_tensor(key)
        return found

    def record(self, kind: str, name: str) -> dict[str, Any]:
        """A JSON record; empty where there is no file."""
        path = self._file(kind, name)
        return {} if path is None else read_record(path)

    def files(self, pattern: str) -> list[tuple[str, Path]]:
        """(kind, path) of every artifact file that matches a glob pattern, sorted."""
        return [
            (kind, path)
            for kind in sorted(self.folders)
            for path in sorted(self.folders[kind].glob(pattern))
            if path.is_file() and is_own(self.folders[kind], path)
        ]

    def classes(self) -> list[str]:
        """Class names in the classifier's order; where there is no classifier, in the order tables give them."""
        names = self.record("classifier", "classifier.json").get("classes")
        if names:
            return [str(name) for name in names]
        for kind, table in (("features", "selected.csv"), ("features", "classes.csv"), ("diagnose", "summary.csv")):
            frame = self.table(kind, table)
            if "class" in frame and len(frame):
                return list(dict.fromkeys(frame["class"]))
        return []

    def selected(self) -> dict[str, dict[str, Any]]:
        """By class, the row of the latent chosen for its edits."""
        table = self.table("features", "selected.csv")
        return {row["class"]: row for row in records(table)} if "class" in table else {}


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows by column name."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def column(frame: pd.DataFrame, name: str) -> pd.Series:
    """A column as floats; all NaN where the table has none."""
    if name not in frame:
        return pd.Series(np.nan, index=frame.index, dtype=float)
    return pd.to_numeric(frame[name], errors="coerce").astype(float)
