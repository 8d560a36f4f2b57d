"""Sites: the named places of a backbone where an activation vector is read and edited (docs/method.md).

The activation of a site *is* the input of its readers, the weights that read it, so scaling a reader's input
channel and gating the activation are the same thing (Law 1). A place that anything else reads is no site.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from salve.types import Activations, Images, UserError

LAST = "last"


@dataclass(frozen=True)
class Site:
    """Where an activation is, who reads it, and where its spatial map is.

    Attributes:
        name: what ``layer=`` calls it.
        readers: module paths of all the weights that read the activation; each is called with it as first argument.
        width: ``M``, the number of channels.
        map: module path of the spatial map ``[N, M', H, W]`` or token grid ``[N, T, M']`` that Grad-FAM weighs.
        map_side: whether the map is that module's input or its output.
        prefix_tokens: tokens before the patches in a token grid (CLS, registers).
    """

    name: str
    readers: tuple[str, ...]
    width: int
    map: str
    map_side: Literal["input", "output"] = "output"
    prefix_tokens: int = 0


def sites(model: nn.Module) -> dict[str, Site]:
    """All sites of a backbone by name, from the input to the head.

    Raises:
        UserError: the backbone ends in something other than one linear layer, or is wrapped.
    """
    # Here, because it takes a second, and reading a file of weights imports this module too.
    from torchvision.models import ResNet as TorchvisionResNet
    from torchvision.models import VisionTransformer as TorchvisionViT

    _refuse_wrapped(model)
    if isinstance(model, TorchvisionResNet):
        site = Site("avgpool", ("fc",), _linear(model, model.fc).in_features, "avgpool", "input")
    elif isinstance(model, TorchvisionViT):
        # The patch tokens of the last block's *output* get no gradient from CLS: the map is one LayerNorm earlier.
        last_block = f"encoder.layers.{list(dict(model.encoder.layers.named_children()))[-1]}"
        width = _linear(model, getattr(model.heads, "head", None)).in_features
        site = Site("cls", ("heads.head",), width, f"{last_block}.ln_1", prefix_tokens=1)
    elif callable(getattr(model, "get_classifier", None)):
        site = _timm_site(model)
    else:
        raise UserError(
            f"No site is known in a {type(model).__name__}: salve reads torchvision ResNets and ViTs, and timm models."
        )
    return {site.name: site}


def _refuse_wrapped(model: nn.Module) -> None:
    """Hooks and paths of sites are those of the plain model, which DataParallel and torch.compile hold inside."""
    inner = [name for name, _ in model.named_children()]
    if inner in (["module"], ["_orig_mod"]):
        held = type(model.get_submodule(inner[0])).__name__
        raise UserError(
            f"This {type(model).__name__} is a wrapper around a {held}: give the plain model inside, model.{inner[0]}."
        )


def _linear(model: nn.Module, head: object) -> nn.Linear:
    if not isinstance(head, nn.Linear):
        raise UserError(f"This {type(model).__name__} does not end in one linear layer, so it has no site to edit at.")
    return head


def _timm_site(model: nn.Module) -> Site:
    classifier = _linear(model, model.get_classifier())  # type: ignore[operator]
    modules = dict(model.named_modules())
    reader = next(name for name, module in modules.items() if module is classifier)
    blocks = modules.get("blocks")
    if "patch_embed" in modules and isinstance(blocks, nn.Sequential) and f"blocks.{len(blocks) - 1}.norm1" in modules:
        pooling = getattr(model, "global_pool", None)
        name = "cls" if pooling == "token" else "global_pool"
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        return Site(name, (reader,), classifier.in_features, f"blocks.{len(blocks) - 1}.norm1", prefix_tokens=prefix)
    for pool in ("global_pool", "head.global_pool"):
        if pool in modules:
            return Site("global_pool", (reader,), classifier.in_features, pool, "input")
    raise UserError(f"No spatial map was found before the pooling of this {type(model).__name__}.")


def find_site(model: nn.Module, layer: str) -> Site:
    """The site called ``layer``; ``"last"`` is the one that the head reads.

    Raises:
        UserError: there is no such site; the message lists those that exist.
    """
    known = sites(model)
    if layer == LAST:
        return list(known.values())[-1]
    if layer not in known:
        raise UserError(
            f"layer={layer} is no site of this {type(model).__name__}; its sites are {', '.join(known)} "
            f"(or {LAST}, the one that the head reads)."
        )
    return known[layer]


@contextmanager
def recorded(model: nn.Module, site: Site) -> Iterator[list[Tensor]]:
    """Within the context every forward pass appends the site's activation, as its reader receives it."""
    seen: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = model.get_submodule(site.readers[0]).register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


def site_activations(model: nn.Module, site: Site, images: Images) -> Activations:
    """The activation vectors ``[N, M]`` at the site, by one forward pass over images ``[N, 3, H, W]``."""
    with recorded(model, site) as seen:
        model(images)
    return seen[0]
