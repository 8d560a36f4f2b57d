"""What is computed for the few latents that fire is what is computed for all of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from salve.sae import SAE, make_sae, objective
from salve.sae.objective import Objective, step_loss
from salve.sae.sparse import SparseLatents, SparsePattern, encode_sparse, largest, pattern_of_indices, pattern_of_mask
from salve.sae.topk import SPARSE_RATIO
from tests.unit.sae_examples import drawn

SIZE, WIDTH = 192, 6
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("topk", {"k": 3}),
    ("batch_topk", {"k": 3}),
    ("matryoshka", {"k": 3, "prefixes": [0.25, 0.5, 1.0]}),
    ("matryoshka", {"k": 3, "prefixes": [0.25, 0.5, 1.0], "base": "topk"}),
]


def untied(variant: str, settings: dict[str, Any]) -> SAE:
    """Large enough a dictionary for its k, in train mode, with ``b_dec`` trained."""
    sae = make_sae(variant, WIDTH, SIZE, torch.Generator().manual_seed(0), **settings).double()
    with torch.no_grad():
        sae.encoder.add_(0.3 * drawn(SIZE, WIDTH, seed=2))
        sae.bias.copy_(torch.linspace(-0.5, 0.2, SIZE))
        sae.b_dec.copy_(torch.linspace(-1, 1, WIDTH))
    sae.learn_b_dec()
    return sae


@pytest.mark.parametrize(("variant", "settings"), VARIANTS)
@pytest.mark.parametrize("dead", [0, 2, 40])
@pytest.mark.parametrize("rows", [1, 20])
def test_loss_latents_and_gradients_are_those_of_the_whole_dictionary(
    variant: str, settings: dict[str, Any], dead: int, rows: int
) -> None:
    """The oracle computes with every latent, as an ensemble does. Few, some or more latents than AuxK uses are dead."""
    sae, activations = untied(variant, settings), drawn(rows, WIDTH, seed=3)
    assert sae.run_alone(activations).sparse is not None
    mask = torch.arange(SIZE) < dead
    loss, latents = objective(sae, activations, 0.0, mask, auxk=5)
    expected, of_all = Objective(sae, auxk=5)(activations, torch.tensor(0.0), mask)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(latents, of_all)
    assert latents.any()
    found = torch.autograd.grad(loss, list(sae.parameters()))
    for name, gradient, right in zip(
        dict(sae.named_parameters()), found, torch.autograd.grad(expected, list(sae.parameters())), strict=True
    ):
        torch.testing.assert_close(gradient, right, msg=f"the gradient of {name} differs")
        assert gradient.any(), name


def test_a_price_of_latents_is_one_for_all() -> None:
    sae, activations = untied("topk", {"k": 3}), drawn(20, WIDTH, seed=3)
    plain, priced = (objective(sae, activations, price)[0] for price in (0.0, 0.5))
    latents = sae.encode(activations)
    torch.testing.assert_close(priced - plain, 0.5 * latents.abs().sum(dim=1).mean())
    assert priced.requires_grad


def test_small_dictionaries_and_measurement_look_at_every_latent() -> None:
    activations = drawn(4, WIDTH)
    assert make_sae("topk", WIDTH, 3 * SPARSE_RATIO, k=3).double().run_alone(activations).sparse is not None
    assert make_sae("topk", WIDTH, 3 * SPARSE_RATIO - 1, k=3).double().run_alone(activations).sparse is None
    assert untied("topk", {"k": 3}).eval().run_alone(activations).sparse is None


def sparse_of(latents: Tensor) -> SparseLatents:
    return SparseLatents(pattern_of_mask(latents != 0), latents[latents != 0])


def test_rows_with_no_latent_and_latents_in_no_row() -> None:
    latents = torch.tensor([[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, -3.0, 0.0, 0.5]])
    sparse, decoder = sparse_of(latents), drawn(WIDTH, 4, dtype=torch.float32)
    torch.testing.assert_close(sparse.decode(decoder), latents @ decoder.T)
    assert torch.equal(sparse.dense(latents), latents)
    torch.testing.assert_close(sparse.within(1, 3).decode(decoder), latents[:, 1:3] @ decoder[:, 1:3].T)
    nothing = sparse_of(torch.zeros(2, 4))
    assert torch.equal(nothing.decode(decoder), torch.zeros(2, WIDTH))


def test_the_gradient_of_chosen_pre_activations() -> None:
    """Finite differences, with a latent that two rows share and one that none has."""
    activations, encoder, bias = (drawn(*shape).requires_grad_() for shape in ((3, WIDTH), (4, WIDTH), (4,)))
    indices = torch.tensor([[0, 2], [2, 3], [2, 0]])

    def values(activations: Tensor, encoder: Tensor, bias: Tensor) -> Tensor:
        pre = (activations @ encoder.T + bias).detach()
        return encode_sparse(pre, activations, encoder, bias, pattern_of_indices(indices, 4)).values

    assert torch.equal(
        values(activations, encoder, bias), (activations @ encoder.T + bias).gather(1, indices).flatten()
    )
    # The values come from pre-activations that are detached, which differences see and gradients do not need.
    assert torch.autograd.gradcheck(values, (activations, encoder, bias))


@pytest.mark.parametrize("size", [4, 2**15 + 3])
def test_sums_over_pairs_are_products_with_a_dense_matrix(size: int) -> None:
    """One dictionary is too large for its columns to be sorted as 16-bit numbers."""
    columns = torch.tensor([size - 1, 0, 2, size - 1, 0])
    pattern, values = SparsePattern(torch.tensor([0, 2, 2, 5]), columns, size), drawn(5)
    dense = torch.zeros(3, size, dtype=torch.float64)
    for row, column, value in zip([0, 0, 2, 2, 2], columns.tolist(), values, strict=True):
        dense[row, column] = value
    of_latents, of_rows = drawn(size, WIDTH), drawn(3, WIDTH, seed=2)
    torch.testing.assert_close(pattern.sum_by_row(of_latents, values), dense @ of_latents)
    torch.testing.assert_close(pattern.sum_by_latent(of_rows, values), dense.T @ of_rows)


@pytest.mark.parametrize("columns", [5, 40, 63, 64, 101, 1024])
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threads", [0, 1000])  # by torch, and by NumPy
def test_the_largest_are_those_that_sorting_puts_first(
    columns: int, k: int, ties: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salve.sae.sparse.THREADS", threads)
    values = drawn(50, columns, dtype=torch.float32)
    if ties:
        values = values.round()
    found = largest(values, k)
    assert all(len(set(row)) == k for row in found.tolist())
    for row, chosen in zip(values.tolist(), values.gather(1, found).tolist(), strict=True):
        assert sorted(chosen, reverse=True) == sorted(row, reverse=True)[:k]


def test_latents_are_only_made_dense_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    dense = SparseLatents.dense

    def noted(self: SparseLatents, like: Tensor) -> Tensor:
        made.append(like)
        return dense(self, like)

    monkeypatch.setattr(SparseLatents, "dense", noted)
    loss, output = step_loss(untied("topk", {"k": 3}), drawn(20, WIDTH, seed=3), 0.0)
    loss.backward()
    assert not made
    assert output.latents.shape == (20, SIZE)
    assert made
