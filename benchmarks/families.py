"""Where sites are found, and whether scaling what reads a site is gating it (Law 1), family by family.

Each network is the smallest of a file of timm's, or of a family of torchvision's, with random weights. In a few of its
sites, chosen at random, the input channels of every reader are scaled by random factors, and the network's logits are
compared with those of its graph with the site's tensor multiplied by the same factors, in float64.

    python benchmarks/families.py [--sites N] [--markdown FILE] [NAME ...]

A name is one of torchvision's, or ``timm/NAME``, perhaps with ``@PIXELS`` of its images.
"""

import argparse
import copy
import random
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from salve.backbones import load_backbone
from salve.backbones.graph import NetworkGraph
from salve.backbones.probe import own_size
from salve.types import UserError

#: A few that take a second or two each, for tests; FURTHER has one of each further family.
FEW = (
    *("resnet18@32", "mobilenet_v2@32", "vgg11@32", "densenet121@32", "timm/test_vit", "timm/test_nfnet@64"),
    *("timm/test_convnext@32", "timm/test_efficientnet@32", "timm/test_byobnet@32", "timm/mixer_s32_224"),
)
FURTHER = (
    *("mobilenet_v3_small@32", "mnasnet0_5@32", "shufflenet_v2_x0_5@32", "squeezenet1_1@64", "regnet_x_400mf@32"),
    *("efficientnet_b0@32", "alexnet@64", "convnext_tiny@32", "googlenet@64", "resnext50_32x4d@32", "timm/test_vit2"),
    *("timm/test_vit3", "timm/test_vit4", "timm/test_resnet@32", "timm/test_mambaout@32", "timm/resnet10t@32"),
    *("timm/resnetv2_50@32", "timm/regnetx_002@32", "timm/dla46x_c@32", "timm/ghostnet_050@32"),
    *("timm/mobilenetv4_conv_small_050@32", "timm/hgnetv2_b0@32", "timm/repvit_m0_9@32", "timm/fastvit_t8@64"),
    *("timm/edgenext_xx_small@64", "timm/efficientvit_b0@64", "timm/poolformer_s12@32", "timm/fasternet_t0@32"),
    *("timm/starnet_s050@32", "timm/tinynet_e@32", "timm/lcnet_035@32", "timm/selecsls42@64", "timm/vovnet39a@32"),
    *("timm/mobileone_s0@32", "timm/deit_tiny_patch16_224", "inception_v3@96", "maxvit_t@224", "swin_t", "vit_b_16"),
    *("timm/halonet_h1@64", "timm/cait_xxs24_224", "timm/coat_tiny", "timm/convit_tiny", "timm/convmixer_768_32@32"),
    *("timm/crossvit_tiny_240", "timm/cs3darknet_focus_s@64", "timm/davit_tiny@224", "timm/dpn48b@32"),
    *("timm/efficientformer_l1", "timm/efficientformerv2_s0", "timm/efficientvit_m0"),
    *("timm/vit_tiny_patch16_dinov3_qkvb", "timm/eva02_tiny_patch14_224", "timm/beit_base_patch16_224"),
    *("timm/focalnet_tiny_srf@224", "timm/gcvit_xxtiny", "timm/hardcorenas_b@32", "timm/hiera_tiny_224"),
    *("timm/levit_128s", "timm/deit_tiny_distilled_patch16_224", "timm/maxvit_tiny_tf_224", "timm/mobilevit_xxs@64"),
    *("timm/mobilevitv2_050@64", "timm/mvitv2_tiny", "timm/nest_tiny", "timm/nfnet_f0@64", "timm/pit_ti_224"),
    *("timm/pvt_v2_b0", "timm/res2net50_26w_4s@32", "timm/resnest14d@32", "timm/rexnet_100@32", "timm/sequencer2d_s"),
    *("timm/skresnet18@32", "timm/swin_tiny_patch4_window7_224", "timm/swinv2_cr_tiny_224"),
    *("timm/swinv2_tiny_window8_256", "timm/tiny_vit_5m_224", "timm/tnt_s_legacy_patch16_224"),
    *("timm/twins_pcpvt_small", "timm/visformer_tiny", "timm/vitamin_small_224", "timm/volo_d1_224"),
    *("timm/xception41@64", "timm/xcit_nano_12_p16_224", "timm/inception_next_atto@64", "timm/metaformer"),
    *("timm/caformer_s18@64"),
)


class Law(NamedTuple):
    """What was found in a network.

    Attributes:
        sites, vectors: how many sites there are, and how many of them have one position. tried: in how many of them the
            law was. difference: the largest between the two computations, as a share of the largest logit. effect: the
            smallest that a gate had on the logits, likewise. seconds: for finding the sites. why: why there are none.
        precision: of the computation.
    """

    sites: int = 0
    vectors: int = 0
    tried: int = 0
    difference: float = 0.0
    effect: float = 0.0
    seconds: float = 0.0
    why: str = ""
    precision: str = ""


def network(spec: str) -> tuple[nn.Module, int]:
    """A network of ten classes with random weights, and the pixels of its images."""
    name, _, size = spec.partition("@")
    library, _, short = name.rpartition("/")
    torch.manual_seed(0)
    args = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = load_backbone(library or "torchvision", short, "random", 10, args).model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                not parameter.any()
            ):  # as some heads and residual branches begin, which would hide everything behind them
                nn.init.normal_(parameter, std=0.02)
    return model, int(size or own_size(model))


def law(spec: str, most: int = 4) -> Law:
    """Try Law 1 in at most so many sites of a network; the last site is always one of them."""
    try:
        model, size = network(spec)
        began = time.perf_counter()
        graph = NetworkGraph(model, size)
        seconds = time.perf_counter() - began
    except UserError as error:
        return Law(why=str(error))
    names = list(graph.sites)
    if not names:
        return Law(seconds=seconds, why="Everything that a weight reads is read by something else as well.")
    tried = sorted({*random.Random(0).sample(names, min(most, len(names)) - 1), names[-1]}, key=names.index)
    try:
        return _law(graph, copy.deepcopy(model).double(), tried, size, seconds)
    except RuntimeError:  # some networks have a part that is float32 whatever the rest is
        return _law(graph, model, tried, size, seconds)


def _law(graph: NetworkGraph, model: nn.Module, tried: Sequence[str], size: int, seconds: float) -> Law:
    dtype = next(model.parameters()).dtype
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    differences, effects = [], []
    with torch.no_grad():
        untouched, state = model(images), model.state_dict()
        largest = untouched.abs().max()
        for number, name in enumerate(tried):
            site = graph.sites[name]
            gate = 2 * torch.rand(site.width, generator=torch.Generator().manual_seed(number), dtype=dtype)
            gated = graph.tail(model, site, images).gated(gate)
            scaled = {reader.weight: reader.scaled(state[reader.weight], gate) for reader in site.readers}
            edited = torch.func.functional_call(model, scaled, (images,))
            differences.append(float((edited - gated).abs().max() / largest))
            effects.append(float((gated - untouched).abs().max() / largest))
    vectors = sum(site.kind == "vector" for site in graph.sites.values())
    precision = str(dtype).removeprefix("torch.")
    # Not Python's max, which may leave NaN out.
    difference, effect = float(torch.tensor(differences).max()), float(torch.tensor(effects).min())
    return Law(len(graph.sites), vectors, len(tried), difference, effect, seconds, precision=precision)


def row(spec: str, found: Law) -> str:
    """A line of the table."""
    name, _, size = spec.partition("@")
    if found.why:
        return f"| `{name}` | {size} | | | | {found.why} |"
    return (
        f"| `{name}` | {size} | {found.sites} | {found.vectors} | {found.difference:.0e} in {found.tried}, "
        f"{found.precision} | {found.seconds:.1f} s |"
    )


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/families.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks (default: one of each known family)")
    parser.add_argument("--sites", type=int, default=4, help="of each network in which the law is tried (default: 4)")
    parser.add_argument("--markdown", type=Path, help="also write the table there")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    lines = [
        "| network | pixels | sites | vectors | Law 1, largest difference | found in |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for spec in given.names or (*FEW, *FURTHER):
        lines.append(row(spec, law(spec, given.sites)))
        print(lines[-1], flush=True)
    if given.markdown:
        given.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
