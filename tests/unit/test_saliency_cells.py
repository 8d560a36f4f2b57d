"""Positions of cells against receptive fields measured by gradients; enlarging against SciPy and PyTorch."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer, resnet18

from salve.saliency.cells import Cells, CellTracker, enlarge, even_cells


def located(model: nn.Module, path: str, images: Tensor) -> Cells | None:
    """The cells of the output of ``path``."""
    tracker, found = CellTracker(images), []
    hook = model.get_submodule(path).register_forward_hook(lambda _, __, output: found.append(tracker.of(output)))
    with torch.no_grad(), tracker:
        model(images)
    hook.remove()
    return found[0]


def flatten_kernels(model: nn.Module) -> nn.Module:
    """The same network with weights that favour no side, so that what a cell sees is symmetric about its centre.

    Every convolution weighs all places of its kernel alike, with positive weights, so that ReLUs let all pass. Maximum
    pooling, which would look at one position of its window, is average pooling here. Attention, which looks everywhere,
    adds nothing.
    """
    generator = torch.Generator().manual_seed(0)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            mixing = torch.rand(module.weight.shape[:2], generator=generator)[:, :, None, None] + 0.1
            weight = mixing.expand_as(module.weight)
            module.weight.data = (weight / weight.sum(dim=(1, 2, 3), keepdim=True)).to(module.weight)
        elif isinstance(module, nn.MaxPool2d):
            parent, _, leaf = name.rpartition(".")
            average = nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            setattr(model.get_submodule(parent), leaf, average)
        elif name.endswith(("attn.proj", "self_attention.out_proj")):
            module.weight.data.zero_()
    return model


def centres_of_gradient(
    model: nn.Module, path: str, size: tuple[int, int], grid: Cells, cells: Iterable[tuple[int, int]]
) -> list[list[float]]:
    """Centre of mass of ``|∂ cell / ∂ pixel|`` in pixels for each cell: what it sees, with no arithmetic on strides."""
    dtype = next(model.parameters(), torch.ones((), dtype=torch.float64)).dtype
    # Faint, because a ReLU6 must let it pass.
    images = torch.full((1, 3, *size), 1e-3, dtype=dtype, requires_grad=True)
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda _, __, output: seen.append(output))
    model(images)
    hook.remove()
    value = seen[0]
    if value.ndim == 3:  # tokens, behind CLS
        value = value[:, 1:].transpose(1, 2).unflatten(2, grid.count)
    mixture = torch.rand(value.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size)
    centres = []
    for row, column in cells:
        (gradient,) = torch.autograd.grad((value[0, :, row, column] * mixture).sum(), images, retain_graph=True)
        mass = gradient.abs().sum(dim=(0, 1)).double()
        centres.append([float(mass.sum(1) @ rows / mass.sum()), float(mass.sum(0) @ columns / mass.sum())])
    return centres


def centres(grid: Cells, cells: Iterable[tuple[int, int]]) -> list[list[float]]:
    return [[float(grid.start[axis]) + grid.stride[axis] * cell[axis] for axis in (0, 1)] for cell in cells]


def middle(grid: Cells) -> tuple[int, int]:
    return grid.count[0] // 2, grid.count[1] // 2


def torchvision_vit() -> nn.Module:
    return VisionTransformer(image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=16)


def timm_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=2, **settings)


vit = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2}
narrow = {"channels": (4, 8, 12, 16)}
# The backbone, the path, the size, the centre of the first cell as worked out by hand, and the stride.
BACKBONES = {
    # Five times "a stride of 2, padded by 1 on both sides": each starts on the first pixel.
    "resnet18": (resnet18, "layer4", (320, 320), (0, 0), 32),
    "resnet18-oblong": (resnet18, "layer4", (290, 330), (0, 0), 32),
    # At first only timm's shortcuts do anything. They average 2 × 2 cells of 4, 8 and 8 pixels: half a cell each.
    "resnet10t": (timm_model("resnet10t", output_stride=8, **narrow), "layer4", (208, 208), (10, 10), 8),
    # Patches of 4, then of 2, three times: no padding.
    "convnext": (timm_model("convnext_atto"), "stages.3", (160, 160), (15.5, 15.5), 32),
    "vit": (timm_model("vit_tiny_patch16_224", **vit), "blocks.1.norm1", (64, 64), (7.5, 7.5), 16),
    "torchvision-vit": (torchvision_vit, "encoder.layers.encoder_layer_1.ln_1", (64, 64), (7.5, 7.5), 16),
    # Even sizes are padded behind only (kernel 3), or by 1 before and 2 behind (kernel 5): 1 + 2 + 4 + 8 + 16 pixels.
    "tf_efficientnet": (timm_model("tf_efficientnet_lite0"), "blocks.6", (576, 576), (31, 31), 32),
    # 577 = 18 · 32 + 1 keeps its last pixel through all halvings and is padded on both sides, the other axis is even.
    "tf_efficientnet-odd": (timm_model("tf_efficientnet_lite0"), "blocks.6", (577, 576), (0, 31), 32),
}


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.slow
def test_cells_lie_where_gradients_say(name: str) -> None:
    """As worked out by hand, as tracked, and as measured."""
    make, path, size, start, stride = BACKBONES[name]
    torch.manual_seed(0)
    model = make().eval()
    grid = located(model, path, torch.rand(1, 3, *size))
    assert grid is not None
    assert centres(grid, [(0, 0), (1, 2)]) == [list(start), [start[0] + stride, start[1] + 2 * stride]]
    row, column = middle(grid)
    cells = [(row, column), (row - 1, column), (row, column - 1)]
    found = centres_of_gradient(flatten_kernels(model), path, size, grid, cells)
    # A hundredth of a cell, because the faint outskirts of some fields are cut off by the border of the image.
    np.testing.assert_allclose(found, centres(grid, cells), atol=0.01 * stride)


@pytest.mark.parametrize("size", [(31, 40), (32, 33)])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 2, 4, padding="same"),
        nn.Conv2d(3, 2, 3, stride=3, padding=2, dilation=2),
        nn.Conv2d(3, 2, (5, 2), stride=(1, 2), padding=(2, 0)),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"),
        nn.Sequential(nn.ReplicationPad2d((3, 0, 1, 2)), nn.Conv2d(3, 2, 3, stride=2)),
        nn.Sequential(nn.ZeroPad2d((-2, 1, 0, -3)), nn.AvgPool2d(2)),
        nn.AvgPool2d((4, 3), 2, padding=1, ceil_mode=True, count_include_pad=False),
        nn.Sequential(nn.AvgPool2d(3), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)),
    ],
    ids=lambda layer: str(layer).replace("\n", "").replace(" ", ""),
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_windows_and_paddings(layer: nn.Module, size: tuple[int, int]) -> None:
    """Each against its own linear algebra: a cell in the middle is centred on the pixels that change it."""
    model = flatten_kernels(nn.Sequential(layer)).double()
    grid = located(model, "0", torch.rand(1, 3, *size, dtype=torch.float64))
    assert grid is not None
    found = centres_of_gradient(model, "0", size, grid, [middle(grid)])
    np.testing.assert_allclose(found, centres(grid, [middle(grid)]), atol=1e-9)


class TwoBranches(nn.Module):
    """``a`` times each second pixel, plus ``b`` times the mean of 2 × 2 pixels, in two channels."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.strided, self.pool = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False), nn.AvgPool2d(2)
        self.mixed = nn.Conv2d(3, 2, 1, bias=False)
        nn.init.zeros_(self.strided.weight)
        self.strided.weight.data[:, :, 1, 1] = a / 3
        nn.init.constant_(self.mixed.weight, b / 3)

    def forward(self, images: Tensor) -> Tensor:
        main = self.strided(images)
        main += self.mixed(self.pool(images))
        return nn.functional.relu(main, inplace=True)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (3, 1), (0.2, 2), (1, 0)])
def test_a_sum_lies_between_its_branches(a: float, b: float) -> None:
    """On linear slopes, which strides and means keep, only the weights decide how much a tensor varies."""
    model, size = nn.Sequential(TwoBranches(a, b)).double(), (16, 24)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in size)
    flat = torch.ones(size, dtype=torch.float64)
    slopes = torch.stack([1 + rows[:, None] * flat, 1 + columns * flat, flat])[:, None].expand(-1, 3, -1, -1)
    grid = located(model, "0", slopes)
    assert grid is not None
    ((row, column),) = centres_of_gradient(model, "0", size, grid, [(0, 0)])
    np.testing.assert_allclose(row, 0.5 * b / (a + b), atol=1e-12)  # the oracle's own check
    for start, measured in zip(grid.start, (row, column), strict=True):
        np.testing.assert_allclose(start[:2], [measured, measured], atol=1e-6)
        assert start[2] == 0.25  # nothing varies in the third image


def test_what_cannot_be_followed() -> None:
    images = torch.rand(1, 3, 16, 16)
    lost = {
        "transposed": nn.ConvTranspose2d(3, 4, 2, stride=2),
        "rearranged": nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3)),
        "channels last": nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (8, 32)), nn.MaxPool2d(2)),
    }
    for name, module in lost.items():
        assert located(nn.Sequential(module), "0", images) is None, name
    # Joined with what is at another scale.
    tracker = CellTracker(images)
    with tracker:
        wide = F.avg_pool2d(images, 2)
        both = images + wide.mean()
        assert tracker.of(wide) is not None
        assert tracker.of(both) is None


def in_scipy(maps: Tensor, start: tuple[float, float], stride: tuple[float, float], size: tuple[int, int]) -> Tensor:
    rows, columns = np.meshgrid(*(np.arange(n) for n in size), indexing="ij")
    places = [(rows - start[0]) / stride[0], (columns - start[1]) / stride[1]]
    drawn = [[map_coordinates(one.numpy(), places, order=1, mode="nearest") for one in image] for image in maps]
    return torch.from_numpy(np.array(drawn))


@pytest.mark.parametrize(
    ("start", "stride"),
    [((0, 0), (32, 32)), ((31, 0), (32, 32)), ((-2.5, 7.25), (8, 16.5)), ((15.5, 15.5), (32, 32))],
)
@pytest.mark.parametrize("count", [(3, 4), (1, 2)])
def test_enlarging_is_scipys_interpolation(
    start: tuple[float, float], stride: tuple[float, float], count: tuple[int, int]
) -> None:
    maps = torch.rand(2, 3, *count, dtype=torch.float64)
    size = (70, 90)
    cells = Cells(count, (torch.tensor([start[0]]).double(), torch.tensor([start[1]]).double()), stride)
    torch.testing.assert_close(enlarge(maps, cells, size), in_scipy(maps, start, stride, size), rtol=1e-12, atol=1e-12)
    # Each image from a start of its own.
    shifted = (cells.start[0] + torch.tensor([0, 3]), cells.start[1])
    found = enlarge(maps, Cells(count, shifted, stride), size)
    for n in (0, 1):
        expected = in_scipy(maps[n : n + 1], (start[0] + 3 * n, start[1]), stride, size)
        torch.testing.assert_close(found[n : n + 1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("count", "size"), [((5, 5), (160, 160)), ((3, 4), (50, 61)), ((8, 8), (64, 64))])
def test_enlarging_even_cells_is_plain(count: tuple[int, int], size: tuple[int, int]) -> None:
    maps = torch.rand(2, 3, *count)
    plain = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarge(maps, even_cells(count, size), size), plain, rtol=0, atol=1e-5)
