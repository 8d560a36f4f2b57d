"""Which image classifiers can be studied: one of every family of torchvision and timm is read, gated and edited.

Each network is the smallest of its family, with random weights and images of the size that it is made for, or of 64 or
96 pixels where it reads these. At its last site, what the head makes of the activations is compared with the network's
logits, weights scaled with activations gated (Law 1, in float64), and the weights of an edit that is undone with those
before it, bit for bit. A network without that site is tried at the last site of its graph.

    python benchmarks/backbones.py [--kept FILE] [--part K/N] [--markdown FILE] [NAME ...]

A name is one of torchvision's, or ``timm/NAME``. What was found is kept in a file, line by line; a second command tries
only the networks that are not in it.
"""

import argparse
import copy
import json
import re
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from families import network
from torch import Tensor, nn

from salve.backbones import Site
from salve.backbones.graph import NetworkGraph
from salve.backbones.probe import can_read, own_size, probed_head
from salve.backbones.site import Reader
from salve.editing import Edit, apply_edit_file, make_edit_file, undo_edit_file
from salve.sae import make_sae
from salve.timm_alone import timm
from salve.types import UserError

#: The smallest of each family of torchvision's classifiers.
TORCHVISION = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_0", "squeezenet1_1", "swin_t", "swin_v2_t"),
    *("vgg11", "vgg11_bn", "vit_b_32", "vit_b_16", "wide_resnet50_2"),
)
#: What :func:`smallest_of_timm` found in timm 1.0.31, which takes minutes; ``--families`` finds it anew.
TIMM = (
    *("bat_resnext26ts", "beit_base_patch16_224", "beitv2_base_patch16_224", "botnet26t_256", "caformer_s18"),
    *("cait_xxs24_224", "coat_tiny", "coatnet_pico_rw_224", "coatnext_nano_rw_224", "convformer_s18"),
    *("convit_tiny", "convmixer_768_32", "convnext_zepto_rms", "convnextv2_atto", "cpubone_nano"),
    *("crossvit_tiny_240", "cs3darknet_focus_s", "csatv2", "cspdarknet53", "cspnext_tiny", "cspresnet50"),
    *("cspresnext50", "darknet17", "darknetaa53", "davit_tiny", "deit_tiny_patch16_224", "densenet121"),
    *("densenetblur121d", "dla46x_c", "dm_nfnet_f0", "dpn48b", "eca_resnext26ts", "ecaresnet26t", "ecaresnetlight"),
    *("ecaresnext26t_32x4d", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0"),
    *("efficientnet_lite0", "efficientnetv2_rw_t", "efficientvim_m1", "efficientvit_b0", "ese_vovnet19b_slim_dw"),
    *("eva02_tiny_patch14_224", "fasternet_t0", "fastvit_t8", "fbnetc_100", "fbnetv3_b", "flexivit_small"),
    *("focalnet_tiny_srf", "gc_efficientnetv2_rw_t", "gcresnet33ts", "gcresnext26ts", "gcvit_xxtiny", "gernet_s"),
    *("ghostnet_050", "ghostnetv3_050", "gmixer_12_224", "gmlp_ti16_224", "halo2botnet50ts_256", "halonet_h1"),
    *("haloregnetz_b", "hardcorenas_b", "hgnet_tiny", "hgnetv2_b0", "hiera_tiny_224", "hieradet_small"),
    *("hrnet_w18_small", "iformer_t", "inception_next_atto", "lambda_resnet26t", "lamhalobotnet50ts_256"),
    *("lcnet_035", "lcnetv2_small", "legacy_seresnet18", "levit_128s", "lowformer_b0", "mambaout_femto"),
    *("maxvit_pico_rw_256", "maxxvit_rmlp_nano_rw_256", "maxxvitv2_nano_rw_256", "mixer_s16_224", "mixnet_s"),
    *("mnasnet_small", "mobilenet_edgetpu_100", "mobilenetv2_035", "mobileone_s1", "mobilevit_xxs"),
    *("mobilevitv2_050", "mvitv2_tiny", "naflexvit_base_patch16_parfac_gap", "nasnetalarge", "nest_tiny"),
    *("nextvit_small", "nf_regnet_b0", "nfnet_l0", "pit_ti_224", "pnasnet5large", "poolformer_s12"),
    *("poolformerv2_s12", "pvt_v2_b0", "qwen3_vit_88m", "rdnet_tiny", "regnetv_040", "regnetx_002", "regnety_002"),
    *("regnetz_005", "repghostnet_050", "repvgg_a0", "repvit_m1", "res2next50", "resmlp_12_224", "resnest14d"),
    *("resnet10t", "resnetaa34d", "resnetblur18", "resnetrs50", "resnetv2_18", "resnext26ts", "rexnet_100"),
    *("rexnetr_100", "sam2_hiera_tiny", "samvit_base_patch16_224", "sebotnet33ts_256", "sedarknet21"),
    *("sehalonet33ts", "selecsls42", "semnasnet_050", "senet154", "sequencer2d_s", "seresnet18", "seresnetaa50d"),
    *("seresnext26ts", "seresnextaa101d_32x8d", "shvit_s1", "skresnet18", "skresnext50_32x4d", "spnasnet_100"),
    *("starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "test_efficientnet"),
    *("tf_mobilenetv3_small_075", "tiny_vit_5m_224", "tinynet_e", "tnt_s_legacy_patch16_224", "tresnet_m"),
    *("twins_svt_small", "vgg11", "visformer_tiny", "vit_tiny_patch16_dinov3_qkvb", "vitamin_small_224"),
    *("volo_d1_224", "vovnet39a", "wide_resnet50_2", "xception41p", "xcit_nano_12_p8_224"),
)
#: Parameters that a network may have; the few families whose smallest has more are left out.
MOST_PARAMETERS = 130_000_000
#: Pixels that are tried before a network's own.
SMALL = (64, 96)
#: The largest difference, as a share of the largest logit, that rounding alone makes.
ROUNDING = {"float64": 1e-10, "float32": 1e-4}

LAST, INNER, REFUSED = "last", "inner", "refused"


@dataclass(frozen=True)
class Found:
    """What was found in a network.

    Attributes:
        name: of the network. pixels: of a side of its images. parameters: their number, in millions.
        where: ``last`` if it has that site, ``inner`` if its graph has others, ``refused`` if it has none.
        site, width, map: of the site that was tried; ``map`` is what Grad-FAM reads, "" if there is none.
        logits, law: largest differences, as shares of the largest logit: of what the head makes of the activations, and
            of weights scaled from activations gated. effect: of the gate, likewise. precision: of the latter two.
        undone: whether an edit, undone, left the same bits; None if none was made. why: what does not work.
    """

    name: str
    pixels: int = 0
    parameters: float = 0.0
    where: str = REFUSED
    site: str = ""
    width: int = 0
    map: str = ""
    logits: float = 0.0
    law: float = 0.0
    effect: float = 0.0
    precision: str = ""
    undone: bool | None = None
    why: str = ""

    @property
    def works(self) -> bool:
        """Whether everything that was tried at its last site holds."""
        return self.where == LAST and self.undone is True and self.holds

    @property
    def holds(self) -> bool:
        """Whether Law 1 holds at the site that was tried."""
        most = ROUNDING.get(self.precision, 0.0)
        # Where the gate changes nothing, Law 1 says nothing.
        return self.law < most < self.effect / 100 and self.logits < 1e-4


def smallest_of_timm() -> list[str]:
    """The name of the smallest model of each of timm's families: those whose names begin with the same letters."""
    families: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for name in timm.list_models():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=10)
        family = re.match("[a-z]+", name)
        assert family is not None
        families[family[0]].append((sum(one.numel() for one in model.parameters()), name))
    return sorted(name for size, name in map(min, families.values()) if size <= MOST_PARAMETERS)


def tried(name: str) -> Found:
    """Try a network."""
    try:
        model, _ = network(name)
    except UserError as error:
        return Found(name, why=str(error))
    size = next((size for size in SMALL if can_read(model, size)), None) or own_size(model)
    found = Found(name, size, sum(one.numel() for one in model.parameters()) / 1e6)
    try:
        head = probed_head(model, size)
    except UserError as error:
        return _inner(model, found, str(error))
    site = Site(head.reader, (Reader(f"{head.reader}.weight"),), head.width, map=head.map)
    fields = {**asdict(found), "where": LAST, "site": head.reader, "width": head.width, "map": head.map}
    undone, why = _undone(model, site)
    return Found(**{**fields, **_in_double(_law_of_head, model, site, size), "undone": undone, "why": why})


def _in_double(
    law: Callable[[nn.Module, Any, int], dict[str, float]], model: nn.Module, site: Any, size: int
) -> dict[str, Any]:
    """The differences in float64; in float32 where a network has a part that is float32 whatever the rest is."""
    try:
        return {**law(copy.deepcopy(model).double(), site, size), "precision": "float64"}
    except RuntimeError:
        return {**law(model, site, size), "precision": "float32"}


def _images(model: nn.Module, size: int) -> Tensor:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.to(next(model.parameters()).dtype)


def _gate(width: int, like: Tensor) -> Tensor:
    return 2 * torch.rand(width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(like)


@torch.no_grad()
def _law_of_head(model: nn.Module, site: Site, size: int) -> dict[str, float]:
    images, [reader] = _images(model, size), site.readers
    layer, weight = model.get_submodule(reader.path), reader.weight
    state = model.state_dict()
    gate = _gate(site.width, state[weight])
    seen: list[Tensor] = []

    def gated(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0] * gate.view(1, -1, *[1] * (inputs[0].ndim - 2)), *inputs[1:])

    logits = model(images)
    hook = layer.register_forward_pre_hook(gated)
    by_activations = model(images)
    hook.remove()
    scaled = state[weight] * gate.view(1, -1, *[1] * (state[weight].ndim - 2))
    by_weights = torch.func.functional_call(model, {weight: scaled}, (images,))
    return {
        "logits": _difference(layer(seen[0]).flatten(1), logits, logits),
        "law": _difference(by_weights, by_activations, logits),
        "effect": _difference(by_activations, logits, logits),
    }


def _difference(one: Tensor, other: Tensor, logits: Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    return float((one - other).abs().max() / logits.abs().max())


def _undone(model: nn.Module, site: Site) -> tuple[bool | None, str]:
    """Whether an edit that is applied and undone leaves the same bits, and what is wrong if none can be made."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sae = make_sae("linear_l1", site.width, 8, torch.Generator().manual_seed(0)).eval()
    try:
        edit_file = make_edit_file(model, site, sae, [Edit(0, 1.0, "suppress")], "")
        edited = apply_edit_file(edit_file, dict(state))
        back = undo_edit_file(edit_file, edited)
    except (UserError, RuntimeError) as error:
        return None, f"No edit can be made: {' '.join(str(error).split())}"
    changed = [name for name in state if not torch.equal(edited[name], state[name])]
    same = back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)
    return same and changed == [site.readers[0].weight], ""


def _inner(model: nn.Module, found: Found, why: str) -> Found:
    """Try the last site of the network's graph, where it has no site called last."""
    fields = {**asdict(found), "why": why}
    try:
        graph = NetworkGraph(model.eval(), found.pixels)
    except UserError as error:
        return Found(**{**fields, "why": f"{why} {error}"})
    if not graph.sites:
        return Found(**fields)
    name, site = list(graph.sites.items())[-1]

    @torch.no_grad()
    def law(model: nn.Module, _: object, size: int) -> dict[str, float]:
        images, state = _images(model, size), model.state_dict()
        gate = _gate(site.width, state[site.readers[0].weight])
        scaled = {one.weight: one.scaled(state[one.weight], gate) for one in site.readers}
        by_weights = torch.func.functional_call(model, scaled, (images,))
        logits, gated = model(images), graph.tail(model, site, images).gated(gate)
        return {"law": _difference(by_weights, gated, logits), "effect": _difference(gated, logits, logits)}

    shape = " × ".join(map(str, site.positions))
    fields |= {"where": INNER, "site": name, "width": site.width, "map": shape}
    return Found(**{**fields, **_in_double(law, model, site, found.pixels)})


def table(found: Sequence[Found]) -> str:
    """The page docs/backbones.md."""
    works = [one for one in found if one.works]
    inner = [one for one in found if one.where == INNER and one.holds]
    rest = [one for one in found if one not in works and one not in inner]
    maps = sum(one.map != "" for one in works)
    lines = [
        "# Backbones: what works",
        "",
        f"The smallest network of each of {len(found)} families: {sum('/' not in one.name for one in found)} of "
        f"torchvision, {sum('/' in one.name for one in found)} of timm. A family is what begins with the same letters.",
        f"Families whose smallest network has more than {MOST_PARAMETERS // 10**6} million parameters are left out.",
        "`python benchmarks/backbones.py` makes this page; random weights, images of the pixels given.",
        "",
        f"- **{len(works)} work** with `layer=last`. The head makes the network's own logits of the activations.",
        "  Scaling the head's input channels is gating the activations (Law 1). An edit that is undone leaves the same",
        "  bits.",
        f"  {maps} of them have a map for Grad-FAM. In small images, the last map of several positions may lie earlier",
        "  than in those of the network's own size.",
        f"- **{len(inner)} work inside**, at the sites of their graph, but have no site called `last`; the sentence",
        "  says why. Law 1 was tried at the last of the sites.",
        f"- **{len(rest)} do not work.**" if rest else "- None fails.",
        "",
        "Differences are shares of the largest logit. A few networks have a part that is float32 whatever the rest is,",
        "so that Law 1 can only be tried in float32.",
        "",
        "## Without a site called `last`, or not working",
        "",
        "| network | pixels | tried at | Law 1, difference | why |",
        "|---|---|---|---|---|",
    ]
    for one in (*inner, *rest):
        at = f"`{one.site}`, {one.width} channels" if one.site else ""
        at += f", {one.map}" if one.where == INNER and one.map else ""
        lines.append(f"| `{one.name}` | {one.pixels or ''} | {at} | {_law_text(one)} | {one.why} |")
    lines += [
        *("", "## With the site `last`", ""),
        "| network | pixels | head | channels | map for Grad-FAM | Law 1, difference | edit undone |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in works:
        at = f"`{one.map}`" if one.map else "none"
        lines.append(
            f"| `{one.name}` | {one.pixels} | `{one.site}` | {one.width} | {at} | {_law_text(one)} | same bits |"
        )
    return "\n".join(lines) + "\n"


def _law_text(found: Found) -> str:
    return f"{found.law:.0e}, {found.precision}" if found.precision else ""


def read(kept: Path) -> dict[str, Found]:
    """What was found before, by name."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    found = [Found(**json.loads(line)) for line in lines]
    return {one.name: one for one in found}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/backbones.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks (default: one of each family)")
    parser.add_argument(
        "--kept", type=Path, default=Path("backbones.jsonl"), help="what was found (default: %(default)s)"
    )
    parser.add_argument("--part", default="1/1", metavar="K/N", help="only every N-th network, from the K-th")
    parser.add_argument("--markdown", type=Path, help="also write the page there, of everything that was found")
    parser.add_argument("--families", action="store_true", help="only print the smallest model of each family of timm")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.families:
        print("\n".join(smallest_of_timm()))
        return 0
    number, parts = map(int, given.part.split("/"))
    found = read(given.kept)
    names = given.names or (*TORCHVISION, *(f"timm/{name}" for name in TIMM))
    for name in list(names)[number - 1 :: parts]:
        if name in found:
            continue
        began = time.perf_counter()
        found[name] = tried(name)
        with given.kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found[name])) + "\n")
        says = "works" if found[name].works else f"{found[name].where}: {found[name].why or found[name]}"
        print(f"{name}: {says} ({time.perf_counter() - began:.1f} s)", flush=True)
    if given.markdown:
        given.markdown.write_text(table(list(found.values())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
