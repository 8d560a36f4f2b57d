"""Law 2: critical strengths against bisection on a function written from the definition."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from salve.backbones.tail import LinearTail
from salve.diagnosis import critical_strength
from salve.editing import edited_logits
from salve.types import UserError


def margin(alpha: float, weight: Tensor, bias: Tensor, a: Tensor, c: Tensor, own: int, criterion: Any) -> float:
    """The definition, channel by channel: what has to stay positive for the class to hold."""
    size = c.abs()
    factor = torch.tensor([1.0 if s == 0 else max(0.0, 1 - alpha * float(s)) for s in size], dtype=torch.float64)
    logits = bias + weight @ (a * factor)
    if criterion == "logit":
        return float(logits[own])
    return float(logits[own] - torch.cat([logits[:own], logits[own + 1 :]]).max())


def by_bisection(weight: Tensor, bias: Tensor, a: Tensor, c: Tensor, own: int, criterion: Any) -> float:
    """First crossing, by a fine scan for the first sign change and bisection inside it."""

    def value(alpha: float) -> float:
        return margin(alpha, weight, bias, a, c, own, criterion)

    if value(0.0) <= 0:
        return 0.0
    breakpoints = sorted({float(1 / s) for s in c.abs() if s > 0})
    # Between two breakpoints every logit is linear, so the margin (a minimum of linear functions) is concave, and a
    # fine scan over each piece misses no sign change that ends the piece.
    grid, low = [], 0.0
    for high in breakpoints:
        grid += [low + (high - low) * step / 40 for step in range(1, 41)]
        low = high
    before = 0.0
    for alpha in grid:
        if value(alpha) <= 0:
            left, right = before, alpha
            for _ in range(200):
                middle = (left + right) / 2
                left, right = (middle, right) if value(middle) > 0 else (left, middle)
            return right
        before = alpha
    return math.inf


@pytest.mark.parametrize("criterion", ["logit", "flip"])
@pytest.mark.parametrize("seed", range(12))
def test_exact_equals_bisection(criterion: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    classes, width, images = 4, 9, 6
    weight, bias = normal(classes, width), normal(classes)
    activations = normal(images, width).abs() if seed % 2 else normal(images, width)
    c = normal(width)
    c[torch.randperm(width, generator=generator)[: seed % 4]] = 0  # channels that the latent does not touch
    if seed % 3 == 0:
        c[1] = -c[2]  # two channels that close at once
    labels = torch.randint(0, classes, (images,), generator=generator)
    # Make most labels hold at α = 0, so that there is something to lose.
    predicted = (activations @ weight.T + bias).argmax(1)
    labels = torch.where(torch.arange(images) < 4, predicted, labels)
    found = critical_strength(LinearTail(weight, bias), activations, c, labels, criterion)
    expected = [
        by_bisection(weight, bias, a, c, int(own), criterion) for a, own in zip(activations, labels, strict=True)
    ]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def at_every_breakpoint(
    weight: Tensor, bias: Tensor, activations: Tensor, c: Tensor, labels: Tensor, criterion: Any
) -> tuple[Tensor, Tensor]:
    """First crossings ``[N]`` from the edited head's logits at every breakpoint, and whether the class comes back."""
    alphas = torch.cat([torch.zeros(1), (1 / c.abs()[c != 0]).sort().values])
    logits = edited_logits(LinearTail(weight, bias), activations, c, alphas)  # [K, N, C]
    margins = logits.gather(2, labels.expand(len(alphas), -1)[:, :, None])
    if criterion == "flip":
        margins = (margins - logits).scatter(2, labels.expand(len(alphas), -1)[:, :, None], torch.inf)
    found = torch.full((len(labels),), torch.inf)
    for n in range(len(labels)):
        for margin in margins[:, n].T:
            if not (margin <= 0).any():
                continue
            k = int((margin <= 0).int().argmax())
            share = 0.0 if k == 0 else float(margin[k - 1] / (margin[k - 1] - margin[k]))
            root = alphas[0] if k == 0 else alphas[k - 1] + share * (alphas[k] - alphas[k - 1])
            found[n] = min(float(found[n]), float(root))
    return found, (margins[-1] > 0).all(dim=1) & found.isfinite() & (found > 0)


@pytest.mark.parametrize("criterion", ["logit", "flip"])
@pytest.mark.parametrize("width", [1, 2, 61, 256])
def test_exact_equals_the_edited_head_at_every_breakpoint(criterion: Any, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        weight, bias = torch.randn(5, width, generator=generator), 3 * torch.randn(5, generator=generator)
        activations, c = torch.randn(60, width, generator=generator), torch.randn(width, generator=generator)
        c[: width // 8] = 0
        labels = (activations @ weight.T + bias).argmax(1)
        labels[:3] = 0
        expected, back = at_every_breakpoint(weight, bias, activations, c, labels, criterion)
        found = critical_strength(LinearTail(weight, bias), activations, c, labels, criterion)
    finally:
        torch.set_default_dtype(default)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    if width > 2:
        assert back.any()  # the hard case: what was lost for some strengths only


def test_a_short_dip_between_two_breakpoints_is_found() -> None:
    """One channel takes the class below its rival, and another with a similar ``|c|`` brings it back."""
    width = 100
    c = torch.linspace(0.2, 1.0, width, dtype=torch.float64)
    for helps in range(2, width):
        hurts = helps - 2  # closes later
        weight = torch.zeros(2, width, dtype=torch.float64)
        weight[0, helps], weight[0, hurts] = 1.0, -1.0
        # When the first has closed, the second still holds this much; with half of it to spare the margin dips below 0.
        deepest = 1 - float(c[hurts] / c[helps])
        bias = torch.tensor([deepest / 2, 0.0], dtype=torch.float64)
        activations = torch.ones(1, width, dtype=torch.float64)
        found = critical_strength(LinearTail(weight, bias), activations, c, torch.tensor([0]))
        assert float(found) == pytest.approx(deepest / 2 / float(c[helps] - c[hurts]), rel=1e-9)


def test_the_cases_above_are_of_every_kind() -> None:
    """0, finite before and after the first channel closes, and inf: else the comparison means nothing."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    activations = torch.randn(400, 9, generator=generator, dtype=torch.float64)
    c = torch.randn(9, generator=generator, dtype=torch.float64)
    bias, labels = torch.tensor([0.4, 0.3, -0.2, -0.4], dtype=torch.float64), torch.arange(400) % 4
    for criterion in ("logit", "flip"):
        found = critical_strength(LinearTail(weight, bias), activations, c, labels, criterion)
        first_close = float(1 / c.abs().max())
        assert (found == 0).any()
        assert found.isinf().any()
        assert ((found > 0) & (found < first_close)).any()
        assert (found.isfinite() & (found > first_close)).any()


def test_linear_is_exact_until_a_channel_closes_and_only_then() -> None:
    generator = torch.Generator().manual_seed(5)
    weight, activations = (
        torch.randn(3, 8, generator=generator).double(),
        torch.randn(300, 8, generator=generator).double(),
    )
    c = torch.randn(8, generator=generator).double()
    bias, labels = torch.zeros(3).double(), torch.arange(300) % 3
    for criterion in ("logit", "flip"):
        exact = critical_strength(LinearTail(weight, bias), activations, c, labels, criterion, "exact")
        linear = critical_strength(LinearTail(weight, bias), activations, c, labels, criterion, "linear")
        early = exact < 1 / c.abs().max()
        torch.testing.assert_close(linear[early], exact[early])
        late = exact.isfinite() & ~early
        assert (linear[late] != exact[late]).any()


def test_the_edited_head_flips_just_there() -> None:
    generator = torch.Generator().manual_seed(7)
    weight, bias = torch.randn(5, 12, generator=generator).double(), torch.randn(5, generator=generator).double()
    activations, c = torch.rand(50, 12, generator=generator).double(), torch.randn(12, generator=generator).double()
    labels = (activations @ weight.T + bias).argmax(1)
    found = critical_strength(LinearTail(weight, bias), activations, c, labels)
    assert found.isfinite().any()
    for n in found.isfinite().nonzero()[:, 0].tolist():
        around = [float(found[n]) * 0.9999, float(found[n]) * 1.0001]
        below, above = (
            edited_logits(LinearTail(weight, bias), activations[n : n + 1], c, around)[:, 0].argmax(1).tolist()
        )
        assert below == labels[n]
        assert above != labels[n]


def test_a_latent_that_touches_nothing_never_flips_and_losers_are_zero() -> None:
    weight, bias = torch.eye(2), torch.zeros(2)
    activations = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found = critical_strength(LinearTail(weight, bias), activations, torch.zeros(2), torch.tensor([0, 0]))
    assert found.tolist() == [math.inf, 0.0]


def test_float32_stays_float32_and_empty_stays_empty() -> None:
    weight, bias, c = torch.eye(2), torch.zeros(2), torch.ones(2)
    found = critical_strength(LinearTail(weight, bias), torch.zeros(0, 2), c, torch.zeros(0, dtype=torch.long))
    assert found.shape == (0,)
    assert found.dtype == torch.float32


def test_blocks_over_images_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, bias, c = (torch.randn(*s, generator=generator) for s in ((3, 6), (3,), (6,)))
    activations, labels = torch.randn(17, 6, generator=generator), torch.arange(17) % 3
    whole = critical_strength(LinearTail(weight, bias), activations, c, labels)
    monkeypatch.setattr("salve.diagnosis.critical._BLOCK", 40)
    assert torch.equal(critical_strength(LinearTail(weight, bias), activations, c, labels), whole)


def test_bad_input_is_named() -> None:
    weight, bias, c = torch.eye(2), torch.zeros(2), torch.ones(2)
    activations, labels = torch.ones(1, 2), torch.tensor([0])
    with pytest.raises(UserError, match="finite"):
        critical_strength(LinearTail(weight, bias), activations * math.nan, c, labels)
    with pytest.raises(UserError, match="0 … 1"):
        critical_strength(LinearTail(weight, bias), activations, c, torch.tensor([2]))
    unchecked = inspect.unwrap(critical_strength)  # as users call it, without the type checks of the tests
    with pytest.raises(UserError, match="logit or flip"):
        unchecked(LinearTail(weight, bias), activations, c, labels, "both")
    with pytest.raises(UserError, match="exact or linear"):
        unchecked(LinearTail(weight, bias), activations, c, labels, "flip", "guess")
