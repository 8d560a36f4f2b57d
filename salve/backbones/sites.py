# SPDX-License-Identifier: MIT
"""Sites: where in a backbone an activation vector is read and edited (docs/method.md).

The activation of a site *is* the input of its readers, the weights that read it. So scaling a reader's input channel is
the same as gating the activation (Law 1). If anything else reads the activation, it is no site.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from salve.backbones.probe import Head, own_size, probed_head
from salve.backbones.site import Reader, Site
from salve.types import Activations, Images, UserError

if TYPE_CHECKING:
    from salve.backbones.graph import NetworkGraph

LAST = "last"


def head_site(model: nn.Module) -> Site:
    """The last site of a network, the vector that its head reads; found without the network's graph.

    Raises:
        UserError: the backbone is wrapped, or does not end in one linear layer.
    """
    # Imported here, because it takes a second that readers of weights need not wait.
    from torchvision.models import ResNet as TorchvisionResNet
    from torchvision.models import VisionTransformer as TorchvisionViT

    _refuse_wrapped(model)
    if isinstance(model, TorchvisionResNet) and isinstance(model.fc, nn.Linear):
        return _last("avgpool", "fc", model.fc.in_features, "avgpool", "input")
    if isinstance(model, TorchvisionViT) and isinstance(getattr(model.heads, "head", None), nn.Linear):
        # No gradient flows from CLS to the patch tokens of the last block's *output*: the map is one LayerNorm earlier.
        last_block = f"encoder.layers.{list(dict(model.encoder.layers.named_children()))[-1]}"
        return _last("cls", "heads.head", model.heads.head.in_features, f"{last_block}.ln_1", prefix_tokens=1)
    if callable(getattr(model, "get_classifier", None)):
        return _timm_site(model) or _probed_site(model)
    return _probed_site(model)


def _last(
    name: str,
    reader: str,
    width: int,
    map: str,
    map_side: Literal["input", "output"] = "output",
    prefix_tokens: int = 0,
) -> Site:
    aliases = tuple(one for one in (LAST, reader) if one != name)
    readers = (Reader(f"{reader}.weight"),)
    return Site(name, readers, width, aliases, prefix_tokens=prefix_tokens, map=map, map_side=map_side)


def sites(model: nn.Module, size: int | None = None) -> dict[str, Site]:
    """All sites of a network in eval mode by name, from the input to the head.

    A network that cannot be exported, or whose batches cannot be told from its positions, has its last site alone;
    :func:`graph_of` says why.

    Args:
        model: an image classifier; it is not changed.
        size: side of its square images in pixels; None for the size that it is made for.

    Raises:
        UserError: it has no site at all, or is wrapped.
    """
    try:
        inner = graph_of(model, size).sites
    except UserError:
        head = head_site(model)
        return {head.name: head}
    try:
        head = head_site(model)
    except UserError:
        return inner
    # The head's own site replaces that of the graph.
    return {name: site for name, site in inner.items() if site.readers != head.readers} | {head.name: head}


def graph_of(model: nn.Module, size: int | None = None) -> NetworkGraph:
    """The graph of a network, which is exported once and then remembered.

    Raises:
        UserError: it is wrapped, or see :class:`NetworkGraph`.
    """
    _refuse_wrapped(model)  # a compiled one would be compiled first
    from salve.backbones.graph import NetworkGraph

    side = own_size(model) if size is None else size
    known = _graphs.setdefault(model, {})
    if side not in known:
        known[side] = NetworkGraph(model, side)
    return known[side]


def adopt_graph(model: nn.Module, graph: NetworkGraph) -> None:
    """Give a network the graph of another one that differs in its weights alone."""
    _graphs.setdefault(model, {})[graph.size] = graph


#: Graphs by network and size of the images; an export takes seconds.
_graphs: MutableMapping[nn.Module, dict[int, NetworkGraph]] = WeakKeyDictionary()


def _refuse_wrapped(model: nn.Module) -> None:
    """Refuse DataParallel and torch.compile: module paths are those of the plain model inside them."""
    inner = [name for name, _ in model.named_children()]
    if inner in (["module"], ["_orig_mod"]):
        held = type(model.get_submodule(inner[0])).__name__
        raise UserError(
            f"This {type(model).__name__} is a wrapper around a {held}; pass the plain model inside, model.{inner[0]}."
        )


def _timm_site(model: nn.Module) -> Site | None:
    """The site of a timm model whose map lies where most have it; None for the others."""
    classifier = model.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear):  # it lies within what is given, or is a convolution
        return None
    modules = dict(model.named_modules())
    reader = next(name for name, module in modules.items() if module is classifier)
    blocks = modules.get("blocks")
    if "patch_embed" in modules and isinstance(blocks, nn.Sequential) and f"blocks.{len(blocks) - 1}.norm1" in modules:
        pooling = getattr(model, "global_pool", None)
        name = "cls" if pooling == "token" else "global_pool"
        prefix = int(getattr(model, "num_prefix_tokens", 0))
        return _last(name, reader, classifier.in_features, f"blocks.{len(blocks) - 1}.norm1", prefix_tokens=prefix)
    for pool in ("global_pool", "head.global_pool"):
        if pool in modules:
            return _last("global_pool", reader, classifier.in_features, pool, "input")
    return None


def _probed_site(model: nn.Module) -> Site:
    """The site of any other network, found by running it once and then remembered."""
    head = _probed.get(model)
    if head is None or model.get_parameter(f"{head.reader}.weight").shape[1] != head.width:
        head = _probed[model] = probed_head(model, own_size(model))
    return _last(head.reader, head.reader, head.width, head.map, prefix_tokens=head.prefix_tokens)


#: Heads that were found, which takes a forward pass.
_probed: MutableMapping[nn.Module, Head] = WeakKeyDictionary()


def find_site(model: nn.Module, layer: str, size: int | None = None) -> Site:
    """Find a site by its name or by one of its aliases; ``"last"`` is the one that the head reads.

    Args:
        model: an image classifier. layer: the name.
        size: side of its square images in pixels, for sites other than the last; None for the network's own size.

    Raises:
        UserError: there is no such site.
    """
    try:
        head = head_site(model)
        if layer in (head.name, *head.aliases):
            return head
    except UserError:
        if layer == LAST:
            raise
        _refuse_wrapped(model)
        head = None
    try:
        graph_of(model, size)
    except UserError as error:
        if head is None:
            raise
        raise UserError(
            f"layer={layer} cannot be found, and the one site known is {head.name} (or {LAST}): {error}"
        ) from error
    known = sites(model, size)
    for site in known.values():
        if layer in (site.name, *site.aliases):
            return site
    names = {name: site for site in known.values() for name in (site.name, *site.aliases)}
    near = get_close_matches(layer.lower(), names, 5, cutoff=0.4) or list(known)[-5:]
    raise UserError(
        f"layer={layer} is no site of this {type(model).__name__}; near it: {', '.join(near)} "
        f"({LAST} is the one that the head reads; salve-sites lists all {len(known)})."
    )


@contextmanager
def recorded(model: nn.Module, site: Site) -> Iterator[list[Tensor]]:
    """A context in which every forward pass appends the site's activation to the list."""
    seen: list[Tensor] = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(1))  # a head that is a 1 × 1 convolution reads [N, M, 1, 1]

    hook = model.get_submodule(site.readers[0].path).register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        hook.remove()


def site_activations(model: nn.Module, site: Site, images: Images) -> Activations:
    """The activation vectors ``[N, M]`` at a site, from one forward pass over images ``[N, 3, H, W]``."""
    with recorded(model, site) as seen:
        model(images)
    return seen[0]
