"""Networks, SAEs and fittings for tests of the edit methods, in float64."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from salve.backbones.cut import Cut
from salve.backbones.graph import NetworkGraph
from salve.backbones.site import Reader, Site
from salve.backbones.sites import head_site
from salve.editing.methods import Fitting, Target
from salve.sae import make_sae
from tests.unit.test_graph import SIZE

CLASSES = 5
ORDER = torch.tensor([3, 0, 1, 2, 4])
TARGET = Target("one", (1,), (2,), (1,), ("class-defining",))


class Plain(nn.Module):
    """Readers of both kinds that can hold every change: with biases, and without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.hidden, self.head = nn.Linear(8, 7), nn.Linear(7, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        map_ = self.second(self.first(images).relu()).relu()
        return self.head(self.hidden(map_.mean(dim=(2, 3))).relu())


class Drawn:
    """Images of one colour each, with noise; their classes are what the network says."""

    def __init__(self, model: nn.Module, count: int = 60) -> None:
        generator = torch.Generator().manual_seed(1)
        colours = 2 * torch.randn(count, 3, 1, 1, generator=generator)
        self.all = (colours + 0.5 * torch.randn(count, 3, SIZE, SIZE, generator=generator)).double()
        with torch.no_grad():
            self.labels = model(self.all)[:, ORDER].argmax(dim=1)

    def __call__(self, numbers: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.all)) if numbers is None else torch.tensor(list(numbers), dtype=torch.long)
        for part in order.split(16):
            yield self.all[part], self.labels[part]


def network(kind: type[nn.Module] = Plain) -> nn.Module:
    """A network in float64 whose classes are about equally many."""
    torch.manual_seed(0)
    model = kind().eval().double().requires_grad_(False)
    images = 2 * torch.randn(200, 3, 1, 1).double() + 0.5 * torch.randn(200, 3, SIZE, SIZE).double()
    model.head.bias -= model(images).mean(dim=0)  # type: ignore[union-attr]
    return model


def cut_at(model: nn.Module, layer: str) -> Cut:
    """The network cut at a site; ``last`` for the head's."""
    if layer == "last":
        return Cut(model, head_site(model), ORDER)
    graph = NetworkGraph(model, SIZE)
    return Cut(model, graph.sites[layer], ORDER, graph)


def fitting_at(model: nn.Module, layer: str, latents: int = 6) -> Fitting:
    """What edits are fitted on, with an SAE whose latents fire."""
    cut, images = cut_at(model, layer), Drawn(model)
    with torch.no_grad():
        read = torch.cat([cut.read(batch) for batch, _ in images(None)])  # [N, P, M]
    sae = make_sae("relu_l1", read.shape[2], latents, torch.Generator().manual_seed(2)).eval().double()
    sae.requires_grad_(False)
    # Every latent fires for some rows.
    sae.bias.add_(0.05 - sae.pre_activations(read.flatten(0, 1)).mean(dim=0))
    labels = images.labels.repeat_interleave(read.shape[1])
    return Fitting(cut, read.flatten(0, 1), labels, CLASSES, sae, images.labels, images, seed=0)


def fitting_of_head(
    weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor, direction: Tensor | None = None
) -> Fitting:
    """What edits are fitted on, of a network that is a head alone; the only latent of its SAE has a direction."""
    head = nn.Linear(weight.shape[1], len(weight), dtype=weight.dtype).requires_grad_(False)
    head.load_state_dict({"weight": weight, "bias": bias})
    site = Site("last", (Reader("head.weight"),), weight.shape[1])
    sae = None
    if direction is not None:
        sae = make_sae("relu_l1", len(direction), 1, torch.Generator().manual_seed(2))
        sae.decoder = nn.Parameter(direction[:, None], requires_grad=False)
    return Fitting(Cut(nn.ModuleDict({"head": head}), site, torch.arange(len(weight))), rows, labels, len(weight), sae)
