# SPDX-License-Identifier: MIT
"""Measures of one edit over the grid of strengths, and the tables of curves of stage ``control``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from salve.editing.methods import FittedEdit, Target
from salve.editing.verdict import Effect, effect
from salve.stages.measured import EditMeasures
from salve.types import Split


@dataclass(frozen=True)
class Measured:
    """One edit at ``K`` strengths.

    Attributes:
        alphas: ``[K]``, rising from 0.
        accuracy: by split, of every class ``[K, C]``. effects: by split, fields ``[K]``.
    """

    alphas: list[float]
    accuracy: dict[Split, Tensor]
    effects: dict[Split, Effect]


def own_classes(target: Target, classes: int) -> np.ndarray:
    """``[C]``, True for the target's classes."""
    own = np.zeros(classes, bool)
    own[list(target.classes)] = True
    return own


def measure(edits: EditMeasures, edit: FittedEdit, target: Target, classes: int) -> Measured:
    """Measure one target's edit at its strengths, on every split.

    Args:
        edits: measures it. edit: of the target.
        target: what is edited. classes: ``C``, of the data.
    """
    own = own_classes(target, classes)
    alphas, accuracy = edits.accuracies(edit, own)
    effects = {split: effect(found[0].numpy(), found.numpy(), own) for split, found in accuracy.items()}
    return Measured(alphas, accuracy, effects)


def curve_tables(measured: Measured, mode: str, target: Target) -> list[pd.DataFrame]:
    """The rows of ``curves.csv`` for one edit, a table per split: of the other classes only mean and extremes."""
    tables = []
    for split, found in measured.effects.items():
        accuracy = measured.accuracy[split].numpy()
        others = np.delete(accuracy, list(target.classes), axis=1)
        others = others[:, ~np.isnan(others).any(axis=0)]
        none = not others.shape[1]
        columns: dict[str, Any] = {
            "split": split,
            "mode": mode,
            "target": target.name,
            "alpha": measured.alphas,
            "accuracy": found.after,
            "others_accuracy": np.nan if none else others.mean(axis=1),
            "others_lowest": np.nan if none else others.min(axis=1),
            "others_highest": np.nan if none else others.max(axis=1),
            "others_mean_change": found.mean_change,
            "others_worst_loss": found.worst_loss,
        }
        tables.append(pd.DataFrame(columns))
    return tables


class CurvesByClass:
    """Write ``curves.parquet``, every class at every strength, edit by edit: ``with CurvesByClass(path) as table``.

    The table grows with the square of the number of classes, so it is never held in memory as a whole.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None

    def __enter__(self) -> "CurvesByClass":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, measured: Measured, mode: str, target: str, classes: Sequence[str]) -> None:
        """Append the rows of one edit."""
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        for split, accuracy in measured.accuracy.items():
            columns = {
                "split": split,
                "mode": mode,
                "target": target,
                "alpha": np.tile(measured.alphas, len(classes)),
                "class": np.repeat(np.array(classes, dtype=object), len(measured.alphas)),
                "accuracy": accuracy.T.flatten().numpy(),  # [K, C] → class by class
            }
            rows = pyarrow.Table.from_pandas(pd.DataFrame(columns), preserve_index=False)
            if self._writer is None:
                self._writer = pyarrow.parquet.ParquetWriter(self._path, rows.schema)
            self._writer.write_table(rows)
