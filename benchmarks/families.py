"""Where sites are found, and whether scaling what reads a site is gating it (Law 1), network by network.

The networks have random weights. In a few sites of each, chosen at random, the input channels of every reader are
scaled by random factors. The logits are compared with those of the network's graph in which the site's tensor is
multiplied by the same factors. Where the network calls the readers as modules, they are also compared with those of the
network itself, with the input of these modules multiplied in a hook.

    python benchmarks/families.py [--sites N] [--write FILE] [NAME ...]

A name is one of torchvision's, or ``timm/NAME``, perhaps with ``@PIXELS`` of its images.
"""

import argparse
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from salve.backbones import load_backbone
from salve.backbones.graph import NetworkGraph
from salve.backbones.probe import own_size
from salve.backbones.site import Site
from salve.timm_alone import timm
from salve.types import UserError

#: One of each family: torchvision's, then one of each file of timm's, or of each kind of network in it.
NETWORKS = (
    *("alexnet@64", "convnext_tiny@32", "densenet121@32", "efficientnet_b0@32", "googlenet@64", "inception_v3@96"),
    *("maxvit_t@224", "mnasnet0_5@32", "mobilenet_v2@32", "mobilenet_v3_small@32", "regnet_x_400mf@32"),
    *("resnet18@32", "resnext50_32x4d@32", "shufflenet_v2_x0_5@32", "squeezenet1_1@64", "swin_t", "vgg11@32"),
    *("vit_b_16",),
    *("timm/beit_base_patch16_224", "timm/caformer_s18@64", "timm/cait_xxs24_224", "timm/coat_tiny"),
    *("timm/convit_tiny", "timm/convmixer_768_32@32", "timm/cpubone_nano@64", "timm/crossvit_tiny_240"),
    *("timm/cs3darknet_focus_s@64", "timm/csatv2", "timm/cspnext_tiny@64", "timm/davit_tiny@224"),
    *("timm/deit_tiny_distilled_patch16_224", "timm/deit_tiny_patch16_224", "timm/dla46x_c@32", "timm/dpn48b@32"),
    *("timm/edgenext_xx_small@64", "timm/efficientformer_l1", "timm/efficientformerv2_s0", "timm/efficientvim_m1"),
    *("timm/efficientvit_b0@64", "timm/efficientvit_m0", "timm/eva02_tiny_patch14_224", "timm/fasternet_t0@32"),
    *("timm/fastvit_t8@64", "timm/focalnet_tiny_srf@224", "timm/gcvit_xxtiny", "timm/ghostnet_050@32"),
    *("timm/gmlp_ti16_224", "timm/halonet_h1", "timm/hardcorenas_b@32", "timm/hgnetv2_b0@32", "timm/hiera_tiny_224"),
    *("timm/hrnet_w18_small@64", "timm/iformer_t@64", "timm/inception_next_atto@64", "timm/inception_resnet_v2@96"),
    *("timm/inception_v4@96", "timm/lambda_resnet26t@128", "timm/lcnet_035@32", "timm/lcnetv2_small@32"),
    *("timm/legacy_seresnet18@32", "timm/legacy_xception@64", "timm/levit_128s", "timm/lowformer_b0@64"),
    *("timm/maxvit_tiny_tf_224", "timm/mixer_s32_224", "timm/mobilenetv4_conv_small_050@32", "timm/mobileone_s0@32"),
    *("timm/mobilevit_xxs@64", "timm/mobilevitv2_050@64", "timm/mvitv2_tiny", "timm/nest_tiny"),
    *("timm/nextvit_small@64", "timm/nfnet_f0@64", "timm/pit_ti_224", "timm/poolformer_s12@32", "timm/pvt_v2_b0"),
    *("timm/rdnet_tiny@64", "timm/regnetx_002@32", "timm/repghostnet_050@32", "timm/repvit_m0_9@32"),
    *("timm/res2net50_26w_4s@32", "timm/resmlp_12_224", "timm/resnest14d@32", "timm/resnet10t@32"),
    *("timm/resnetv2_50@32", "timm/rexnet_100@32", "timm/sam2_hiera_tiny@256", "timm/selecsls42@64"),
    *("timm/sequencer2d_s", "timm/shvit_s1@64", "timm/skresnet18@32", "timm/starnet_s050@32"),
    *("timm/swiftformer_xs@64", "timm/swin_tiny_patch4_window7_224", "timm/swinv2_cr_tiny_224"),
    *("timm/swinv2_tiny_window8_256", "timm/test_byobnet@32", "timm/test_coatnet@160", "timm/test_convnext@32"),
    *("timm/test_efficientnet@32", "timm/test_mambaout@32", "timm/test_maxvit", "timm/test_nfnet@64"),
    *("timm/test_resnet@32", "timm/test_vit", "timm/test_vit2", "timm/test_vit3", "timm/test_vit4"),
    *("timm/test_vit_relpos", "timm/tiny_vit_5m_224", "timm/tinynet_e@32", "timm/tnt_s_legacy_patch16_224"),
    *("timm/tresnet_m@64", "timm/twins_pcpvt_small", "timm/visformer_tiny", "timm/vit_tiny_patch16_dinov3_qkvb"),
    *("timm/vit_tiny_r_s16_p8_224", "timm/vitamin_small_224", "timm/volo_d1_224", "timm/vovnet39a@32"),
    *("timm/xception41@64", "timm/xcit_nano_12_p16_224"),
)
#: Images that set the statistics of the normalisations.
_IMAGES = 8


class Law(NamedTuple):
    """What was found in a network.

    Attributes:
        sites, vectors: how many sites there are, and how many of them have one position.
        tried: in how many of them the law was tried.
        called: in how many of these the readers are modules that the network calls, so that hooks could gate them too.
        difference: the largest between the logits of two computations, as a share of the largest logit.
        effect: the smallest that a gate had on the logits, likewise.
        precision: of the computation.
        why: why there are none.
    """

    sites: int = 0
    vectors: int = 0
    tried: int = 0
    called: int = 0
    difference: float = 0.0
    effect: float = 0.0
    precision: str = ""
    why: str = ""


def network(spec: str) -> tuple[nn.Module, int]:
    """A network of ten classes with random weights, and the pixels of its images."""
    name, _, size = spec.partition("@")
    library, _, short = name.rpartition("/")
    torch.manual_seed(0)
    args = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    model = load_backbone(library or "torchvision", short, "random", 10, args).model
    return model, int(size or own_size(model))


@torch.no_grad()
def enliven(model: nn.Module, size: int) -> None:
    """Change random weights so that the logits depend on every site, as those of a trained network do.

    Many networks begin with heads, residual branches or scales of zero or nearly so. And where the statistics of the
    normalisations are not those of the activations, these die away from layer to layer.
    """
    model.eval()
    for parameter in model.parameters():
        if parameter.abs().max() < 0.01:
            nn.init.normal_(parameter, std=0.1)
    normalisations = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in normalisations:
        module.momentum = 1.0
        module.train()
    if normalisations:
        model(torch.randn(_IMAGES, 3, size, size))
    for module in normalisations:
        # Their mean is not taken away: that would make rounding grow from layer to layer.
        mean, variance = module.running_mean, module.running_var
        if mean is not None and variance is not None:
            variance.add_(mean.square())
            mean.zero_()
    model.eval()


def law(model: nn.Module, size: int, most: int = 4) -> Law:
    """Try Law 1 in at most so many sites of a network; the last site is always one of them.

    Args:
        model: a network with random weights, which are changed. size: of its images, in pixels. most: sites.
    """
    try:
        enliven(model, size)
        graph = _graph(model, size)
    except (UserError, RuntimeError, AssertionError) as error:
        return Law(why=" ".join(str(error).split()))
    names = list(graph.sites)
    if not names:
        return Law(why="Everything that a weight reads is read by something else as well.")
    tried = sorted({*random.Random(0).sample(names, min(most, len(names)) - 1), names[-1]}, key=names.index)
    dtype = next(model.parameters()).dtype
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    called, differences, effects = 0, [], []
    with torch.no_grad():
        untouched, state = model(images), model.state_dict()
        largest = untouched.abs().max()
        for number, name in enumerate(tried):
            site = graph.sites[name]
            gate = 2 * torch.rand(site.width, generator=torch.Generator().manual_seed(number), dtype=dtype)
            scaled = {reader.weight: reader.scaled(state[reader.weight], gate) for reader in site.readers}
            edited = torch.func.functional_call(model, scaled, (images,))
            gated = graph.tail(model, site, images).gated(gate)
            differences.append(float((edited - gated).abs().max() / largest))
            effects.append(float((gated - untouched).abs().max() / largest))
            with _hooked(model, site, gate) as calls:
                hooked = model(images)
            if len(calls) == len(site.readers):
                called += 1
                differences.append(float((edited - hooked).abs().max() / largest))
    return Law(
        sites=len(names),
        vectors=sum(site.kind == "vector" for site in graph.sites.values()),
        tried=len(tried),
        called=called,
        # Not Python's max, which may leave NaN out.
        difference=float(torch.tensor(differences).max()),
        effect=float(torch.tensor(effects).min()),
        precision=str(dtype).removeprefix("torch."),
    )


def _graph(model: nn.Module, size: int) -> NetworkGraph:
    """The graph in float64; in float32 where a part of the network is float32 whatever the rest is."""
    try:
        return NetworkGraph(model.double(), size)
    except UserError:
        return NetworkGraph(model.float(), size)


@contextmanager
def _hooked(model: nn.Module, site: Site, gate: Tensor) -> Iterator[Sequence[nn.Module]]:
    """A context in which the inputs of a site's readers are gated where they are called; yields the modules called."""
    calls: list[nn.Module] = []

    def multiply(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append(module)
        axis = -1 if isinstance(module, nn.Linear) else 1
        return (inputs[0].movedim(axis, -1).mul(gate).movedim(-1, axis), *inputs[1:])

    modules = [model.get_submodule(reader.path) for reader in site.readers]
    hooks = [
        module.register_forward_pre_hook(multiply)
        for module in modules
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


#: Lines of a page between which the table stands.
MARKS = ("<!-- families -->", "<!-- /families -->")
HEAD = ("| network | pixels | sites | vectors | tried | largest difference |", "|---|---|---|---|---|---|")


def row(spec: str, found: Law) -> str:
    """A line of the table."""
    name, _, size = spec.partition("@")
    if found.why:
        return f"| `{name}` | {size} | | | | {found.why} |"
    return (
        f"| `{name}` | {size} | {found.sites} | {found.vectors} | {found.tried}, {found.called} by hooks | "
        f"{found.difference:.0e}, {found.precision} |"
    )


def versions() -> str:
    """A sentence about what the networks come from."""
    return f"With torch {torch.__version__}, torchvision {torchvision.__version__} and timm {timm.__version__}."


def written(text: str, table: str) -> str:
    """A page with the table between its marks.

    Raises:
        UserError: it has no such marks.
    """
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise UserError(f"The file has no lines {MARKS[0]} and {MARKS[1]} with a table between them.")
    return f"{before}{mark}\n{table}\n{end}{after}"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/families.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks (default: one of each known family)")
    parser.add_argument("--sites", type=int, default=4, help="of each network in which the law is tried (default: 4)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also put the table there, between its marks")
    given = parser.parse_args()
    if given.write:
        written(given.write.read_text(encoding="utf-8"), "")
    warnings.simplefilter("ignore")
    lines = [versions(), "", *HEAD]
    print("\n".join(lines))
    for spec in given.names or NETWORKS:
        try:
            found = law(*network(spec), given.sites)
        except UserError as error:
            found = Law(why=str(error))
        lines.append(row(spec, found))
        print(lines[-1], flush=True)
    if given.write:
        given.write.write_text(written(given.write.read_text(encoding="utf-8"), "\n".join(lines)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
