"""Every variant against its paper's equations, written out as loops; gradients against closed forms."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from salve.sae import SAE, BatchTopK, Gated, JumpReLU, Matryoshka, make_sae, objective
from salve.sae.topk import WINDOW, batch_cut, learn_threshold
from tests.unit.sae_examples import ALL, drawn, example

Row = list[float]


def affine(matrix: Tensor, row: Row, offset: Tensor) -> Row:
    """``matrix @ row + offset`` as loops."""
    rows, start = matrix.tolist(), offset.tolist()
    return [sum(m * value for m, value in zip(line, row, strict=True)) + b for line, b in zip(rows, start, strict=True)]


def squared(a: Row, b: Row) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def centred(sae: SAE, row: Tensor) -> Row:
    return [a - s for a, s in zip(row.tolist(), sae.b_dec.tolist(), strict=True)]


def loop_pre(sae: SAE, rows: Tensor) -> list[Row]:
    return [affine(sae.encoder, centred(sae, row), sae.bias) for row in rows]


def by_row(keep: Callable[[SAE, Row], Row]) -> Callable[[SAE, list[Row]], list[Row]]:
    return lambda sae, pre: [keep(sae, row) for row in pre]


def loop_topk(sae: Any, row: Row) -> Row:
    largest = sorted(range(len(row)), key=lambda latent: -row[latent])[: sae.k]
    return [value if latent in largest and value > 0 else 0.0 for latent, value in enumerate(row)]


def loop_batch_topk(sae: Any, pre: list[Row]) -> list[Row]:
    places = [(value, n, latent) for n, row in enumerate(pre) for latent, value in enumerate(row)]
    kept = {(n, latent) for value, n, latent in sorted(places, reverse=True)[: sae.k * len(pre)] if value > 0}
    return [[value if (n, latent) in kept else 0.0 for latent, value in enumerate(row)] for n, row in enumerate(pre)]


def loop_gated(sae: Any, row: Row) -> Row:
    parts = zip(row, sae.bias.tolist(), sae.magnitude.tolist(), sae.magnitude_bias.tolist(), strict=True)
    return [max(math.exp(r) * (gate - bias) + own, 0.0) if gate > 0 else 0.0 for gate, bias, r, own in parts]


def loop_jumprelu(sae: Any, row: Row) -> Row:
    return [value if value > math.exp(t) else 0.0 for value, t in zip(row, sae.log_threshold.tolist(), strict=True)]


LATENTS: dict[str, Callable[[SAE, list[Row]], list[Row]]] = {
    "linear_l1": by_row(lambda _, row: row),
    "relu_l1": by_row(lambda _, row: [max(value, 0.0) for value in row]),
    "topk": by_row(loop_topk),
    "batch_topk": loop_batch_topk,
    "matryoshka": loop_batch_topk,
    "gated": by_row(loop_gated),
    "jumprelu": by_row(loop_jumprelu),
}


def loop_loss(sae: SAE, rows: Tensor, price: float) -> float:
    """The mean loss, from the equations."""
    pre = loop_pre(sae, rows)
    total = 0.0
    for row, gates, latents in zip(rows.tolist(), pre, LATENTS[sae.variant](sae, pre), strict=True):
        whole = affine(sae.decoder, latents, sae.b_dec)
        total += squared(row, whole)
        if sae.variant == "jumprelu":
            total += price * sum(latent != 0 for latent in latents)
        elif sae.variant == "gated":
            gate = [max(value, 0.0) for value in gates]
            total += price * sum(gate) + squared(row, affine(sae.decoder, gate, sae.b_dec))
        else:
            total += price * sum(abs(latent) for latent in latents)
        if sae.variant == "matryoshka":
            for size in (2, 4):  # a quarter and half of nine latents, rounded
                first = [latent if place < size else 0.0 for place, latent in enumerate(latents)]
                total += squared(row, affine(sae.decoder, first, sae.b_dec))
    return total / len(rows)


@pytest.mark.parametrize("variant", ALL)
def test_latents_and_loss_are_those_of_the_equations(variant: str) -> None:
    sae, rows = example(variant), drawn(12, 6)
    expected = torch.tensor(LATENTS[variant](sae, loop_pre(sae, rows)), dtype=torch.float64)
    torch.testing.assert_close(sae.encode(rows), expected)
    assert (expected == 0).any() == (variant != "linear_l1")
    loss, latents = objective(sae, rows, 0.3)
    torch.testing.assert_close(latents, expected)
    assert float(loss.detach()) == pytest.approx(loop_loss(sae, rows, 0.3))


@pytest.mark.parametrize("variant", ALL)
def test_a_latent_depends_on_its_own_pre_activation_only(variant: str) -> None:
    """Which Grad-FAM's closed form takes for granted, with the slope that it reads off."""
    sae, pre = example(variant).eval(), drawn(4, 9)
    jacobian = torch.autograd.functional.jacobian(sae.activate, pre)  # [N, d, N, d]
    own = torch.einsum("nlnl->nl", jacobian)
    torch.testing.assert_close(jacobian.sum(), own.sum())
    assert int((jacobian != 0).sum()) == int((own != 0).sum())
    slope = sae.magnitude.exp() if isinstance(sae, Gated) else torch.ones(9, dtype=torch.float64)
    torch.testing.assert_close(own, torch.where(sae.activate(pre) != 0, slope, 0.0))


def with_tensor(sae: SAE, name: str, value: Tensor, rows: Tensor) -> Tensor:
    state = {**dict(sae.named_parameters()), **dict(sae.named_buffers()), name: value}

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sae = sae

        def forward(self, rows: Tensor) -> Tensor:
            return objective(self.sae, rows, 0.3)[0]

    return torch.func.functional_call(Loss(), {f"sae.{key}": held for key, held in state.items()}, (rows,))


@pytest.mark.parametrize("variant", ["linear_l1", "relu_l1", "topk", "batch_topk", "matryoshka"])
def test_gradients_are_finite_differences(variant: str) -> None:
    """Of all that is trained, ``b_dec`` included; what has stop-gradients has tests of its own."""
    sae, rows = example(variant), drawn(5, 6)
    sae.learn_b_dec()
    for name, tensor in sae.named_parameters():
        if tensor.requires_grad:
            value = tensor.detach().clone().requires_grad_()
            assert torch.autograd.gradcheck(lambda v, name=name: with_tensor(sae, name, v, rows), value, eps=1e-7)


# -- batch_topk


def test_a_batch_spends_its_budget_where_it_is_needed() -> None:
    sae = make_sae("batch_topk", 6, 9, torch.Generator().manual_seed(0), k=2).double()
    rows = drawn(64, 6) * torch.linspace(0.1, 2, 64, dtype=torch.float64)[:, None]
    used = (sae.encode(rows) > 0).sum(dim=1)
    assert int(used.sum()) == 2 * 64
    assert used.min() < 2 < used.max()


def test_the_inference_threshold_is_the_mean_of_the_smallest_kept_value() -> None:
    batches = [drawn(8, 5, seed=seed).relu() for seed in range(20)]
    threshold = torch.zeros((), dtype=torch.float64)
    for step, latents in enumerate(batches):
        threshold = learn_threshold(threshold, latents, step)
    smallest = [min(value for row in latents.tolist() for value in row if value > 0) for latents in batches]
    assert float(threshold) == pytest.approx(sum(smallest) / len(smallest))
    # Later on, what is long ago fades.
    for step in range(20, 20 * WINDOW):
        threshold = learn_threshold(threshold, batches[0], step)
    assert float(threshold) == pytest.approx(smallest[0], rel=1e-6)


def test_nothing_kept_says_nothing_about_the_threshold() -> None:
    for latents in (torch.zeros(4, 5), torch.zeros(0, 5)):
        assert float(learn_threshold(torch.tensor(0.3), latents, 7)) == pytest.approx(0.3)


def test_in_eval_mode_an_image_is_encoded_without_its_batch() -> None:
    sae, rows = example("batch_topk"), drawn(30, 6)
    in_a_batch = sae.encode(rows)
    sae.eval()
    whole = sae.encode(rows)
    torch.testing.assert_close(torch.cat([sae.encode(row[None]) for row in rows]), whole)
    pre = sae.pre_activations(rows)
    torch.testing.assert_close(whole, torch.where(pre > 0.7, pre, 0.0))
    assert not torch.equal(whole, in_a_batch)


def test_the_cut_is_zero_where_too_few_are_positive() -> None:
    assert float(batch_cut(-drawn(3, 4).abs(), 2)) == 0
    assert float(batch_cut(torch.zeros(0, 4), 2)) == 0


# -- jumprelu


def test_pseudo_derivatives_of_the_threshold() -> None:
    sae, rows = example("jumprelu"), drawn(12, 6)
    assert isinstance(sae, JumpReLU)
    epsilon, price = 0.4, 0.3
    pre, threshold = loop_pre(sae, rows), sae.threshold.detach().tolist()
    error = rows - sae(rows)[0].detach()
    expected = [0.0] * 9
    inside = 0
    for n, row in enumerate(pre):
        for latent, value in enumerate(row):
            theta = threshold[latent]
            kernel = float(abs((value - theta) / epsilon) < 0.5)
            inside += int(kernel)
            through = -2 * float(error[n] @ sae.decoder.detach()[:, latent])  # ∂loss/∂z
            gradient = through * -(theta / epsilon) * kernel - price / epsilon * kernel
            expected[latent] += gradient * theta / len(pre)  # by log θ
    assert inside > 5
    (found,) = torch.autograd.grad(objective(sae, rows, price)[0], [sae.log_threshold])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_price_does_not_move_the_encoder() -> None:
    sae, rows = example("jumprelu"), drawn(12, 6)
    trained = [sae.encoder, sae.decoder, sae.bias]
    free, priced = (torch.autograd.grad(objective(sae, rows, price)[0], trained) for price in (0.0, 5.0))
    for one, other in zip(free, priced, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("theta", [0.5, 1.0, 2.0])
def test_the_threshold_gets_the_gradient_of_the_expected_loss(theta: float) -> None:
    """For ``a`` uniform on 0 to 4, ``E loss = ∫₀^θ a²/4 + λ (4 − θ)/4``, whose slope ``(θ² − λ)/4`` ends at √λ."""
    price = 1.0
    sae: Any = make_sae("jumprelu", 1, 1, bandwidth=0.01).double()
    with torch.no_grad():
        sae.encoder.fill_(1)
        sae.decoder.fill_(1)
        sae.log_threshold.fill_(math.log(theta))
    rows = torch.linspace(0, 4, 400_001, dtype=torch.float64)[:, None]
    (found,) = torch.autograd.grad(objective(sae, rows, price)[0], [sae.log_threshold])
    assert float(found) / theta == pytest.approx((theta**2 - price) / 4, abs=2e-3)


# -- gated


def test_gated_latents_are_those_of_a_jumprelu() -> None:
    """As its authors show: the same projection both decides and measures, so there is one threshold."""
    sae, rows = example("gated"), drawn(50, 6)
    assert isinstance(sae, Gated)
    twin: Any = make_sae("jumprelu", 6, 9, bandwidth=1.0).double().eval()
    growth = sae.magnitude.exp()
    threshold = sae.magnitude_bias - growth * sae.bias
    with torch.no_grad():
        twin.encoder.copy_(growth[:, None] * sae.encoder)
        twin.bias.copy_(sae.magnitude_bias)
        twin.b_dec.copy_(sae.b_dec)
        twin.log_threshold.copy_(threshold.clamp_min(1e-12).log())
    torch.testing.assert_close(sae.encode(rows), twin.encode(rows))


def test_the_gate_is_taught_by_its_own_terms_only() -> None:
    sae: Any = example("gated")
    rows = drawn(12, 6)
    (decoder, gate, strength) = torch.autograd.grad(
        objective(sae, rows, 0.3)[0], [sae.decoder, sae.bias, sae.magnitude_bias]
    )
    latents = sae.encode(rows).detach()
    error = sae.decode(latents).detach() - rows
    # The frozen decoder gets nothing from the gate's reconstruction.
    torch.testing.assert_close(decoder, 2 * error.T @ latents / 12)
    torch.testing.assert_close(strength, ((2 * error @ sae.decoder.detach()) * (latents > 0)).mean(dim=0))
    pre = sae.pre_activations(rows).detach()
    own = sae.decode(pre.relu()).detach() - rows
    torch.testing.assert_close(gate, ((2 * own @ sae.decoder.detach() + 0.3) * (pre > 0)).mean(dim=0))


# -- matryoshka


def test_early_latents_are_told_what_later_ones_cannot_hide() -> None:
    sae, rows = example("matryoshka"), drawn(12, 6)
    assert isinstance(sae, Matryoshka)
    assert sae.sizes == [2, 4, 9]
    (with_prefixes,) = torch.autograd.grad(objective(sae, rows, 0.0)[0], [sae.decoder])
    plain = example("batch_topk")
    (without,) = torch.autograd.grad(objective(plain, rows, 0.0)[0], [plain.decoder])
    # Latents that are in no smaller prefix have the gradient that they have without any.
    torch.testing.assert_close(with_prefixes[:, 4:], without[:, 4:])
    assert not torch.allclose(with_prefixes[:, :4], without[:, :4])


def test_over_topk_each_image_has_its_own_budget() -> None:
    sae, rows = example("matryoshka", base="topk"), drawn(20, 6)
    torch.testing.assert_close(sae.encode(rows), example("topk").encode(rows))
    assert torch.equal(sae.encode(rows), sae.eval().encode(rows))


@pytest.mark.parametrize(("size", "sizes"), [(1, [1]), (2, [1, 2]), (16, [1, 2, 4, 8, 16])])
def test_prefixes_of_small_dictionaries(size: int, sizes: list[int]) -> None:
    assert make_sae("matryoshka", 4, size, k=1).sizes == sizes


# -- edges


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize(("rows", "size", "k"), [(1, 1, 1), (1, 9, 9), (7, 1, 1), (0, 9, 2)])
def test_at_the_edges_losses_and_gradients_are_finite(variant: str, rows: int, size: int, k: int) -> None:
    settings: dict[str, Any] = {"k": k} if variant in ("topk", "batch_topk", "matryoshka") else {}
    sae = example(variant, size=size, **settings)
    trained = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    loss, latents = objective(sae, drawn(rows, 6), 0.3)
    assert latents.shape == (rows, size)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, trained))
    if rows == 0:
        assert float(loss.detach()) == 0


@pytest.mark.parametrize("variant", [variant for variant in ALL if variant != "linear_l1"])
def test_with_all_latents_dead_only_b_dec_is_left(variant: str) -> None:
    sae, rows = example(variant), drawn(5, 6)
    with torch.no_grad():
        sae.bias.fill_(-100)
    loss, latents = objective(sae, rows, 0.3)
    loss = loss.detach()
    assert not latents.any()
    reconstructions = {"gated": 2, "matryoshka": 3}.get(variant, 1)
    assert float(loss) == pytest.approx(reconstructions * float((rows - sae.b_dec).square().sum(dim=1).mean()))
    if isinstance(sae, BatchTopK):
        assert float(learn_threshold(sae.threshold, latents, 0)) == pytest.approx(0.7)
