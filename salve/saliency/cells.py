# SPDX-License-Identifier: MIT
"""Positions of a map's cells in the image: track them through a forward pass, and enlarge maps with them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class Cells:
    """A grid of cells: ``(i, j)`` is centred at row ``start[0] + i stride[0]``, column ``start[1] + j stride[1]``.

    Positions are in pixels; whole numbers are centres of pixels.

    Attributes:
        count: rows and columns of cells.
        start: centre of the first cell along each axis, ``[N]``, or ``[1]`` if it is the same for all images.
        stride: distance of neighbouring centres, along each axis.
    """

    count: tuple[int, int]
    start: tuple[Tensor, Tensor]
    stride: tuple[float, float]


def even_cells(count: tuple[int, int], size: tuple[int, int]) -> Cells:
    """Cells that divide an image of ``size`` pixels evenly, as plain bilinear enlargement assumes."""
    stride = (size[0] / count[0], size[1] / count[1])
    return Cells(count, (_float((stride[0] - 1) / 2), _float((stride[1] - 1) / 2)), stride)


class CellTracker(TorchDispatchMode):
    """A context that tracks the cells of every tensor computed from images.

    On each axis, a window of ``k`` cells (a convolution or pooling) with dilation ``δ``, padding ``p`` and stride ``t``
    gives

        start' = start + ((k − 1) δ / 2 − p) · stride,   stride' = stride · t,

    where only the padding *before* the first cell counts. Padding alone moves the start by ``−p · stride``. Operations
    are tracked as they run, not modules, so that padding computed in the forward pass ("same") is right. All other
    operations leave the cells where they are.

    If a tensor is computed from several tensors with different starts, its start is their mean. For each image, the
    weight of a tensor is how much it varies over positions, ``sqrt(mean_chw (x − mean_hw x)²)``. This happens in
    residual blocks with a strided convolution (``start' = start``) beside an average pooling (half a cell further):
    early in training almost everything passes through the shortcut, later perhaps not.

    The centre of a cell is the middle of its receptive field. A trained kernel may favour one side of it.

    Cells are lost behind a transposed convolution, behind a window on a tensor whose axes were rearranged, and where
    branches of different strides meet.

    Args:
        images: ``[N, 3, H, W]``, the tensor that is passed to the model.

    Source: Araujo et al. 2019 (Computing receptive fields of convolutional neural networks) for the recurrence; the
    weights are ours.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._images = len(images)
        self._cells = WeakTensorKeyDictionary()
        start = _float(0.0)
        self._cells[images] = Cells((images.shape[2], images.shape[3]), (start, start), (1.0, 1.0))

    def of(self, value: Tensor) -> Cells | None:
        """The cells of a tensor in any layout; None if they were lost."""
        return self._cells.get(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        sources = [(value, cells) for value in tensors_in(args) if (cells := self._cells.get(value)) is not None]
        # Before the call, which may change tensors in place.
        joined = _joined(sources, self._images) if sources else None
        result = func(*args, **(kwargs or {}))
        if sources:
            rule = _RULES.get(func)
            for value in tensors_in((result,)):
                cells = joined if rule is None or joined is None else rule(joined, value, *args)
                if cells is not None:
                    self._cells[value] = cells
                else:
                    self._cells.pop(value, None)
        return result


def enlarge(maps: Float[Tensor, "N L h w"], cells: Cells, size: tuple[int, int]) -> Float[Tensor, "N L H W"]:
    """Enlarge maps by bilinear interpolation between the centres of their cells; outside of them the nearest value.

    For :func:`even_cells` it equals ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``.

    Args:
        maps: ``[N, L, h, w]``. cells: of the maps. size: ``H`` and ``W``.
    """
    rows, columns = (
        _interpolation_weights(*axis).to(maps)[:, None]
        for axis in zip(cells.count, cells.start, cells.stride, size, strict=True)
    )  # [N or 1, 1, H, h], [N or 1, 1, W, w]
    return rows @ maps @ columns.mT


def _interpolation_weights(count: int, start: Tensor, stride: float, length: int) -> Tensor:
    """The weight of each cell in each pixel of one axis, ``[N or 1, length, count]``; they sum to one for a pixel."""
    position = ((torch.arange(length) - start[:, None]) / stride).clamp(0, count - 1)  # in cells
    return (1 - (position[:, :, None] - torch.arange(count)).abs()).clamp_min(0)


def _float(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _joined(sources: list[tuple[Tensor, Cells]], images: int) -> Cells | None:
    """The cells of a tensor that is computed from all of these tensors; None if they cannot be known."""
    first = sources[0][1]
    others = [cells for _, cells in sources[1:]]
    if any(cells.count != first.count or cells.stride != first.stride for cells in others):
        return None
    if all(
        torch.equal(ours, theirs) for cells in others for ours, theirs in zip(first.start, cells.start, strict=True)
    ):
        return first
    are_maps = all(value.ndim == 4 and value.shape == (images, value.shape[1], *first.count) for value, _ in sources)
    spread = [_spread(value) if are_maps else torch.ones(1) for value, _ in sources]  # [N] or [1] each
    total = torch.stack(spread).sum(dim=0)
    rows, columns = (
        torch.stack([cells.start[axis] * part / total for (_, cells), part in zip(sources, spread, strict=True)]).sum(0)
        for axis in (0, 1)
    )
    return replace(first, start=(rows, columns))


def _spread(maps: Tensor) -> Tensor:
    """How much maps ``[N, C, h, w]`` vary over positions: root mean square deviation ``[N]``, > 0."""
    variance = maps.detach().float().var(dim=(2, 3), correction=0).mean(dim=1)
    return variance.sqrt().double().cpu().clamp_min(torch.finfo(torch.float32).tiny)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among some values, and in the lists and tuples among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def _window(
    cells: Cells,
    made: Tensor,
    source: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
) -> Cells | None:
    if source.ndim != 4 or source.shape[2:] != cells.count:
        return None
    steps = stride or kernel  # the default stride of a pooling is its kernel
    starts, strides = [], []
    for axis in (0, 1):
        k, step, p, apart = (given[axis % len(given)] for given in (kernel, steps, padding, dilation))
        starts.append(cells.start[axis] + ((k - 1) * apart / 2 - p) * cells.stride[axis])
        strides.append(cells.stride[axis] * step)
    return Cells((made.shape[2], made.shape[3]), (starts[0], starts[1]), (strides[0], strides[1]))


def _convolution(
    cells: Cells,
    made: Tensor,
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    *_: object,
) -> Cells | None:
    return None if transposed else _window(cells, made, source, weight.shape[2:], stride, padding, dilation)


def _max_pool(cells: Cells, made: Tensor, source: Tensor, *windows: Any) -> Cells | None:
    return _window(cells, made, source, *windows[:4])  # ceil_mode is left out: it only changes the count


def _average_pool(cells: Cells, made: Tensor, source: Tensor, *windows: Any) -> Cells | None:
    return _window(cells, made, source, *windows[:3])


def _pad(cells: Cells, made: Tensor, source: Tensor, padding: Sequence[int], *_: object) -> Cells | None:
    # The padding lists the last axis first, before and after. Only the part before matters; the window is one cell.
    before = (padding[2] if len(padding) > 2 else 0, padding[0])
    return _window(cells, made, source, (1, 1), (1, 1), before)


_RULES: dict[Any, Callable[..., Cells | None]] = {
    torch.ops.aten.convolution.default: _convolution,
    torch.ops.aten.max_pool2d_with_indices.default: _max_pool,
    torch.ops.aten.avg_pool2d.default: _average_pool,
    torch.ops.aten.constant_pad_nd.default: _pad,
    torch.ops.aten.reflection_pad2d.default: _pad,
    torch.ops.aten.replication_pad2d.default: _pad,
}
