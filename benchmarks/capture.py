"""How fast activations are captured: ``salve.activations.capture`` against a bare forward loop.

    python benchmarks/capture.py [--quick] [--device cuda] [--images 512] [--rounds 5]

ResNet-18 at 160 pixels and ViT-S/14 at 98, with random weights, in batches of 64. Images are those of Imagenette where
``SALVE_IMAGENETTE`` names its folder, else drawn scenes. Both sides read the same loader, or the same batches decoded
beforehand, where decoding hides nothing. The bare loop calls the model and keeps what a hook sees. It runs with the
model as it comes, and with channels last as capture does. Capture also checks for NaN, and writes its shard to disk.

The limit: the flops of a forward pass at the machine's matmul peak, and the loader alone. Time grows as ``N``.
"""

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from measure import growth, interleaved, machine, matmul_peak, now, table
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from salve.activations.capture import capture
from salve.backbones import Site, find_site, load_backbone, preset, site_activations
from salve.data import ConceptsData, ImageData, ImagenetteData
from salve.types import Split

BATCH = 64
SPLIT: Split = "train"
BACKBONES: dict[str, tuple[str, str, dict[str, object], dict[str, object]]] = {
    "ResNet-18, 160 px": ("torchvision", "resnet18", {}, {"size": 160, "squash": True}),
    "ViT-S/14, 98 px": ("timm", "vit_small_patch14_dinov2.lvd142m", {"img_size": 98}, {"squash": True}),
}
Batches = Callable[[Sequence[int]], Iterable[tuple[Tensor, Tensor]]]


def images() -> ImageData:
    """Imagenette if there is a folder of it, else drawn scenes."""
    root = os.environ.get("SALVE_IMAGENETTE")
    return ImagenetteData(root, BATCH, num_workers=2) if root else ConceptsData(BATCH)


def captured(model: nn.Module, site: Site, count: int, batches: Batches, device: torch.device) -> None:
    """Capture into a new folder, as the stage does."""
    with tempfile.TemporaryDirectory() as folder:
        capture(
            lambda images: site_activations(model, site, images)[:, None],
            site.name,
            count,
            batches,
            Path(folder),
            SPLIT,
            device,
        )


@torch.inference_mode()
def bare(
    model: nn.Module, site: Site, count: int, batches: Batches, device: torch.device, layout: torch.memory_format
) -> Tensor:
    """Collect activations ``[N, M]`` with a hook, a loop and a list."""
    seen: list[Tensor] = []
    reader = model.get_submodule(site.readers[0].path)
    hook = reader.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].cpu()))
    for pixels, _ in batches(range(count)):
        model(pixels.to(device, memory_format=layout))
    hook.remove()
    return torch.cat(seen)


def drain(batches: Batches, count: int) -> None:
    """Read all batches, and do nothing with them."""
    for _ in batches(range(count)):
        pass


def compare(console: Console, name: str, data: ImageData, count: int, rounds: int, device: torch.device) -> None:
    """Measure one backbone: both sources of batches, every way, and how capture grows with ``N``."""
    library, model_name, arguments, preprocess = BACKBONES[name]
    model = load_backbone(library, model_name, "random", len(data.classes), arguments).model
    data.bind(preset(library, model_name, "random", model, data.native_size, preprocess).preprocess)
    plain = model.to(device).eval()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    ours, site = copy.deepcopy(last), find_site(plain, "last")

    def loaded(rows: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
        return data.loader(SPLIT, indices=rows)

    start = now()
    ready = list(loaded(range(count)))
    decoding = count / (now() - start)

    def decoded(rows: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
        return ready[: -(-len(rows) // BATCH)]

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain(ready[0][0].to(device))
    flops = counter.get_total_flops() / len(ready[0][0])
    limit = matmul_peak(device.type) / flops
    for source, batches in (("loader", loaded), ("decoded beforehand", decoded)):
        ways: dict[str, Callable[[], object]] = {
            "salve, with its shard on disk": partial(captured, ours, site, count, batches, device),
            "bare loop": partial(bare, plain, site, count, batches, device, torch.preserve_format),
            "bare loop, channels last": partial(bare, last, site, count, batches, device, torch.channels_last),
        }
        if source == "loader":
            ways["loader alone"] = partial(drain, batches, count)
        seconds = interleaved(ways, rounds)
        caption = (
            f"limit: {flops / 1e9:.2f} GFLOP an image at the matmul peak of {limit * flops / 1e9:,.0f} GFLOP/s is "
            f"{limit:,.0f} images/s; decoding alone {decoding:,.0f} images/s at the first go"
        )
        title = f"{name}, {data.name}, {source}: {count} images, batch {BATCH}\n{machine(device.type)}"
        shown = table(title, ("", "images/s", "salve over it", "of the limit"), caption)
        for way, took in seconds.items():
            ratio = f"{took / seconds['salve, with its shard on disk']:.2f} ×"
            share = "" if way == "loader alone" else f"{count / took / limit:.0%}"
            shown.add_row(way, f"{count / took:,.0f}", ratio, share)
        console.print(shown)
    sizes = [count // 4 // BATCH * BATCH, count // 2 // BATCH * BATCH, count // BATCH * BATCH]
    exponent = growth(sizes, lambda size: partial(captured, ours, site, size, decoded, device), rounds)
    console.print(f"seconds ∝ N^{exponent:.2f} (law: 1), N = {sizes}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 images, one round")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    count, rounds = (256, 1) if given.quick else (given.images, given.rounds)
    data = images()
    most = min(len(data.labels(SPLIT)), 2048)  # one shard
    if not 4 * BATCH <= count <= most:
        parser.error(f"--images must be from {4 * BATCH} to {most}")
    for name in BACKBONES:
        compare(Console(), name, data, count, rounds, torch.device(given.device))


if __name__ == "__main__":
    main()
