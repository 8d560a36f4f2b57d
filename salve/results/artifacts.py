# SPDX-License-Identifier: MIT
"""Read a run's artifacts while some are still missing, as the report does."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from salve.artifacts import is_own, read_record, read_table

if TYPE_CHECKING:  # they take seconds
    import numpy as np
    import pandas as pd


class Artifacts:
    """A run's artifacts for the report, which may be written before all stages have run.

    What is not there is empty, never an error; nor is what a link leads to outside of its artifact.

    Args:
        folders: kind (``"classifier"``, ``"sae"``, …) to the folder that the stage wrote.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.folders = {kind: Path(folder) for kind, folder in folders.items() if Path(folder).is_dir()}

    def __contains__(self, kind: str) -> bool:
        return kind in self.folders

    def _file(self, kind: str, name: str) -> Path | None:
        path = self.folders[kind] / name if kind in self.folders else None
        return path if path is not None and path.is_file() and is_own(self.folders[kind], path) else None

    def table(self, kind: str, name: str) -> "pd.DataFrame":
        """A table with text columns as ``str`` ("" where empty); no rows and no columns where there is no file."""
        import pandas as pd

        path = self._file(kind, name)
        if path is None:
            return pd.DataFrame()
        try:
            return table_in(path)
        except pd.errors.EmptyDataError:
            return pd.DataFrame()

    def tensors(self, kind: str, name: str, first: int | None = None) -> "dict[str, np.ndarray]":
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


def table_in(path: Path) -> "pd.DataFrame":
    """A table in a CSV or Parquet file."""
    if path.suffix == ".parquet":
        import pandas as pd

        return pd.read_parquet(path)
    return read_table(path)
