"""Tails: what lies behind a site, called with activations, and gated as a whole or image by image."""

import pytest
import torch
from torch import Tensor, nn

from salve.backbones import LinearTail, find_site, graph_of
from salve.backbones.cut import Cut
from salve.backbones.graph import NetworkGraph
from salve.backbones.sites import head_site
from salve.types import UserError
from tests.unit.test_graph import NETS, SIZE, Folded, Net

ORDER = torch.tensor([3, 0, 1, 2, 4])


def cuts(name: str) -> list[Cut]:
    """The network cut at each of its sites."""
    torch.manual_seed(0)
    model = NETS[name]().eval().double().requires_grad_(False)
    graph = NetworkGraph(model, SIZE)
    return [Cut(model, site, ORDER, graph) for site in graph.sites.values()]


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_a_tail_makes_the_networks_logits_of_the_activations(name: str) -> None:
    images = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    for cut in cuts(name):
        activations, tail = cut.read(images), cut.tail(images)
        assert activations.shape == (3, cut.site.count, cut.site.width)
        torch.testing.assert_close(tail.activations, activations, rtol=0, atol=0)
        logits = cut.model(images)[:, ORDER]
        for found in (tail(activations), tail.gated(torch.ones(cut.site.width).double()), cut.logits(images)):
            torch.testing.assert_close(found, logits, rtol=1e-12, atol=1e-12)
        # What is fed in is what counts, and a second call finds the first one's images as they were.
        gate = torch.rand(cut.site.width, dtype=torch.float64)
        torch.testing.assert_close(tail(activations * gate), tail.gated(gate), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tail(activations), logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_each_image_can_have_a_gate_of_its_own(name: str) -> None:
    images = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    for cut in cuts(name):
        gates = torch.rand(3, cut.site.width, dtype=torch.float64)
        together = cut.tail(images).gated(gates)
        for n in range(3):
            alone = cut.tail(images).gated(gates[n])[n]
            torch.testing.assert_close(together[n], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("outer", [True, False])
@torch.no_grad()
def test_positions_that_share_an_axis_with_the_images_come_back_to_their_places(outer: bool) -> None:
    torch.manual_seed(0)
    model = Folded(outer).eval().double()
    graph = NetworkGraph(model, SIZE)
    cut = Cut(model, graph.sites["mlp"], torch.arange(5), graph)
    images = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    tail = cut.tail(images)
    changed = tail.activations.clone()
    changed[1, 7] = 0  # of one image one position
    logits, untouched = tail(changed), tail(tail.activations)
    assert (logits != untouched).any(dim=1).tolist() == [False, True, False]
    by_hand = model.first(images).relu().flatten(2).transpose(1, 2)
    torch.testing.assert_close(tail.activations, by_hand, rtol=1e-12, atol=1e-12)


def test_gradients_flow_from_logits_to_activations() -> None:
    torch.manual_seed(0)
    model = Net().eval().double().requires_grad_(False)
    graph = NetworkGraph(model, SIZE)
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    tail = Cut(model, graph.sites["second"], torch.arange(5), graph).tail(images)
    activations = tail.activations.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tail(activations)[:, 2].sum(), activations)
    step = torch.zeros_like(activations)
    step[1, 5, 3] = 1e-6
    slope = (tail(tail.activations + step) - tail(tail.activations - step))[1, 2] / 2e-6
    torch.testing.assert_close(gradient[1, 5, 3], slope, rtol=1e-5, atol=1e-8)
    assert gradient.abs().sum() > 0


@torch.no_grad()
def test_nothing_in_front_of_the_site_is_computed_again() -> None:
    model = Net().eval()
    graph = NetworkGraph(model, SIZE)
    images = torch.randn(2, 3, SIZE, SIZE)
    tail = Cut(model, graph.sites["second"], torch.arange(5), graph).tail(images)
    before = tail(tail.activations)
    for parameter in model.first.parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(tail(tail.activations), before)


class InPlace(Net):
    """Changes tensors that by-pass the site in place, behind it."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        skip = x.abs()
        y = self.second(x.relu())
        skip.mul_(2)
        y[:, :4] += skip
        return self.head(y.relu_().mean(dim=(2, 3)))


@torch.no_grad()
def test_a_network_that_works_in_place_has_the_same_tail_every_time() -> None:
    torch.manual_seed(0)
    model = InPlace().eval().double()
    graph = NetworkGraph(model, SIZE)
    images = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    tail = Cut(model, graph.sites["second"], torch.arange(5), graph).tail(images)
    for _ in range(3):
        torch.testing.assert_close(tail(tail.activations), model(images), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_tail_of_the_head_is_its_linear_layer() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    cut = Cut(model, head_site(model), ORDER)
    assert isinstance(cut.linear, LinearTail)
    images = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(cut.linear(cut.read(images)), model(images)[:, ORDER])
    inner = find_site(model, "second", SIZE)
    assert Cut(model, inner, ORDER, graph_of(model, SIZE)).linear is None


def test_a_head_that_is_not_finite_is_refused() -> None:
    model = Net().eval()
    site = head_site(model)
    nn.init.constant_(model.head.bias, torch.inf)
    with pytest.raises(UserError, match=r"head \(head\) holds NaN or infinite weights"):
        Cut(model, site, ORDER)
