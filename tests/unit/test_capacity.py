"""Capacity: sequences of gates against their product and the closed form, and what the gates say of the others."""

from itertools import permutations

import pytest
import torch
from torch import Tensor

from salve.backbones.tail import LinearTail
from salve.editing import edited_logits, gate
from salve.editing.capacity import capacity, closed_shares, kept_by_gates, untouched
from salve.types import UserError


@pytest.fixture(scope="module")
def edits() -> tuple[Tensor, Tensor]:
    """Contributions ``[4, 7]`` and gates ``[4, 7]`` of four edits, some channels closed, float64."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    return vectors, torch.stack([gate(vectors[k], alpha) for k, alpha in enumerate((0.2, 0.5, 0.9, 0.4))])


def test_edits_in_sequence_are_their_product_in_any_order(edits: tuple[Tensor, Tensor]) -> None:
    """The weights scaled edit after edit, against the closed form at the linear tail, Σ_j w_ij a_j Π_k s_kj."""
    _, gates = edits
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(4, 7, generator=generator).double(), torch.randn(4, generator=generator).double()
    activations = torch.rand(5, 7, generator=generator).double()
    expected = torch.stack(
        [
            torch.stack([sum(weight[i, j] * a[j] * gates[:, j].prod() for j in range(7)) + bias[i] for i in range(4)])
            for a in activations
        ]
    )
    for order in permutations(range(4)):
        edited = weight.clone()
        for k in order:
            edited = edited * gates[k]
        torch.testing.assert_close(LinearTail(edited, bias)(activations), expected, rtol=1e-12, atol=1e-12)


def test_a_joint_edit_at_the_same_strength_is_the_sequence(edits: tuple[Tensor, Tensor]) -> None:
    vectors, _ = edits
    tail = LinearTail(torch.eye(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64))
    activations = torch.rand(3, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    one_by_one = activations.clone()
    for vector in vectors:
        one_by_one = one_by_one * gate(vector, 0.6)
    torch.testing.assert_close(edited_logits(tail, activations, vectors, [0.6])[0], one_by_one, rtol=1e-12, atol=0)


def test_closed_shares_by_hand() -> None:
    # Class 0 closes channel 0; class 1 half of 0 and all of 1; class 2 channel 2; class 3 nothing.
    gates = torch.tensor([[0, 1, 1], [0.5, 0, 1], [1, 1, 0.2], [1, 1, 1.0]]).double()
    shares = closed_shares(gates, [1, 2])
    nothing = torch.nan
    torch.testing.assert_close(
        shares,
        # 0.5 / 1 of class 0; class 1's own edit; class 2 by its own alone.
        torch.tensor([[0, 0, 0, nothing], [0.5, 1, 0, nothing], [0.5, 1, 1, nothing]]).double(),
        equal_nan=True,
    )
    assert kept_by_gates(gates, [1, 2]).tolist() == [[True] * 4, [True, False, True, True], [True, False, False, True]]
    with pytest.raises(UserError, match="suppress"):
        closed_shares(gates + 0.1, [0])


def test_what_edits_close_only_adds_up(edits: tuple[Tensor, Tensor]) -> None:
    _, gates = edits
    for order in permutations(range(4)):
        shares = closed_shares(gates, order)
        assert (shares.diff(dim=0) >= -1e-12).all()
        torch.testing.assert_close(shares[-1], closed_shares(gates, range(4))[-1])
        # After its own edit as much is closed as that closes, or more.
        assert (shares[-1] >= 1 - 1e-12).all()


def test_capacity_by_hand() -> None:
    order = [3, 0, 1]
    assert untouched(4, order).sum(dim=1).tolist() == [4, 3, 2, 1]
    kept = torch.ones(4, 4, dtype=torch.bool)
    assert capacity(kept, order) == 3
    kept[1:, 2] = False  # one of the three others
    kept[2, 0] = False  # edited by then, so it does not count
    # Of classes 1 and 2 one is kept after two edits; after three class 2 is left alone, and lost.
    assert capacity(kept, order) == 2
    kept[1, 1] = False  # two of three, though it is back later
    assert capacity(kept, order) == 0
    assert capacity(torch.ones(3, 2, dtype=torch.bool), [0, 1]) == 2
