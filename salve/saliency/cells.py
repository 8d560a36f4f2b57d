"""Where in the image the cells of a map lie, followed through the operations that make it, and enlarging from there."""

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

    In pixels; whole numbers are the centres of pixels.

    Attributes:
        count: rows and columns of cells.
        start: centre of the first cell along each axis, ``[N]``, or ``[1]`` if it is the same for all images.
        stride: from one centre to the next, along each axis.
    """

    count: tuple[int, int]
    start: tuple[Tensor, Tensor]
    stride: tuple[float, float]


def even_cells(count: tuple[int, int], size: tuple[int, int]) -> Cells:
    """Cells that divide an image of ``size`` pixels evenly, as plain bilinear enlargement takes them to."""
    stride = (size[0] / count[0], size[1] / count[1])
    return Cells(count, (_float((stride[0] - 1) / 2), _float((stride[1] - 1) / 2)), stride)


class CellTracker(TorchDispatchMode):
    """Within the context, follows where the cells of every tensor computed from ``images`` ``[N, 3, H, W]`` lie.

    A window of ``k`` cells, ``δ`` apart, behind ``p`` cells of padding (a convolution, a pooling) makes, on each axis,

        start' = start + ((k − 1) δ / 2 − p) · stride,   stride' = stride · its stride,

    where only the padding *before* the first cell counts; padding by itself moves the start by ``−p · stride``. These
    are the operations as they run and not the modules, so padding worked out on the way ("same") comes out right. Any
    other operation leaves the cells where they are.

    What is computed from several tensors with different starts lies at their mean, weighted for each image by how much
    each tensor varies over its positions, ``sqrt(mean_chw (x − mean_hw x)²)``. Such are residual blocks with a strided
    convolution (``start' = start``) beside an average pooling (half a cell on): early in a training the shortcut
    carries nearly everything, later it need not.

    This is the middle of what a cell can see. Trained kernels may favour a side, by which it looks a little beside it.

    Lost are the cells behind a transposed convolution, behind a window on a tensor that was rearranged on the way,
    and where branches of different strides meet.

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
        """The cells of a tensor in any layout; None where they were lost."""
        return self._cells.get(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        sources = [(value, cells) for value in _tensors(args) if (cells := self._cells.get(value)) is not None]
        # Before the call, which may work in place.
        joined = _joined(sources, self._images) if sources else None
        result = func(*args, **(kwargs or {}))
        if sources:
            rule = _RULES.get(func)
            for value in _tensors((result,)):
                cells = joined if rule is None or joined is None else rule(joined, value, *args)
                if cells is not None:
                    self._cells[value] = cells
                else:
                    self._cells.pop(value, None)
        return result


def enlarge(maps: Float[Tensor, "N L h w"], cells: Cells, size: tuple[int, int]) -> Float[Tensor, "N L H W"]:
    """Bilinear interpolation of values given at the centres of cells; beyond the outermost centres the nearest value.

    For ``even_cells`` it is ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``.
    """
    rows, columns = (
        _shares(*axis).to(maps)[:, None] for axis in zip(cells.count, cells.start, cells.stride, size, strict=True)
    )  # [N or 1, 1, H, h], [N or 1, 1, W, w]
    return rows @ maps @ columns.mT


def _shares(count: int, start: Tensor, stride: float, length: int) -> Tensor:
    """Share of every cell in every pixel of one axis, ``[N or 1, length, count]``; each pixel's sum to one."""
    place = ((torch.arange(length) - start[:, None]) / stride).clamp(0, count - 1)  # in cells
    return (1 - (place[:, :, None] - torch.arange(count)).abs()).clamp_min(0)


def _float(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _joined(sources: list[tuple[Tensor, Cells]], images: int) -> Cells | None:
    """Where that lies which is computed from all of these tensors."""
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
    """Root mean square of what is not constant over the positions of ``[N, C, h, w]``, > 0: ``[N]``."""
    variance = maps.detach().float().var(dim=(2, 3), correction=0).mean(dim=1)
    return variance.sqrt().double().cpu().clamp_min(torch.finfo(torch.float32).tiny)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


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
    steps = stride or kernel  # a pooling's stride is its kernel where none is given
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
    return _window(cells, made, source, *windows[:4])  # without its rounding, which shows in the count


def _average_pool(cells: Cells, made: Tensor, source: Tensor, *windows: Any) -> Cells | None:
    return _window(cells, made, source, *windows[:3])


def _pad(cells: Cells, made: Tensor, source: Tensor, padding: Sequence[int], *_: object) -> Cells | None:
    # From the last axis: before, after. A window of one cell, but for what stands before the first.
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
