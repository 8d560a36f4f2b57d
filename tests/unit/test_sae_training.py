"""How rows reach a training, and what its precision changes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from salve.activations import ActivationsData, Block, Schedule, WholeData
from salve.activations import rows as rows_module
from salve.metrics import fraction_of_variance_explained
from salve.sae import SAE, Member, SAEEnsemble, SparseAutoencoder, learning_rate_factor, make_sae, objective
from salve.sae.topk import SPARSE_RATIO
from tests.unit.sae_examples import fit

WIDTH, BATCH = 16, 8
#: Variant, dictionary size, λ and settings. Some are large enough for products with the few latents that fire.
SAES: list[tuple[str, int, float, dict[str, Any]]] = [
    ("linear_l1", 24, 0.3, {}),
    ("relu_l1", 24, 0.3, {}),
    ("gated", 24, 0.3, {}),
    ("jumprelu", 24, 0.2, {}),
    ("topk", 24, 0.0, {"k": 2}),
    ("topk", SPARSE_RATIO * 2, 0.0, {"k": 2}),
    ("batch_topk", SPARSE_RATIO * 2, 0.0, {"k": 2}),
]


def data_of(rows: Tensor, batch: int = BATCH, epochs: float = 1, seed: int = 3) -> ActivationsData:
    schedule = Schedule.of_epochs(len(rows), batch, epochs)
    return ActivationsData(rows, rows[:64], torch.zeros(min(64, len(rows)), dtype=torch.long), schedule, seed)


def numbered(count: int) -> Tensor:
    """Rows that say which they are."""
    return torch.arange(count, dtype=torch.float32)[:, None].expand(count, WIDTH).contiguous()


def blocks(data: ActivationsData) -> list[Block]:
    return list(data.train_dataloader())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches and a bit fit into a block."""
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", (2 * BATCH + 3) * WIDTH * 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("count", [1, 7, 8, 16, 35, 100])
def test_batches_are_whole_and_take_every_row_once_in_a_pass(count: int) -> None:
    got = blocks(data_of(numbered(count), epochs=4))
    size = min(BATCH, count)
    assert {rows for block in got for rows in block.sizes} == {size}
    rows = torch.cat([block.rows[:, 0] for block in got])
    assert 4 * count <= len(rows) < 4 * count + size
    passes = rows[: 4 * count].reshape(4, count)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(count).float().expand(4, count))
    assert count == 1 or not torch.equal(passes[0], passes[1])
    # Another seed, another order.
    other = torch.cat([block.rows[:, 0] for block in blocks(data_of(numbered(count), epochs=4, seed=4))])
    assert count == 1 or not torch.equal(rows, other)


@pytest.mark.parametrize(("rows", "batch", "steps", "parts"), [(35, 8, 20, 6), (7, 100, 9, 4), (1000, 8, 5, 5)])
def test_the_parts_of_a_training_are_the_training(rows: int, batch: int, steps: int, parts: int) -> None:
    schedule = Schedule(rows, batch, steps)
    pieces = [schedule.part(number, parts) for number in range(parts)]
    assert [step for piece in pieces for step in piece] == list(range(steps))
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    for piece in pieces:
        assert all(schedule.part_after(step, parts) == range(step, piece.stop) for step in piece)
    assert not schedule.part_after(steps, parts)
    order = schedule.order(5, range(steps))
    assert len(order) == steps * min(batch, rows)
    assert torch.equal(torch.cat([schedule.order(5, piece) for piece in pieces]), order)


def test_the_pace_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (n + 1) for n in range(10)])
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == pytest.approx([(20 - n) / 20 for n in range(20)])
    assert [learning_rate_factor(step, 3, 0, 0) for step in range(3)] == [1.0] * 3
    assert 0 < learning_rate_factor(0, 1) <= 1


def test_a_training_goes_at_its_pace_and_ends_where_it_should(planted: Tensor) -> None:
    rates: list[float] = []
    plain = SparseAutoencoder._loss

    class Watched(SparseAutoencoder):
        def _loss(self, activations: Tensor) -> Tensor:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
            return plain(self, activations)

    data = data_of(planted, epochs=0.6)  # 39 steps: it stops inside a pass
    sae = make_sae("relu_l1", WIDTH, 12, torch.Generator().manual_seed(0))
    fit(Watched(sae, 0.3, 1e-2, head(), warmup=0.2, decay=0.5), 7, datamodule=data)
    assert rates == pytest.approx([1e-2 * learning_rate_factor(step, 39, 0.2, 0.5) for step in range(39)])


@pytest.mark.parametrize(
    ("rows", "steps", "times", "after", "patience"),
    [
        (600, 2000, 5, {200, 400, 600, 800, 1000}, 600),  # every image was seen, many times
        (10**6, 2000, 5, {200, 400, 600, 800, 1000}, 200 * 256),  # only what was seen since the last time can tell
        (600, 3, 5, {1}, 256),
    ],
)
def test_when_dead_latents_begin_anew(rows: int, steps: int, times: int, after: set[int], patience: int) -> None:
    schedule = Schedule(rows, 256, steps)
    assert schedule.restarts(times) == after
    assert schedule.patience(times) == patience
    assert schedule.restarts(0) == set()
    assert schedule.patience() == min(rows, max(1, steps // 20) * 256)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("count", [1, 16, 35])
def test_ranks_share_each_batch(count: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_of(numbered(count), batch=7)
    whole = [batch for block in blocks(data) for batch in block.rows.split(block.sizes)]
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr(rows_module, "rank_and_world_size", lambda rank=rank: (rank, ranks))
        parts.append([batch for block in blocks(data) for batch in block.rows.split(block.sizes)])
    for batch, *shares in zip(whole, *parts, strict=True):
        for rank, share in enumerate(shares):
            assert torch.equal(share, batch[rank::ranks])


def test_a_block_holds_at_least_a_batch_and_no_more_than_it_may(small_blocks: None) -> None:
    assert [len(block.rows) for block in blocks(data_of(numbered(35)))] == [16, 16, 8]
    assert [len(block.rows) for block in blocks(data_of(numbered(35), batch=30))] == [30, 30]


def head() -> nn.Linear:
    return nn.Linear(WIDTH, 2).requires_grad_(False)


def test_any_loader_of_batches_trains_as_blocks_do(planted: Tensor) -> None:
    """A Lightning user's own loader, one batch at a time, at the same pace over as many steps."""
    saes = [make_sae("relu_l1", WIDTH, 12, torch.Generator().manual_seed(0)) for _ in range(2)]
    data = data_of(planted)
    fit(SparseAutoencoder(saes[0], 0.3, 1e-2, head()), 2, datamodule=data)
    rows = planted[data.schedule.order(data.seed, range(data.schedule.steps))]
    labelled = torch.utils.data.TensorDataset(rows, torch.zeros(len(rows)))
    fit(SparseAutoencoder(saes[1], 0.3, 1e-2, head()), 1, DataLoader(labelled, BATCH), data.val_dataloader())
    torch.testing.assert_close(saes[0].state_dict(), saes[1].state_dict())


@pytest.fixture
def planted() -> Tensor:
    """``[N, M]``: two of twelve directions at a time, and noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, WIDTH, generator=generator)
    codes = torch.zeros(512, 12)
    codes.scatter_(1, torch.rand(512, 12, generator=generator).topk(2, dim=1).indices, 1.0)
    rows = codes @ directions + 0.05 * torch.randn(512, WIDTH, generator=generator)
    return rows / rows.square().mean().sqrt()


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of the pre-activations that are computed."""
    seen: list[torch.dtype] = []
    plain = SAE.pre_activations

    def spy(self: SAE, activations: Tensor) -> Tensor:
        pre = plain(self, activations)
        seen.append(pre.dtype)
        return pre

    monkeypatch.setattr(SAE, "pre_activations", spy)
    return seen


def fve(sae: SAE, rows: Tensor) -> float:
    with torch.no_grad():
        return float(fraction_of_variance_explained(rows, sae.eval()(rows)[0]))


@pytest.mark.parametrize(
    ("variant", "size", "sparsity", "settings"), [*SAES, ("matryoshka", SPARSE_RATIO * 2, 0.0, {"k": 2})]
)
@pytest.mark.slow
def test_bf16_trains_float32_weights_to_what_float32_does(
    variant: str, size: int, sparsity: float, settings: dict[str, Any], planted: Tensor, casts: list[torch.dtype]
) -> None:
    def train(precision: Any, together: bool) -> SAE:
        casts.clear()
        sae = make_sae(variant, WIDTH, size, torch.Generator().manual_seed(0), **settings)
        options: dict[str, Any] = {"precision": precision}
        torch.manual_seed(0)
        if together:
            schedule = Schedule.of_epochs(len(planted), 32, 6)
            module = SAEEnsemble([Member(sae, sparsity, 0)], schedule, 1e-2, head(), **options)
            fit(module, 2, datamodule=WholeData(planted, planted[:64], torch.zeros(64, dtype=torch.long), schedule))
            return module.trained(0)[0]
        fit(SparseAutoencoder(sae, sparsity, 1e-2, head(), **options), 2, datamodule=data_of(planted, 32, 6))
        return sae

    exact = train("float32", False)
    assert set(casts) == {torch.float32}
    reached = fve(exact, planted)
    assert reached > 0.5
    for together in (False, True):
        sae = train("bf16", together)
        if not together:  # in steps; what is measured is float32
            assert set(casts) == {torch.bfloat16, torch.float32}
        assert not torch.allclose(sae.decoder, exact.decoder, atol=1e-6)
        assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}
        assert fve(sae, planted) > reached - 0.1  # seeds of the top-k family differ by as much, either way


@pytest.mark.parametrize(("variant", "size", "sparsity", "settings"), SAES)
def test_a_bf16_gradient_points_where_the_float32_one_does(
    variant: str, size: int, sparsity: float, settings: dict[str, Any], planted: Tensor
) -> None:
    sae = make_sae(variant, WIDTH, size, torch.Generator().manual_seed(0), **settings)
    gradients = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss, _ = objective(sae, planted, sparsity)
        trained = {name: value for name, value in sae.named_parameters() if value.requires_grad}
        gradients.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
    for name, exact in gradients[0].items():
        found = gradients[1][name]
        assert found.dtype == torch.float32
        assert float(torch.cosine_similarity(found.flatten(), exact.flatten(), dim=0)) > 0.99, name
        assert float(found.norm() / exact.norm()) == pytest.approx(1, rel=0.03), name
