# SPDX-License-Identifier: MIT
"""Activations on disk, read on demand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor


class Shards:
    """Rows ``[N, M]`` in safetensors files, indexed like a tensor.

    One file is mapped into memory at a time: only the requested rows are held, whatever N is.

    Args:
        paths: the files, in the order of their rows. scale: rows are divided by it when read.
    """

    #: The name of the rows' tensor in a file.
    NAME = "activations"

    def __init__(self, paths: Sequence[Path], scale: float = 1.0) -> None:
        self._paths, self._scale = tuple(paths), scale
        shapes = []
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                shapes.append(file.get_slice(self.NAME).get_shape())
        self._starts = [0, *accumulate(rows for rows, _ in shapes)]
        self.shape = torch.Size((self._starts[-1], shapes[0][1]))

    def __len__(self) -> int:
        return self.shape[0]

    def scaled(self, scale: float) -> "Shards":
        """The same rows divided by ``scale``."""
        return Shards(self._paths, self._scale * scale)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """Read rows ``[n, M]``, by a slice or by indices ``[n]`` in any order.

        Raises:
            IndexError: an index is negative or not below N.
        """
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        inside = (rows >= 0) & (rows < len(self))
        if not inside.all():
            raise IndexError(f"row {int(rows[~inside][0])} is not in 0 to {len(self) - 1}")
        ordered, positions = rows.sort()
        bounds = torch.searchsorted(ordered, torch.tensor(self._starts)).tolist()
        found = torch.empty(len(rows), self.shape[1], dtype=torch.float32)
        for path, first, (start, stop) in zip(self._paths, self._starts, pairwise(bounds), strict=False):
            if start < stop:
                with safe_open(path, framework="pt") as file:
                    found[positions[start:stop]] = file.get_tensor(self.NAME)[ordered[start:stop] - first]
        return found if self._scale == 1 else found.div_(self._scale)

    def split(self, rows: int) -> Iterator[Tensor]:
        """All rows in order, ``rows`` at a time."""
        for start in range(0, len(self), rows):
            yield self[start : start + rows]


#: Rows ``[N, M]`` in memory or on disk. Both have ``len``, ``shape``, ``split(n)`` and indexing by slice or indices.
AnyRows: TypeAlias = Tensor | Shards


@dataclass(frozen=True, eq=False)
class Captured:
    """Activations of a split and its labels, in the order of the data; unpacks into rows and the labels of rows.

    Attributes:
        rows: ``[N p, M]``, in memory or on disk: the ``p`` rows of an image are neighbours.
        labels: ``[N]`` of the images, in memory.
        sampled: ``p``, rows of each image: 1 at a vector site, at a map the positions that were kept.
    """

    rows: AnyRows
    labels: Tensor
    sampled: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[AnyRows]:
        return iter((self.rows, self.row_labels))

    @property
    def row_labels(self) -> Tensor:
        """Labels of the rows ``[N p]``: each row has its image's."""
        return self.labels if self.sampled == 1 else self.labels.repeat_interleave(self.sampled)

    @cached_property
    def activations(self) -> Tensor:
        """All rows ``[N p, M]`` in memory; they are kept there."""
        return self.rows[:]


def load_captured(folder: Path, split: str) -> Captured:
    """A captured split: its labels in memory, its rows on disk."""
    paths = sorted(folder.glob(f"{split}-*.safetensors"))
    parts = []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            # Cloned, since a view would keep the file mapped.
            parts.append(file.get_tensor("labels").clone())
    rows, labels = Shards(paths), torch.cat(parts)
    return Captured(rows, labels, len(rows) // len(labels))
