# SPDX-License-Identifier: MIT
"""Where the positions of a tensor lie in the image, told by following them through a network's operations."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from salve.saliency.cells import tensors_in

#: Row and column of each element of a tensor, in cells of the last grid that was made; NaN of one without a place. They
#: lie on the CPU.
Where = tuple[Tensor, Tensor]


class Grid(NamedTuple):
    """A tensor's positions as a grid over the image.

    Attributes:
        order: ``[h w]``, the position in each cell, row by row. shape: ``h`` and ``w``.
    """

    order: Int[Tensor, " hw"]
    shape: tuple[int, int]

    def maps(self, rows: Float[Tensor, "N P K"]) -> Float[Tensor, "N K h w"]:
        """Arrange positions as maps; those without a place in the image, such as a class token, are left out."""
        return rows[:, self.order.to(rows.device)].transpose(1, 2).unflatten(2, self.shape)


def grid_of(rows: Float[Tensor, " P"], columns: Float[Tensor, " P"]) -> Grid | None:
    """The grid of positions whose rows and columns are known; None if they fill no grid, or have but one cell.

    Args:
        rows, columns: of each position, in any unit; NaN for one that has no place in the image.
    """
    placed = (~(rows.isnan() | columns.isnan())).nonzero()[:, 0]
    (height, i), (width, j) = (
        (len(values), number) for values, number in (one[placed].unique(return_inverse=True) for one in (rows, columns))
    )
    cells = i * width + j
    order = cells.argsort()
    if len(placed) < 2 or not torch.equal(cells[order], torch.arange(height * width)):
        return None
    return Grid(placed[order], (height, width))


class PositionTracker(TorchDispatchMode):
    """A context that tracks where the elements of every tensor computed from images lie.

    A convolution, a pooling or a change of size makes a new grid. Whatever rearranges elements, such as a view, a shift
    or a cut into windows, rearranges their places. A matrix product keeps the places of the rows of its first factor,
    or of the columns of its second. All else keeps those of the first argument that has the shape of the result. Where
    several channels of a position come from different places, as where patches are merged, it lies in their middle.

    Args:
        images: ``[N, 3, H, W]``, what the operations are given.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._where = WeakTensorKeyDictionary()
        self._where[images] = _new_grid(images)

    def of(self, value: Tensor) -> Where | None:
        """The row and the column of each element of a tensor, of its shape; None if they are not known."""
        return self._where.get(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(self.of(value) is not None for value in tensors_in(args)):
            made = result if isinstance(result, (list, tuple)) else [result]
            for value, where in zip(made, self._places(func, args, kwargs or {}, made), strict=True):
                if where is not None and _varies(where):
                    self._where[value] = where
                elif isinstance(value, Tensor):
                    self._where.pop(value, None)
        return result

    def _places(self, func: Any, args: Any, kwargs: Any, made: Sequence[Any]) -> Sequence[Where | None]:
        """The places of the elements of an operation's results."""
        name, source = func.overloadpacket.__name__, self.of(args[0]) if isinstance(args[0], Tensor) else None
        if name in _GRIDS:
            plain = source is not None and _is_plain(source)
            return [_new_grid(value) if plain and value.ndim == 4 else None for value in made]
        if name in _PRODUCTS:
            first, second = args[_PRODUCTS[name] : _PRODUCTS[name] + 2]
            return [self._of_product(first, second, made[0])]
        if name in _VIEWS:
            return [None if source is None else _both(source, lambda one: one.reshape(made[0].shape))]
        if name in _MOVES:
            return list(zip(*(self._moved(func, args, kwargs, axis) for axis in (0, 1)), strict=True))
        if name in _REDUCTIONS:
            dims = args[1] if len(args) > 1 else None
            if source is None or dims is None or dims == []:
                return [None] * len(made)
            shape = made[0].shape
            return [_both(source, lambda one: one.mean(dims, keepdim=True).reshape(shape))] * len(made)
        alike = [other for other in tensors_in(args) if self.of(other) is not None]
        return [
            next((self.of(other) for other in alike if isinstance(value, Tensor) and value.shape == other.shape), None)
            for value in made
        ]

    def _moved(self, func: Any, args: Any, kwargs: Any, axis: int) -> Sequence[Tensor]:
        """The rows or the columns of the results of a function that moves elements."""

        def places(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [places(one) for one in value]
            if not isinstance(value, Tensor):
                return value
            if not value.is_floating_point():
                return value.cpu()  # an index
            where = self.of(value)
            return torch.full(value.shape, torch.nan, dtype=torch.float64) if where is None else where[axis]

        if func.overloadpacket is torch.ops.aten.constant_pad_nd:
            args = (*args[:2], torch.nan)
        moved = func(*(places(value) for value in args), **kwargs)
        return moved if isinstance(moved, (list, tuple)) else [moved]

    def _of_product(self, first: Tensor, second: Tensor, made: Tensor) -> Where | None:
        for factor, axis in ((first, -1), (second, -2)):
            if (where := self.of(factor)) is not None:
                rows, columns = (one.mean(axis, keepdim=True).expand(made.shape) for one in where)
                if _varies((rows, columns)):
                    return rows, columns
        return None


def _both(where: Where, change: Callable[[Tensor], Tensor]) -> Where:
    return change(where[0]), change(where[1])


def _new_grid(value: Tensor) -> Where:
    """Every element in the cell that its last two axes say."""
    rows, columns = (torch.arange(length, dtype=torch.float64) for length in value.shape[2:])
    return rows[:, None].expand(value.shape), columns.expand(value.shape)


def _is_plain(where: Where) -> bool:
    """Whether a tensor is laid out as ``[N, C, h, w]``; its channels may lie around the middle of a cell."""
    if where[0].ndim != 4:
        return False
    rows, columns = (one.mean(1) for one in where)  # [N, h, w]
    return bool((rows == rows[:1, :, :1]).all() and (columns == columns[:1, :1]).all())


def _varies(where: Where) -> bool:
    """Whether some places are known and differ."""
    known = [one[~one.isnan()] for one in where]
    return any(bool(one.numel()) and bool(one.amin() != one.amax()) for one in known)


#: Operations on ``[N, C, h, w]`` whose results are grids of their own.
_GRIDS = {
    *("convolution", "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest2d", "_upsample_nearest_exact2d"),
    *("reflection_pad2d", "replication_pad2d"),
}
#: Matrix products, and where among their arguments the two factors begin.
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
#: Operations that give a tensor another shape, and keep the order of its elements.
_VIEWS = {"view", "_unsafe_view", "_reshape_alias", "reshape"}
#: Operations that move elements, or put tensors together.
_MOVES = {
    *("permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "repeat", "roll", "flip", "constant_pad_nd"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "chunk", "cat", "stack", "unfold"),
    *("index", "index_select", "gather", "pixel_shuffle", "pixel_unshuffle"),
}
#: Operations along axes, their second argument, that leave one number.
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "var_mean", "max", "min"}
