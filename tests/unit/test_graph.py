"""Sites in a network's graph: what counts as one, its axes, and that scaled weights are a gated tensor (Law 1)."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salve.backbones.graph import NetworkGraph
from salve.backbones.site import Site
from salve.types import UserError

SIZE = 8


class Net(nn.Module):
    """Two convolutions and a linear head; ``between`` stands between the second convolution and the head."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1, groups=groups)
        self.head = nn.Linear(6, 5)

    def between(self, x: Tensor) -> Tensor:
        return x.relu().mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.between(self.second(self.first(images).relu())))


class Skip(Net):
    """What the first convolution gives is read by the second and by a skip connection."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).relu()
        return self.head(F.pad(x, (0, 0, 0, 0, 0, 2)).add(self.second(x)).mean(dim=(2, 3)))


class TwoReaders(Net):
    """Two convolutions read the same activations."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(4, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).relu()
        return self.head((self.second(x) + self.other(x)).relu().mean(dim=(2, 3)))


class TwoViews(Net):
    """A convolution and a linear layer read the same activations, whose channels lie elsewhere for each."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).relu()
        tokens = self.other(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (SIZE, SIZE))
        return self.head((self.second(x) + tokens).relu().mean(dim=(2, 3)))


class Functional(Net):
    """The head's module is never called; its weight goes to a function."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.between(self.second(self.first(images).relu()))
        return F.linear(x, self.head.weight, self.head.bias)


class Shared(Net):
    """One weight reads twice."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.twice(self.first(images).relu()).relu()
        return self.head(self.between(self.second(self.twice(x).relu())))


class SharedModule(Net):
    """One module under two names, each of which reads once."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(4, 4, 1)
        self.other = self.one

    def forward(self, images: Tensor) -> Tensor:
        x = self.other(self.one(self.first(images).relu()).relu()).relu()
        return self.head(self.between(self.second(x)))


class Standardised(Net):
    """The second convolution's weight is standardised before it reads, so scaling it would change nothing."""

    def forward(self, images: Tensor) -> Tensor:
        weight = self.second.weight
        weight = (weight - weight.mean()) / weight.std()
        x = F.conv2d(self.first(images).relu(), weight, padding=1)
        return self.head(self.between(x))


class Folded(Net):
    """Tokens are read as rows: ``outer`` says whether an image's tokens lie beside each other."""

    def __init__(self, outer: bool) -> None:
        super().__init__()
        self.outer = outer
        self.mlp = nn.Linear(4, 6)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).relu().flatten(2)  # [N, 4, T]
        x = x.permute(0, 2, 1) if self.outer else x.permute(2, 0, 1)
        x = self.mlp(x.reshape(-1, 4)).relu()
        tokens = SIZE * SIZE
        x = x.view(-1, tokens, 6).mean(dim=1) if self.outer else x.view(tokens, -1, 6).mean(dim=0)
        return self.head(x)


class Tokens(nn.Module):
    """A patch embedding with two tokens before its own, one block of attention, and a head on the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, stride=2)
        self.prefix = nn.Parameter(torch.randn(1, 2, 4))
        self.norm = nn.LayerNorm(4)
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], dim=1)
        query, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(query, key, value))
        return self.head(x[:, 0])


def found(model: nn.Module) -> dict[str, Site]:
    return NetworkGraph(model.eval(), SIZE).sites


def summary(model: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]]:
    return {name: (site.width, site.positions) for name, site in found(model).items()}


def test_every_tensor_that_only_weights_read_is_a_site_but_the_images() -> None:
    assert summary(Net()) == {"second": (4, (SIZE, SIZE)), "head": (6, ())}


def test_a_tensor_that_a_skip_connection_reads_is_none() -> None:
    assert summary(Skip()) == {"head": (6, ())}


class Branch(Net):
    """A site inside a residual branch, and one behind the sum, which all that the head sees comes through."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(4, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).relu()
        x = (x + self.inside(x.sigmoid())).relu()
        return self.head(self.between(self.second(x)))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Net(), {"second": False, "head": False}),
        (Branch(), {"inside": True, "second": False, "head": False}),
        (TwoReaders(), {"second": False, "head": False}),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "",
)
def test_a_closed_site_that_is_by_passed_still_lets_images_through(model: nn.Module, expected: dict[str, bool]) -> None:
    graph, images = NetworkGraph(model.eval(), SIZE), torch.randn(3, 3, SIZE, SIZE)
    assert {name: site.bypassed for name, site in graph.sites.items()} == expected
    for site in graph.sites.values():
        tail = graph.tail(model, site, images)
        closed = tail.gated(torch.zeros(site.width))
        assert ((closed - closed[:1]).abs().max() > 1e-6) == site.bypassed


def test_a_site_has_all_its_readers() -> None:
    assert [reader.path for reader in found(TwoReaders())["second"].readers] == ["second", "other"]
    views = found(TwoViews())["other"]
    assert {reader.path for reader in views.readers} == {"second", "other"}
    assert (views.width, views.positions) == (4, (SIZE, SIZE))


def test_a_weight_is_a_reader_also_where_its_module_is_never_called() -> None:
    assert list(found(Functional())) == ["second", "head"]


def test_a_weight_that_is_used_twice_is_no_reader() -> None:
    assert list(found(Shared())) == ["second", "head"]
    assert list(found(SharedModule())) == ["second", "head"]


def test_a_weight_that_is_changed_before_it_reads_is_no_reader() -> None:
    assert list(found(Standardised())) == ["head"]


def test_grouped_and_depthwise_convolutions_are_readers() -> None:
    assert found(Net(groups=2))["second"].readers[0].groups == 2


def test_prefix_tokens_and_signs_and_names() -> None:
    sites = found(Tokens())
    assert {name: (site.positions, site.prefix_tokens) for name, site in sites.items()} == {
        "qkv": ((18,), 2),
        "proj": ((18,), 2),
        "head": ((), 0),
    }
    assert sites["head"].aliases == ("last",)
    assert sites["qkv"].aliases == ("norm",)
    assert all(site.signed for site in sites.values())
    assert [site.signed for site in found(Net()).values()] == [False, False]


class Changed(Net):
    """What stands behind a ReLU is changed before the second convolution reads it."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.between(self.second(self.change(self.first(images).relu()))))


@pytest.mark.parametrize(
    ("change", "signed"),
    [
        (lambda x: 2 * x + 1, False),
        (lambda x: x + x.square(), False),
        (lambda x: F.max_pool2d(x, 3, 1, 1), False),
        (lambda x: x - 1, True),
        (lambda x: x + (-1), True),
        (lambda x: -0.5 * x, True),
        (lambda x: torch.sub(2 * x, x, alpha=3), True),
        (lambda x: torch.add(x, x, alpha=-2), True),
        (lambda x: F.pad(x, (1, 1, 1, 1), value=-1.0), True),
        (lambda x: F.gelu(x), True),
    ],
)
def test_activations_can_be_negative_unless_it_is_certain_that_they_cannot(
    change: Callable[[Tensor], Tensor], signed: bool
) -> None:
    assert found(Changed(change))["second"].signed == signed


@pytest.mark.parametrize("outer", [True, False])
def test_a_batch_that_is_folded_into_another_axis_is_told_apart(outer: bool) -> None:
    model = Folded(outer).eval()
    graph = NetworkGraph(model, SIZE)
    site = graph.sites["mlp"]
    assert site.in_graph is not None
    assert (site.in_graph.folded, site.in_graph.batch_first, site.positions) == (SIZE * SIZE, outer, (SIZE * SIZE,))
    images = torch.randn(4, 3, SIZE, SIZE)
    expected = model.first(images).relu().flatten(2).transpose(1, 2)
    torch.testing.assert_close(graph.activations(model, site, images), expected)


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "skip": Skip,
    "two readers": TwoReaders,
    "two views": TwoViews,
    "functional": Functional,
    "shared": Shared,
    "shared module": SharedModule,
    "two groups": lambda: Net(groups=2),
    "folded, images first": lambda: Folded(outer=True),
    "folded, tokens first": lambda: Folded(outer=False),
    "tokens": Tokens,
}


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_scaling_what_reads_a_site_is_gating_it(name: str) -> None:
    """The oracle multiplies the tensor within the graph; the scaled weights go into the network itself."""
    torch.manual_seed(0)
    model = NETS[name]().eval()
    graph = NetworkGraph(model, SIZE)
    model.double()
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    untouched = model(images)
    torch.testing.assert_close(graph.logits(model, images), untouched)
    assert graph.sites
    for site in graph.sites.values():
        gate = 2 * torch.rand(site.width, dtype=torch.float64)
        gated = graph.tail(model, site, images).gated(gate)
        state = model.state_dict()
        scaled = {reader.weight: reader.scaled(state[reader.weight], gate) for reader in site.readers}
        torch.testing.assert_close(torch.func.functional_call(model, scaled, (images,)), gated, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(gated, untouched, atol=1e-6)


def test_activations_are_what_the_reader_receives_for_any_number_of_images() -> None:
    model = Net().eval()
    graph = NetworkGraph(model, SIZE)
    for count in (1, 2, 7):
        images = torch.randn(count, 3, SIZE, SIZE)
        expected = model.first(images).relu().flatten(2).transpose(1, 2)
        torch.testing.assert_close(graph.activations(model, graph.sites["second"], images), expected)
        assert graph.activations(model, graph.sites["head"], images).shape == (count, 1, 6)


class Undecided(nn.Module):
    """Looks at its numbers to decide what to do, which no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = images.mean(dim=(2, 3))
        return self.head(x) if x.sum() > 0 else self.head(-x)


def test_a_network_that_has_no_graph_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^This Undecided cannot be exported \(.*\)\.$"):
        NetworkGraph(Undecided().eval(), SIZE)


class Silent(Net):
    """Takes no images of this size, and does not say why."""

    def forward(self, images: Tensor) -> Tensor:
        raise ValueError


def test_an_error_that_says_nothing_is_named() -> None:
    with pytest.raises(UserError, match=r"^This Silent cannot read 8 × 8 images \(ValueError\)\.$"):
        NetworkGraph(Silent().eval(), SIZE)


def test_a_network_in_train_mode_is_refused() -> None:
    with pytest.raises(UserError, match=r"^This Net is in train mode; call model\.eval\(\) first\.$"):
        NetworkGraph(Net().train(), SIZE)


def test_a_size_that_the_network_cannot_read_is_named() -> None:
    """As opposed to a network that cannot be exported at any size."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
    assert set(NetworkGraph(model, SIZE).sites) == {"3"}
    with pytest.raises(UserError, match=r"^This Sequential cannot read 16 × 16 images \(RuntimeError: "):
        NetworkGraph(model, 16)
