"""Sites: where in a backbone an activation vector is read and edited (docs/method.md).

The activation of a site *is* the input of its readers, the weights that read it. So scaling a reader's input channel is
the same as gating the activation (Law 1). If anything else reads the activation, it is no site.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from salve.backbones.probe import Head, own_size, probed_head
from salve.types import Activations, Images, UserError

LAST = "last"


@dataclass(frozen=True)
class Site:
    """An activation, the weights that read it, and its spatial map.

    Attributes:
        name: what the setting ``layer`` calls it.
        readers: module paths of all weights that read the activation; each is called with it as first argument.
        width: ``M``, the number of channels.
        map: module path of the spatial map ``[N, M', H, W]`` or token grid ``[N, T, M']`` for Grad-FAM; empty if the
            activation depends on none.
        map_side: whether the map is the input or the output of that module.
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
        UserError: the backbone is wrapped, or does not end in one linear layer.
    """
    # Imported here, because it takes a second that readers of weights need not wait.
    from torchvision.models import ResNet as TorchvisionResNet
    from torchvision.models import VisionTransformer as TorchvisionViT

    _refuse_wrapped(model)
    if isinstance(model, TorchvisionResNet):
        site = Site("avgpool", ("fc",), _linear(model, model.fc).in_features, "avgpool", "input")
    elif isinstance(model, TorchvisionViT):
        # No gradient flows from CLS to the patch tokens of the last block's *output*: the map is one LayerNorm earlier.
        last_block = f"encoder.layers.{list(dict(model.encoder.layers.named_children()))[-1]}"
        width = _linear(model, getattr(model.heads, "head", None)).in_features
        site = Site("cls", ("heads.head",), width, f"{last_block}.ln_1", prefix_tokens=1)
    elif callable(getattr(model, "get_classifier", None)):
        site = _timm_site(model) or _probed_site(model)
    else:
        site = _probed_site(model)
    return {site.name: site}


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse DataParallel and torch.compile: module paths are those of the plain model inside them."""
    inner = [name for name, _ in model.named_children()]
    if inner in (["module"], ["_orig_mod"]):
        held = type(model.get_submodule(inner[0])).__name__
        raise UserError(
            f"This {type(model).__name__} is a wrapper around a {held}; pass the plain model inside, model.{inner[0]}."
        )


def _linear(model: nn.Module, head: object) -> nn.Linear:
    if not isinstance(head, nn.Linear):
        raise UserError(f"This {type(model).__name__} does not end in one linear layer, so it has no site.")
    return head


def _timm_site(model: nn.Module) -> Site | None:
    """The site of a timm model whose map lies where most have it; None for the others."""
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
    return None


def _probed_site(model: nn.Module) -> Site:
    """The site of any other network, found by running it once and then remembered."""
    head = _probed.get(model)
    if head is None or getattr(model.get_submodule(head.reader), "in_features", None) != head.width:
        head = _probed[model] = probed_head(model, own_size(model))
    return Site(head.reader, (head.reader,), head.width, head.map, prefix_tokens=head.prefix_tokens)


#: Heads that were found, which takes a forward pass.
_probed: MutableMapping[nn.Module, Head] = WeakKeyDictionary()


def find_site(model: nn.Module, layer: str) -> Site:
    """Find a site by name; ``"last"`` is the one that the head reads.

    Raises:
        UserError: there is no such site.
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
    """A context in which every forward pass appends the site's activation to the list."""
    seen: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    hook = model.get_submodule(site.readers[0]).register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


def site_activations(model: nn.Module, site: Site, images: Images) -> Activations:
    """The activation vectors ``[N, M]`` at a site, from one forward pass over images ``[N, 3, H, W]``."""
    with recorded(model, site) as seen:
        model(images)
    return seen[0]
