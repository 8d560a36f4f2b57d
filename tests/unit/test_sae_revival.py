"""Dead latents: who counts as dead, AuxK and resampling."""

import copy
import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from salve.activations import ActivationsData, Schedule
from salve.sae import SAE, SparseAutoencoder, auxk_losses, make_sae, objective, resample
from salve.sae.revival import AUXILIARY, draw_rows, update_rows_since_fired
from salve.types import UserError
from tests.unit.sae_examples import drawn, example, fit


def test_rows_since_a_latent_fired_are_counted() -> None:
    fires = torch.rand(30, 5, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.0, 0.02, 0.1, 0.5, 1.0])
    rows_since_fired = torch.zeros(5, dtype=torch.long)
    for batch in fires.float().split(4):
        rows_since_fired = update_rows_since_fired(rows_since_fired, batch, torch.ones(len(batch), 1), 0.0)
    for latent, count in enumerate(rows_since_fired.tolist()):
        batches = [bool(batch[:, latent].any()) for batch in fires.split(4)]
        rows = [len(batch) for batch in fires.split(4)]
        since = len(batches) - 1 - batches[::-1].index(True) if any(batches) else -1
        assert count == sum(rows[since + 1 :])


# -- AuxK


@pytest.mark.parametrize("variant", ["topk", "batch_topk", "matryoshka"])
def test_auxk_is_the_error_that_the_largest_dead_latents_leave(variant: str) -> None:
    sae, rows = example(variant), drawn(7, 6)
    dead = torch.tensor([latent in (1, 4, 5, 8) for latent in range(9)])
    output = sae.run(rows)
    losses = auxk_losses(sae, rows, output, dead, 2)
    for n, found in enumerate(losses.tolist()):
        pre = output.pre[n].tolist()
        chosen = sorted((1, 4, 5, 8), key=lambda latent: -pre[latent])[:2]
        error = [(rows[n, j] - output.reconstruction[n, j]).item() for j in range(6)]
        guess = [sum(max(pre[i], 0.0) * sae.decoder[j, i].item() for i in chosen) for j in range(6)]
        assert found == pytest.approx(sum((e - g) ** 2 for e, g in zip(error, guess, strict=True)))
    loss, _ = objective(sae, rows, 0.0, dead, auxk=2)
    torch.testing.assert_close(loss, objective(sae, rows, 0.0)[0] + losses.mean() / 32)
    assert AUXILIARY == 1 / 32


def test_auxk_teaches_the_dead_and_nobody_else() -> None:
    sae, rows = example("topk"), drawn(40, 6)
    dead = torch.tensor([latent % 2 == 0 for latent in range(9)])
    trained = [sae.encoder, sae.bias, sae.decoder]
    plain = torch.autograd.grad(objective(sae, rows, 0.0)[0], trained)
    helped = torch.autograd.grad(objective(sae, rows, 0.0, dead, auxk=3)[0], trained)
    for before, after, axis in zip(plain, helped, (0, 0, 1), strict=True):
        difference = (after - before).movedim(axis, 0).reshape(9, -1).abs().sum(dim=1)
        assert not difference[~dead].any()
        assert (difference[dead] > 0).all()


@pytest.mark.parametrize("count", [2, 9])
def test_auxk_with_fewer_dead_than_asked_for_and_with_none(count: int) -> None:
    sae, rows = example("topk"), drawn(7, 6)
    one = torch.tensor([latent == 4 for latent in range(9)])
    output = sae.run(rows)
    alone = auxk_losses(sae, rows, output, one, 1)
    torch.testing.assert_close(auxk_losses(sae, rows, output, one, count), alone)
    assert not auxk_losses(sae, rows, output, ~one & one, count).any()


# -- resampling


def adam_of(sae: SAE, rows: Tensor) -> torch.optim.Adam:
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=1e-3)
    objective(sae, rows, 0.1)[0].backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("variant", ["linear_l1", "relu_l1", "gated"])
def test_resampling_restarts_the_dead_and_nobody_else(variant: str) -> None:
    sae, rows = example(variant), drawn(50, 6)
    optimizer = adam_of(sae, rows)
    dead = torch.tensor([latent in (2, 7) for latent in range(9)])
    errors = torch.nn.functional.normalize(rows - sae(rows)[0].detach(), dim=1)
    before, history = copy.deepcopy(sae.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    done = resample(sae, optimizer, rows, dead, 0.1, torch.Generator().manual_seed(0))
    assert done == 2
    for name, tensor in sae.state_dict().items():
        if name == "b_dec":
            assert torch.equal(tensor, before[name])
            continue
        axis = 1 if name == "decoder" else 0
        now, then = tensor.movedim(axis, 0), before[name].movedim(axis, 0)
        assert torch.equal(now[~dead], then[~dead])
        if name not in ("decoder", "encoder"):
            assert not now[dead].any()
    directions = sae.decoder.detach().T[dead]
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert all(((errors @ direction) > 1 - 1e-9).any() for direction in directions)
    strength = before["encoder"][~dead].norm(dim=1).mean()
    torch.testing.assert_close(sae.encoder.detach()[dead], 0.2 * strength * directions)
    names = [name for name, parameter in sae.named_parameters() if parameter.requires_grad]
    for place, name in enumerate(names):
        for moment in ("exp_avg", "exp_avg_sq"):
            now, then = (
                state[place][moment].movedim(1 if name == "decoder" else 0, 0)
                for state in (optimizer.state_dict()["state"], history)
            )
            assert not now[dead].any()
            assert torch.equal(now[~dead], then[~dead])


def test_rows_are_drawn_by_the_square_of_their_loss() -> None:
    """Losses 1, 4 and 0, so chances 1 : 16 : 0."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    counts = torch.zeros(3)
    for seed in range(400):
        sae = make_sae("relu_l1", 2, 1)
        with torch.no_grad():
            sae.bias.fill_(-10)
        optimizer = torch.optim.Adam(sae.parameters())
        generator = torch.Generator().manual_seed(seed)
        assert resample(sae, optimizer, rows, torch.tensor([True]), 0.0, generator) == 1
        counts += torch.stack([(sae.decoder.detach()[:, 0] == direction).all() for direction in rows.sign()])
    assert counts.sum() == 400
    assert counts[2] == 0
    expected = 400 / 17
    assert abs(float(counts[0]) - expected) < 4 * math.sqrt(expected * 16 / 17)


def test_no_more_begin_anew_than_are_alive() -> None:
    sae, rows = example("relu_l1"), drawn(50, 6)
    optimizer = adam_of(sae, rows)
    before = sae.decoder.detach().clone()
    dead = torch.tensor([latent > 1 for latent in range(9)])
    assert resample(sae, optimizer, rows, dead, 0.1, torch.Generator().manual_seed(0)) == 2
    changed = (sae.decoder.detach() != before).any(dim=0)
    assert int(changed.sum()) == 2
    assert not changed[~dead].any()


def test_with_no_loss_or_nobody_dead_nothing_happens() -> None:
    sae, rows = example("relu_l1"), drawn(10, 6)
    optimizer = adam_of(sae, rows)
    before = copy.deepcopy(sae.state_dict())
    none, generator = torch.zeros(9, dtype=torch.bool), torch.Generator()
    assert resample(sae, optimizer, rows, none, 0.1, generator) == 0
    assert resample(sae, optimizer, rows * math.nan, ~none, 0.1, generator) == 0
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name])


# -- in training


@pytest.fixture
def planted() -> Tensor:
    """``[N, M]``: two of twelve orthogonal directions at a time."""
    generator = torch.Generator().manual_seed(0)
    which = torch.rand(512, 12, generator=generator).topk(2, dim=1).indices
    codes = torch.zeros(512, 12).scatter(1, which, 1 + torch.rand(512, 2, generator=generator))
    return codes * (12 / codes.square().sum(dim=1).mean()).sqrt()


def train(sae: SAE, rows: Tensor, epochs: int, sparsity: float, **revival: Any) -> int:
    """How many latents are dead on the rows in the end."""
    pl.seed_everything(0, verbose=False)
    module = SparseAutoencoder(sae, sparsity, 1e-2, head=lambda a: a, patience=len(rows), **revival)
    schedule = Schedule.of_epochs(len(rows), 64, epochs)
    data: Any = ActivationsData(rows, rows[:64], torch.zeros(64, dtype=torch.long), schedule)
    fit(module, epochs, datamodule=data, limit_val_batches=0)
    sae.eval()
    return int((sae.encode(rows) == 0).all(dim=0).sum())


@pytest.mark.parametrize(
    ("variant", "settings", "sparsity", "revival"),
    [
        ("relu_l1", {}, 0.1, {"resample": 2}),
        ("gated", {}, 0.1, {"resample": 2}),
        ("topk", {"k": 2}, 0.0, {"auxk": 6}),
        ("batch_topk", {"k": 2}, 0.0, {"auxk": 6}),
        ("matryoshka", {"k": 2}, 0.0, {"auxk": 6}),
    ],
)
@pytest.mark.slow
def test_the_dead_come_back(
    variant: str, settings: dict[str, int], sparsity: float, revival: dict[str, int], planted: Tensor
) -> None:
    def fresh() -> SAE:
        sae = make_sae(variant, 12, 12, torch.Generator().manual_seed(0), **settings)
        with torch.no_grad():
            if "resample" in revival:
                sae.bias[6:] = -30
            else:  # weaker than the others everywhere, so never among the largest
                sae.encoder[6:] *= 0.01
        return sae

    left = train(fresh(), planted, 12, sparsity)
    assert left >= 2
    assert train(fresh(), planted, 12, sparsity, **revival) <= left // 2


def test_dead_needs_a_number_of_rows() -> None:
    sae = make_sae("topk", 4, 4, k=1)
    with pytest.raises(UserError, match="patience=0"):
        SparseAutoencoder(sae, 0.0, 1e-3, head=lambda a: a, auxk=2)


@pytest.mark.parametrize("replacement", [True, False])
def test_more_rows_than_torch_draws_from_are_drawn_by_their_weights(
    replacement: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salve.sae.revival._MOST_WEIGHTS", 3)
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0]).double()
    generator, times = torch.Generator().manual_seed(0), 4000
    first = torch.bincount(
        torch.stack([draw_rows(weights, 2, replacement, generator)[0] for _ in range(times)]), minlength=4
    )
    torch.testing.assert_close(first / times, (weights / weights.sum()).float(), rtol=0, atol=0.03)
    assert first[0] == 0
    if not replacement:
        pairs = torch.stack([draw_rows(weights, 2, False, generator) for _ in range(200)])
        assert (pairs[:, 0] != pairs[:, 1]).all()
