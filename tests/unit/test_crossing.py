"""Critical strengths behind any tail: against the exact law where the tail is linear, and scaled weights elsewhere."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from salve.backbones.graph import GraphTail, NetworkGraph
from salve.backbones.site import Site
from salve.backbones.tail import LinearTail
from salve.diagnosis import attributions, critical_strength, first_crossing, linear_crossing
from salve.types import UserError
from tests.unit.test_graph import SIZE, Folded, Net, Tokens, TwoViews

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 20.0]


class Linear(Net):
    """Without activation functions: the tail of every site is affine."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(images)).mean(dim=(2, 3)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Case(NamedTuple):
    """A network in float64, its graph, a site, images, the labels that are predicted, and the tail."""

    model: nn.Module
    graph: NetworkGraph
    site: Site
    images: Tensor
    labels: Tensor
    tail: GraphTail


def cut(make: Callable[[], nn.Module], layer: str, count: int = 24) -> Case:
    torch.manual_seed(0)
    model = make().eval()
    graph = NetworkGraph(model, SIZE)
    model.double()
    with torch.no_grad():
        # Images that differ in colour, and logits that differ between them by 1, so that predictions differ.
        images = 2 * normal(count, 3, 1, 1) + normal(count, 3, SIZE, SIZE, seed=1)
        model.get_parameter("head.bias").zero_()
        model.get_parameter("head.weight").div_(model(images).std(dim=0).mean())
        model.get_parameter("head.bias").sub_(model(images).mean(dim=0) - 0.5 * normal(5, seed=4))
        labels = model(images).argmax(dim=1)
    (site,) = (one for one in graph.sites.values() if layer in (one.name, *one.aliases))
    return Case(model, graph, site, images, labels, graph.tail(model, site, images))


def within(found: Tensor, law: Tensor, tolerance: float) -> None:
    """A crossing lies at the law's or above it, by the tolerance at most; both are infinite together, and zero."""
    assert torch.equal(found.isinf(), law.isinf())
    assert torch.equal(found == 0, law == 0)
    finite = law.isfinite()
    slack = 1e-9 * law[finite]
    assert (found[finite] >= law[finite] - slack).all()
    assert (found[finite] * (1 - tolerance) <= law[finite] + slack).all()


@pytest.mark.parametrize("tolerance", [0.01, 1e-9])
def test_at_the_last_site_a_crossing_is_the_exact_one(tolerance: float) -> None:
    model, *_, labels, tail = cut(Net, "last", 200)
    labels[:5] = (labels[:5] + 1) % 5  # wrong without an edit
    c = normal(6, seed=5)
    c[3] = 0
    law = LinearTail(model.get_parameter("head.weight").detach(), model.get_parameter("head.bias").detach())
    rows = tail.activations[:, 0]
    # Between two breakpoints a margin is concave: none that is positive at both can be lost between them.
    grid = sorted({0.0, *(1 / c[c != 0].abs()).tolist()})
    found = first_crossing(tail, c, labels, grid, tolerance)
    exact = {criterion: critical_strength(law, rows, c, labels, criterion) for criterion in ("logit", "flip")}
    within(found.logit, exact["logit"], tolerance)
    within(found.flip, exact["flip"], tolerance)
    for strengths in exact.values():
        assert (strengths == 0).any()
        assert strengths.isinf().any()
        assert ((strengths > 0) & (strengths < grid[1])).any()
        assert (strengths.isfinite() & (strengths > grid[1])).any()
    assert (found.flip_grid[5:] >= found.flip[5:]).all()
    assert set(found.flip_grid.tolist()) <= {*grid, math.inf}
    approximate = linear_crossing(tail, c, labels, "logit")
    torch.testing.assert_close(
        approximate, critical_strength(law, rows, c, labels, "logit", "linear"), rtol=1e-12, atol=0
    )
    by_all = critical_strength(law, rows, c, labels, "flip", "linear")
    by_one = linear_crossing(tail, c, labels, "flip")
    assert (by_one >= by_all - 1e-12 * by_all.nan_to_num(0, 0)).all()
    for n in range(0, 200, 9):
        logits, falls = law(rows[n])[0], law.weight @ (rows[n] * c.abs())
        own, (_, rival) = int(labels[n]), logits.where(torch.arange(5) != labels[n], -torch.inf).max(dim=0)
        lead, fall = float(logits[own] - logits[rival]), float(falls[own] - falls[rival])
        expected = 0.0 if lead <= 0 else lead / fall if fall > 0 else math.inf
        assert float(by_one[n]) == pytest.approx(expected, rel=1e-10)


def test_behind_an_affine_tail_a_crossing_is_that_of_its_law() -> None:
    """Each image has an affine law of its own: how much every channel, over all its positions, adds to each logit."""
    *_, labels, tail = cut(Linear, "second", 60)
    c = normal(4, seed=2)
    with torch.no_grad():
        bias = tail(torch.zeros_like(tail.activations))
        alone = [tail(tail.activations * torch.eye(4, dtype=torch.float64)[j]) - bias for j in range(4)]
    terms = torch.stack(alone, dim=2)  # [N, C, M]
    grid = sorted({0.0, *(1 / c.abs()).tolist()})
    found = first_crossing(tail, c, labels, grid, 1e-9)
    ones = torch.ones(1, 4, dtype=torch.float64)
    for criterion in ("logit", "flip"):
        laws = [
            critical_strength(LinearTail(terms[n], bias[n]), ones, c, labels[n : n + 1], criterion) for n in range(60)
        ]
        within(getattr(found, criterion), torch.cat(laws), 1e-9)
        assert len({bool(one.isinf()) for one in laws}) == 2
    laws = [
        critical_strength(LinearTail(terms[n], bias[n]), ones, c, labels[n : n + 1], "logit", "linear")
        for n in range(60)
    ]
    torch.testing.assert_close(linear_crossing(tail, c, labels, "logit"), torch.cat(laws), rtol=1e-9, atol=1e-12)


def by_scaled_weights(model: nn.Module, site: Site, image: Tensor, c: Tensor, label: int, flip: bool) -> float:
    """The definition for one image: the network with scaled weights at every strength of the grid, then bisection."""
    state = model.state_dict()

    def holds(alpha: float) -> bool:
        gate = (1 - alpha * c.abs()).clamp_min(0)
        scaled = {reader.weight: reader.scaled(state[reader.weight], gate) for reader in site.readers}
        logits = torch.func.functional_call(model, scaled, (image[None],))[0]
        others = torch.cat([logits[:label], logits[label + 1 :]])
        return bool(logits[label] > (others.max() if flip else 0))

    if not holds(0):
        return 0.0
    low = 0.0
    for high in GRID[1:]:
        if not holds(high):
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if holds(middle) else (low, middle)
            return high
        low = high
    return math.inf


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (Net, "second"),
        (TwoViews, "other"),
        (lambda: Folded(outer=True), "mlp"),
        (lambda: Folded(outer=False), "mlp"),
        (Tokens, "qkv"),
    ],
    ids=["map", "two views", "folded, images first", "folded, tokens first", "tokens"],
)
@torch.no_grad()
def test_each_image_has_the_crossing_of_its_own_latent_in_the_edited_network(
    make: Callable[[], nn.Module], layer: str
) -> None:
    model, _, site, images, labels, tail = cut(make, layer, 12)
    contributions = 2 * normal(12, 4, seed=3)
    labels[0] = (labels[0] + 1) % 5
    found = first_crossing(tail, contributions, labels, GRID, 1e-6)
    for n in range(12):
        given = model, site, images[n], contributions[n], int(labels[n])
        assert float(found.logit[n]) == pytest.approx(by_scaled_weights(*given, flip=False), rel=2e-6)
        assert float(found.flip[n]) == pytest.approx(by_scaled_weights(*given, flip=True), rel=2e-6)
    assert found.flip[0] == 0
    assert len(set(found.flip.tolist())) > 3


def test_an_image_alone_has_the_strengths_that_it_has_among_others() -> None:
    model, graph, site, images, labels, tail = cut(Net, "second", 6)
    c = normal(4, seed=2)
    together = first_crossing(tail, c, labels, GRID)
    for n in range(6):
        alone = first_crossing(graph.tail(model, site, images[n : n + 1]), c, labels[n : n + 1], GRID)
        torch.testing.assert_close(torch.cat(alone), torch.stack(together)[:, n])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one element with each pass of a tail under gates."""
    counted, plain = [], GraphTail.gated

    def gated(tail: GraphTail, gate: Tensor) -> Tensor:
        counted.append(1)
        return plain(tail, gate)

    monkeypatch.setattr(GraphTail, "gated", gated)
    return counted


def test_a_latent_that_touches_nothing_takes_the_grid_and_no_bisection(passes: list[int]) -> None:
    *_, labels, tail = cut(Net, "second")
    nothing = torch.zeros(4, dtype=torch.float64)
    found = first_crossing(tail, nothing, labels, GRID)
    assert len(passes) == len(GRID)
    assert found.flip.isinf().all()
    assert found.flip_grid.isinf().all()
    assert linear_crossing(tail, nothing, labels).isinf().all()


def test_images_that_are_wrong_without_an_edit_take_one_pass(passes: list[int]) -> None:
    tail = cut(Net, "second").tail
    lowest = tail(tail.activations).detach()
    assert (lowest.amin(dim=1) < 0).all()
    found = first_crossing(tail, normal(4), lowest.argmin(dim=1), GRID)
    assert len(passes) == 1
    assert torch.stack(found).eq(0).all()
    assert linear_crossing(tail, normal(4), lowest.argmin(dim=1)).eq(0).all()


class WithoutBias(Net):
    """All logits are zero where every channel is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 5, bias=False)


def test_the_scan_ends_when_all_images_are_lost(passes: list[int]) -> None:
    torch.manual_seed(0)
    model = WithoutBias().eval()
    graph = NetworkGraph(model, SIZE)
    model.double()
    images = normal(9, 3, SIZE, SIZE)
    tail = graph.tail(model, graph.sites["head"], images)
    labels = model(images).argmax(dim=1)
    found = first_crossing(tail, torch.ones(6, dtype=torch.float64), labels, [0.0, 0.75, 1.5, 2.0, 3.0, 4.0])
    assert found.flip_grid.tolist() == [1.5] * 9
    # One at the start, two strengths, and for each criterion 7 halvings of 0.75 until it is 1 % of about 1.
    assert len(passes) == 1 + 2 + 2 * 7
    assert ((found.flip >= 1) & (found.flip <= 1.01)).all()


@pytest.mark.parametrize("layer", ["second", "last"])
@pytest.mark.parametrize("criterion", ["logit", "flip"])
def test_attributions_are_the_slopes_of_all_latents(layer: str, criterion: Any) -> None:
    *_, labels, tail = cut(Net, layer)
    width = tail.activations.shape[-1]
    decoder, step = normal(width, 7), 1e-6
    values, channels = attributions(tail, labels, criterion)

    def margin(gate: Tensor) -> Tensor:
        logits = tail.gated(gate)
        own = logits.gather(1, labels[:, None])[:, 0]
        return own if criterion == "logit" else own - logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)

    torch.testing.assert_close(values, margin(torch.ones(width, dtype=torch.float64)))
    for latent in range(7):
        size = decoder[:, latent].abs()
        fall = (margin(1 + step * size) - margin(1 - step * size)) / (2 * step)
        torch.testing.assert_close(channels @ size, fall, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_diagnosed_is_refused() -> None:
    model, graph, site, images, labels, tail = cut(Net, "second", 4)
    c = normal(4)
    for wrong in (images * math.nan, images * math.inf):
        spoiled = graph.tail(model, site, wrong)
        with pytest.raises(UserError, match=r"^activations must be finite"):
            first_crossing(spoiled, c, labels, GRID)
        with pytest.raises(UserError, match=r"^activations must be finite"):
            attributions(spoiled, labels)
    for outside in (labels - 5, labels + 5):
        with pytest.raises(UserError, match=r"^labels must"):
            first_crossing(tail, c, outside, GRID)
    for grid in ([0.0, 2.0, 1.0], [1.0, 1.0], [-1.0, 1.0]):
        with pytest.raises(UserError, match="must rise from 0 or more"):
            first_crossing(tail, c, labels, grid)
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(math.nan)
    with pytest.raises(UserError, match=r"^The logits that .* are NaN or infinite"):
        first_crossing(tail, c, labels, GRID)


def test_a_grid_of_no_strengths_finds_only_what_is_lost_without_an_edit() -> None:
    *_, labels, tail = cut(Net, "second", 3)
    labels[1] = (labels[1] + 1) % 5
    assert first_crossing(tail, normal(4), labels, [0.0]).flip.tolist() == [math.inf, 0.0, math.inf]
