"""Tails: how much of a whole forward pass one strength costs at a site, against its share of the flops.

    python benchmarks/tails.py [--rounds 5] [--images 32]

At the first site of each stage of ResNet-18 (160 pixels), of each quarter of ViT-S/14 (98 pixels), and at the head of
both, with random weights. **tail**: ``GraphTail.gated``, the logits of the images with the site gated, from what was
held of them. **whole**: the network's own forward pass. Both in turn, on the CPU. *Over* is the tail's share of the
seconds over its share of the flops; the goal is 1.15.
"""

import argparse
from collections.abc import Callable, Sequence

import timm
import torch
from measure import interleaved, machine, table
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from salve.backbones import graph_of, sites
from salve.backbones.site import Site

CASES: dict[str, tuple[Callable[[], nn.Module], int, Sequence[str]]] = {
    "ResNet-18": (
        lambda: resnet18(num_classes=10),
        160,
        ("layer1.0.conv2", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1", "layer4.1.conv2"),
    ),
    "ViT-S/14": (
        lambda: timm.create_model("vit_small_patch14_dinov2", img_size=98, num_classes=10),
        98,
        ("blocks.0.attn.qkv", "blocks.3.attn.qkv", "blocks.6.attn.qkv", "blocks.9.attn.qkv", "blocks.11.mlp.fc2"),
    ),
}


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@torch.no_grad()
def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=32)
    given = parser.parse_args()
    found = table("Tails", ("network", "site", "share of flops", "share of seconds", "over"), machine("cpu"))
    for name, (make, size, names) in CASES.items():
        model = make().eval().to(memory_format=torch.channels_last)
        images = torch.randn(given.images, 3, size, size).to(memory_format=torch.channels_last)
        graph, known = graph_of(model, size), sites(model, size)
        whole = flops(lambda: model(images))  # noqa: B023
        for site in (known[one] for one in names):
            share, seconds = measured(model, graph.tail(model, site, images).gated, site, images, given.rounds)
            over = seconds / (share / whole)
            found.add_row(name, site.name, f"{share / whole:.3f}", f"{seconds:.3f}", f"{over:.2f}")
    Console().print(found)


def measured(
    model: nn.Module, gated: Callable[[Tensor], Tensor], site: Site, images: Tensor, rounds: int
) -> tuple[int, float]:
    """Flops of a tail, and its share of the seconds of a whole pass."""
    gate = torch.rand(site.width)
    seconds = interleaved({"tail": lambda: gated(gate), "whole": lambda: model(images)}, rounds)
    return flops(lambda: gated(gate)), seconds["tail"] / seconds["whole"]


if __name__ == "__main__":
    main()
