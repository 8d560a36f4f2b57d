"""Grad-FAM for 1, 16 and 256 latents of a batch of images, against grad-cam and captum at the same layer.

    python benchmarks/grad_fam.py [--quick] [--device cuda] [--images 16] [--rounds 3]

ResNet-18 at 160 pixels (the map before its pooling) and ViT-S/14 at 98 (the last block's input, behind its LayerNorm),
with random weights and a linear SAE of 1024 latents. To the peers a latent is a class: the SAE's encoder becomes the
network's head, and the ViT's tokens pass through a grid. First the maps are compared. ``salve``'s and captum's differ
by a share of the largest value; grad-cam's are scaled to 0..1, as it returns them (it resizes with OpenCV). The
ResNet's are compared cell by cell, before they are enlarged, because the peers draw its cells half a cell aside.

Peers run the network forward and backward for every latent. Beyond 4 latents they are timed for 4 and scaled up; the
table marks it. captum is installed into an environment of its own, in which everything runs.

The limit: the flops of ``salve``'s way (one forward pass; then for the ResNet one product of ``2 N L M hw``, for the
ViT ``min(L, M)`` backward passes through the last block) at the matmul peak, and the bytes of the maps, ``4 N L H W``,
written once. Time grows as ``N``, and as ``const + L`` (for the ViT until ``L = M``; beyond it only a product and the
maps grow); in ``M``, beside the network, as ``const + M``.
"""

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from environments import environment
from measure import copy_bandwidth, growth, interleaved, machine, matmul_peak, table
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
DICTIONARY, COUNTS, TIMED = 1024, (1, 16, 256), 4


class AsGrid(nn.Module):
    """A layer of a ViT whose patch tokens then pass through ``grid`` as a map ``[N, K, side, side]``."""

    def __init__(self, layer: nn.Module, prefix: int) -> None:
        super().__init__()
        self.layer, self.prefix, self.grid = layer, prefix, nn.Identity()

    def forward(self, value: Tensor) -> Tensor:
        tokens = self.layer(value)  # [N, T, K]
        patches = tokens[:, self.prefix :].transpose(1, 2)
        side = round(patches.shape[2] ** 0.5)
        grid = self.grid(patches.unflatten(2, (side, side)))
        return torch.cat([tokens[:, : self.prefix], grid.flatten(2).transpose(1, 2)], dim=1)


class Bench:
    """A backbone with its SAE, and the same network as a classifier of latents for the peers."""

    def __init__(self, name: str, model: nn.Module, size: int, device: str) -> None:
        from salve.backbones import find_site
        from salve.sae import make_sae

        torch.manual_seed(0)
        self.name, self.size, self.device = name, size, device
        self.model = model.to(device).eval()
        site = find_site(model, "last")
        self.width = site.width
        self.sae = make_sae("linear_l1", site.width, DICTIONARY).eval().to(device)
        as_classes = copy.deepcopy(self.model)
        parent, _, leaf = site.readers[0].path.rpartition(".")
        head = nn.Linear(site.width, DICTIONARY).to(device)
        with torch.no_grad():
            head.weight.copy_(self.sae.encoder)
            head.bias.zero_()
        setattr(as_classes.get_submodule(parent), leaf, head)
        if site.map_side == "output":  # a ViT's tokens
            parent, _, leaf = site.map.rpartition(".")
            grid = AsGrid(as_classes.get_submodule(site.map), site.prefix_tokens)
            setattr(as_classes.get_submodule(parent), leaf, grid)
            self.layer: nn.Module = grid.grid
        else:
            self.layer = as_classes.get_submodule("layer4")
        self.cell = 1 if site.map_side == "output" else 32  # pixels from the centre of a cell to the next
        self.as_classes = as_classes

    def images(self, count: int) -> Tensor:
        drawn = torch.randn(count, 3, self.size, self.size, generator=torch.Generator().manual_seed(0))
        return drawn.to(self.device)

    def ours(self, images: Tensor, latents: int) -> Tensor:
        from salve.saliency import grad_fam

        return grad_fam(self.model, "last", self.sae, images, range(latents))

    def grad_cam(self, images: Tensor, latents: int, enlarged: bool = True) -> Tensor:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with GradCAM(self.as_classes, [self.layer]) as cam:
            if not enlarged:
                cam.get_target_width_height = lambda _: None
            maps = [cam(images, [ClassifierOutputTarget(latent)] * len(images)) for latent in range(latents)]
        return torch.stack([torch.from_numpy(one) for one in maps], dim=1)

    def captum(self, images: Tensor, latents: int, enlarged: bool = True) -> Tensor:
        from captum.attr import LayerAttribution, LayerGradCam

        cam = LayerGradCam(self.as_classes, self.layer)
        maps = [cam.attribute(images, target=latent, relu_attributions=True) for latent in range(latents)]
        if enlarged:
            maps = [LayerAttribution.interpolate(one, (self.size, self.size), "bilinear") for one in maps]
        return torch.cat(maps, dim=1).detach()


def check(bench: Bench, images: Tensor, latents: int) -> str:
    """A sentence on how far the peers' maps are from ``salve``'s."""
    enlarged = bench.cell == 1
    ours = bench.ours(images, latents)[:, :, :: bench.cell, :: bench.cell]
    captum = float((ours - bench.captum(images, latents, enlarged)).abs().max() / ours.max())
    low, high = ours.amin(dim=(2, 3), keepdim=True), ours.amax(dim=(2, 3), keepdim=True)
    scaled = ((ours - low) / (high - low).clamp_min(torch.finfo(ours.dtype).tiny)).cpu()
    grad_cam = float((scaled - bench.grad_cam(images, latents, enlarged)).abs().max())
    return (
        f"largest difference, {latents} latents: captum {captum:.1e} of the largest value, grad-cam {grad_cam:.1e} of 1"
    )


def compare(console: Console, bench: Bench, count: int, rounds: int, counts: Sequence[int]) -> None:
    """Time every number of latents in every way, and print it."""
    images = bench.images(count)
    console.print(check(bench, images[:2], 4))
    peak, bandwidth = matmul_peak(bench.device), copy_bandwidth(bench.device)
    title = f"{bench.name}: {count} images, M={bench.width}, d={DICTIONARY}\n{machine(bench.device)}"
    columns = ("latents", "", "s", "maps/s", "over salve", "of the limit")
    shown = table(title, columns, f"matmul peak {peak / 1e9:,.0f} GFLOP/s, copying {bandwidth / 1e9:,.1f} GB/s")
    for latents in counts:
        timed = min(latents, TIMED)
        ways: dict[str, Callable[[], object]] = {
            "salve": partial(bench.ours, images, latents),
            "grad-cam": partial(bench.grad_cam, images, timed),
            "captum": partial(bench.captum, images, timed),
        }
        with FlopCounterMode(display=False) as counter:
            bench.ours(images, latents)
        limit = counter.get_total_flops() / peak + 4 * count * latents * bench.size**2 / bandwidth
        for way, took in (seconds := interleaved(ways, rounds)).items():
            whole = took if way == "salve" else took * latents / timed
            cells = [way + (f" (from {timed})" if way != "salve" and latents > timed else ""), f"{whole:.3f}"]
            cells += [f"{count * latents / whole:,.0f}", f"{whole / seconds['salve']:,.1f} ×"]
            shown.add_row(str(latents), *cells, f"{limit / whole:.0%}" if way == "salve" else "")
        shown.add_section()
    console.print(shown)


def grow(console: Console, bench: Bench, count: int, rounds: int, by_latents: Sequence[int]) -> None:
    """Print the exponents in the number of images and of latents."""
    by_images = [max(1, count // 4), max(2, count // 2), max(4, count)]
    few = bench.images(max(1, count // 4))
    exponents = (
        growth(by_images, lambda size: partial(bench.ours, bench.images(size), 16), rounds),
        growth(by_latents, lambda size: partial(bench.ours, few, size), rounds),
    )
    console.print(f"{bench.name}: seconds ∝ N^{exponents[0]:.2f}, N = {by_images}, 16 latents;")
    console.print(f"seconds ∝ L^{exponents[1]:.2f}, L = {list(by_latents)}, {len(few)} images\n")


def grow_width(console: Console, count: int, device: str, rounds: int) -> None:
    """Print the exponent in ``M``, from a small ResNet whose last stage gets wider, with 1024 latents."""
    widths = [128, 256, 512]

    def make(width: int) -> Callable[[], object]:
        model = timm.create_model("resnet10t", channels=[32, 64, 128, width], output_stride=8, num_classes=10)
        bench = Bench("", model, 64, device)
        return partial(bench.ours, bench.images(count), DICTIONARY)

    exponent = growth(widths, make, rounds)
    console.print(f"ResNet-10, 64 px: seconds ∝ M^{exponent:.2f}, M = {widths}, {DICTIONARY} latents, {count} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 images, at most 16 latents, one round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.child:
        python = environment("captum", ["tqdm"], alone=["captum==0.8.0"])
        settings = os.environ | {"PYTHONPATH": str(ROOT)}
        sys.exit(subprocess.run([python, __file__, *sys.argv[1:], "--child"], env=settings).returncode)
    from salve.backbones import load_backbone

    count, rounds = (2, 1) if given.quick else (given.images, given.rounds)
    console = Console()
    resnet = load_backbone("torchvision", "resnet18", "random", 10).model
    vit = load_backbone("timm", "vit_small_patch14_dinov2.lvd142m", "random", 10, {"img_size": 98}).model
    for name, model, size in (("ResNet-18, 160 px", resnet, 160), ("ViT-S/14, 98 px", vit, 98)):
        bench = Bench(name, model, size, given.device)
        compare(console, bench, count, rounds, COUNTS[:2] if given.quick else COUNTS)
        grow(console, bench, count, rounds, (4, 8, 16) if given.quick else (256, 512, 1024))
    grow_width(console, count, given.device, rounds)


if __name__ == "__main__":
    main()
