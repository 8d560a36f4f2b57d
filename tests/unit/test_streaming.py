"""Activations that stay on disk: read as a tensor is, shuffled well, and an SAE of them as good as one in memory."""

import logging
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salve.activations import ActivationsData, Captured, Schedule, Shards, load_captured, shards
from salve.activations.capture import capture
from salve.activations.rows import StreamedBatches, rows_loader
from salve.artifacts import save_tensors
from salve.backbones import Site
from salve.backbones.cut import Cut
from salve.backbones.site import Reader
from salve.distributed import RunBlocks
from salve.sae import SAE, make_sae, resample
from salve.stages import StageContext, train_sae, train_saes
from salve.types import UserError
from tests.unit.test_sae_ensemble import CLASSES, SETTINGS, Die, Killed, SmallContext, context_and_inputs, trainer

WIDTH = 12


def write(folder: Path, rows: Tensor, labels: Tensor, shard: int, split: str = "train") -> None:
    parts = zip(rows.split(shard), labels.split(shard), strict=True)
    for number, (some, theirs) in enumerate(parts):
        save_tensors(folder / f"{split}-{number:05d}.safetensors", {"activations": some, "labels": theirs})


def drawn(rows: int, width: int = WIDTH, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def by_class(rows: int) -> tuple[Tensor, Tensor]:
    """``[N, M]`` and labels ``[N]``, class after class: the class's direction, two of six others, and noise."""
    generator = torch.Generator().manual_seed(rows)
    directions, features = (torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (CLASSES, 6))
    labels = torch.arange(rows) * CLASSES // rows
    which = torch.rand(rows, 6, generator=generator).topk(2, dim=1).indices
    codes = torch.zeros(rows, 6).scatter(1, which, 1.0)
    return 2 * directions[labels] + codes @ features + 0.1 * torch.randn(rows, WIDTH, generator=generator), labels


# -- rows on disk


@pytest.mark.parametrize(("count", "shard", "width"), [(12, 5, 3), (1, 5, 1), (10, 5, 2), (7, 1, 4)])
def test_shards_give_the_rows_of_the_tensor_that_they_hold(tmp_path: Path, count: int, shard: int, width: int) -> None:
    rows, labels = drawn(count, width), torch.arange(count)
    write(tmp_path, rows, labels, shard)
    found = load_captured(tmp_path, "train")
    stored: Any = found.rows
    assert (len(found), len(stored), stored.shape) == (count, count, rows.shape)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.activations, rows)
    generator = torch.Generator().manual_seed(0)
    for indices in (torch.randint(count, (40,), generator=generator), torch.tensor([count - 1]), torch.arange(0)):
        assert torch.equal(stored[indices], rows[indices])
    for part in (slice(None), slice(2, 6), slice(-3, None), slice(4, 4), slice(0, count + 5)):
        assert torch.equal(stored[part], rows[part])
    for block, expected in zip(stored.split(4), rows.split(4), strict=True):
        assert torch.equal(block, expected)
    assert torch.equal(stored.scaled(3.0)[:], rows / 3.0)
    assert torch.equal(stored[:], rows)  # as they were
    assert torch.equal(pickle.loads(pickle.dumps(stored))[:], rows)


@pytest.mark.parametrize("index", [-1, 7])
def test_a_row_that_is_not_there_is_refused(tmp_path: Path, index: int) -> None:
    write(tmp_path, drawn(7), torch.arange(7), 3)
    with pytest.raises(IndexError, match=f"row {index} is not in 0 to 6"):
        load_captured(tmp_path, "train").rows[torch.tensor([0, index])]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_files_are_mapped_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mapped() -> int:
        return len(
            {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line}
        )

    write(tmp_path, drawn(90), torch.arange(90), 10)
    at_once: list[int] = []

    class Watched:
        def __init__(self, path: Path, framework: str) -> None:
            self.file = plain(path, framework)

        def __enter__(self) -> Any:
            opened = self.file.__enter__()
            opened.get_tensor("labels")
            at_once.append(mapped())
            return opened

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

    plain = shards.safe_open
    found = load_captured(tmp_path, "train")
    assert mapped() == 0  # the labels do not hold on to their files
    monkeypatch.setattr(shards, "safe_open", Watched)
    kept = found.rows[torch.arange(90).flip(0)]
    assert mapped() == 0
    assert at_once == [1] * 9
    assert len(kept) == 90


# -- their order in a training


@pytest.mark.parametrize(
    ("n", "size", "block", "run"), [(100, 8, 24, 5), (96, 8, 96, 5), (7, 8, 8, 3), (1, 1, 1, 1), (30, 4, 8, 50)]
)
def test_every_row_comes_once_in_an_epoch_in_whole_batches(n: int, size: int, block: int, run: int) -> None:
    order = RunBlocks(n, size, block, run)
    torch.manual_seed(3)
    first, second = list(order), list(order)
    torch.manual_seed(3)
    again = list(order)
    rows = [torch.cat([batch for part in epoch for batch in part]) for epoch in (first, second, again)]
    assert len(first) == len(order) == -(-n // block)
    assert [len(batch) for part in first for batch in part] == [len(batch) for batch in torch.arange(n).split(size)]
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in rows)
    assert torch.equal(rows[0], rows[2])
    assert n == 1 or not torch.equal(rows[0], rows[1])


def test_a_block_needs_few_places_of_the_disk() -> None:
    for part in RunBlocks(1000, 10, 100, 20):
        rows = torch.cat(part).sort().values
        assert int((rows.diff() > 1).sum()) + 1 <= 100 // 20 + 2  # the block's ends may cut a run in two


@pytest.mark.parametrize(("n", "steps", "block"), [(100, 40, 24), (31, 3, 16), (5, 7, 8)])
def test_a_training_reads_whole_batches_pass_after_pass(n: int, steps: int, block: int) -> None:
    """A schedule over rows on disk; 31 rows in 3 steps stop inside a pass, 5 are fewer than a batch."""
    rows, schedule = torch.arange(n)[:, None].float().expand(n, WIDTH), Schedule(n, 8, steps)
    data = ActivationsData(rows, rows, torch.zeros(n, dtype=torch.long), schedule, 4, block)
    loads = list(data.train_dataloader())
    assert {size for load in loads for size in load.sizes} == {min(8, n)}
    assert max(len(load.rows) for load in loads) <= block
    seen = torch.cat([load.rows[:, 0] for load in loads])
    assert len(seen) == steps * min(8, n)
    for one in seen.split(n):
        assert len(one.unique()) == len(one)
    again = torch.cat([load.rows[:, 0] for load in data.train_dataloader()])
    assert torch.equal(again, seen)


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_ranks_are_the_batch(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    def epoch() -> list[Tensor]:
        torch.manual_seed(5)
        return [batch for part in RunBlocks(31, 5, 10, 4) for batch in part]

    whole = epoch()
    parts = []
    for rank in range(ranks):
        monkeypatch.setattr("salve.distributed.rank_and_world_size", lambda rank=rank: (rank, ranks))
        parts.append(epoch())
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *shares in zip(whole, *parts, strict=True):
        for rank, share in enumerate(shares):
            assert torch.equal(share, batch[rank::ranks])


def test_rows_that_are_stored_class_by_class_come_mixed() -> None:
    """Each batch has of each class about as many as a shuffle of all rows would give it."""
    n, classes, size = 40_960, 10, 256
    labels = torch.arange(n) * classes // n
    counts = torch.stack(
        [torch.bincount(labels[b], minlength=classes) for p in RunBlocks(n, size, n // 8, 32) for b in p]
    )
    shuffled = labels[torch.randperm(n)].reshape(-1, size)
    expected = torch.stack([torch.bincount(batch, minlength=classes) for batch in shuffled])
    assert counts.shape == expected.shape
    # A block of 160 of 1280 runs is a sample too; unmixed, the spread would be 256.
    spread = counts.double().var() / expected.double().var()
    assert float(spread) == pytest.approx(1 + (1 - 1 / 8) * size / 160, rel=0.3)
    assert int(counts.min()) > 0


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], int]:
    """``at_once(n)``: how many blocks of n rows that were read from disk were alive at most, at the same time."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most: Counter[int] = Counter()
    plain = Shards.__getitem__

    def watched(self: Shards, rows: slice | Tensor) -> Tensor:
        found = plain(self, rows)
        alive.add(found)
        most.update({size: max(0, count - most[size]) for size, count in Counter(map(len, alive)).items()})
        return found

    monkeypatch.setattr(Shards, "__getitem__", watched)
    return lambda rows: most[rows]


def test_batches_from_disk_hold_two_blocks(tmp_path: Path, at_once: Callable[[int], int]) -> None:
    write(tmp_path, drawn(900), torch.arange(900), 100)
    seen = []
    for some, labels in StreamedBatches(*load_captured(tmp_path, "train"), batch_size=10, block=60):
        seen.append(labels.clone())
        assert len(some) == len(labels) == 10
    assert at_once(60) == 2  # the one that is used, and the next
    assert sorted(torch.cat(seen).tolist()) == list(range(900))


def test_labels_stay_with_their_rows(tmp_path: Path) -> None:
    rows = torch.arange(50.0)[:, None].expand(50, 3).contiguous()
    write(tmp_path, rows, torch.arange(50), 7)
    found = load_captured(tmp_path, "train")
    for loader in (StreamedBatches(*found, batch_size=4, block=12), rows_loader(*found, batch_size=8)):
        for some, labels in loader:
            assert torch.equal(some[:, 0].long(), labels)


# -- memory


@pytest.mark.parametrize("times", [1.0, 0.99, 0.2, 1e-6])
def test_what_is_held_is_at_most_what_is_allowed(times: float, tmp_path: Path) -> None:
    images, width, batch = 10_000, 64, 100
    needed = 2 * images * width * 4
    context, *_ = context_and_inputs(tmp_path)
    within = replace(context, memory=times * needed / 2**30).shuffled_within(images, width, batch)
    if times == 1:
        assert within is None
        return
    assert within
    assert within % batch == 0
    assert within == batch or 3 * within * width * 4 <= times * needed < 3 * (within + batch) * width * 4


def test_a_capture_holds_as_much_however_many_shards_there_are(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most: dict[int, int] = {}

    def batches(rows: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(rows), 5):
            images = torch.rand(min(5, len(rows) - start), 3, 1, 1)
            alive.add(images)
            most[count] = max(most.get(count, 0), sum(len(some) for some in alive | held))
            yield images, torch.zeros(len(images), dtype=torch.long)

    held: weakref.WeakSet[Tensor] = weakref.WeakSet()
    model[1].register_forward_hook(lambda _, __, output: held.add(output))
    read = Cut(model, Site("h", (Reader("2.weight"),), 4), torch.arange(2)).read
    for count in (40, 400):
        (tmp_path / str(count)).mkdir()
        capture(read, "h", count, batches, tmp_path / str(count), "train", torch.device("cpu"), images_per_shard=20)
        assert len(load_captured(tmp_path / str(count), "train")) == count
    assert most[400] == most[40] <= 20 + 2 * 5


# -- SAEs


class StoredContext(SmallContext):
    """A context whose activations lie on disk, class after class: 6000 rows of 12 channels."""

    def activations(self, activations: Any, split: str) -> Captured:
        folder = self.store.root / "drawn"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for name, rows in (("train", 6000), ("select", 500), ("test", 400)):
                write(folder, *by_class(rows), 500, name)
        return load_captured(folder, split)


def jobs(folder: Path) -> tuple[StageContext, StageContext, Any, Any]:
    """One whose memory takes a ninth of the train split, one that takes it all, and the inputs."""
    context, *inputs = context_and_inputs(folder)
    stored = StoredContext(
        context.store,
        context.data,
        context.backbone,
        "last",
        0,
        trainer,
        context.device,
        context.progress,
        context.ranks,
    )
    return replace(stored, memory=6000 * WIDTH * 4 / 3 / 2**30), stored, inputs[0], inputs[1]


#: Fewer latents than there are features, so that they must keep to what all rows have in common.
LARGER = replace(
    SETTINGS, variant="linear_l1", dictionary_size=4, sparsity=0.01, learning_rate=0.03, batch_size=32, steps=375
)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many runs in a block, as there are when blocks are large."""
    monkeypatch.setattr("salve.activations.rows.RUN_BYTES", 4 * 4 * WIDTH)


@pytest.mark.slow
def test_an_sae_of_a_stream_is_as_good_as_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: Callable[[int], int]
) -> None:
    streaming, holding, *inputs = jobs(tmp_path)
    streamed = train_sae(streaming, LARGER, *inputs)
    assert 1 <= at_once(640) <= 2
    held = train_sae(holding, LARGER, *inputs)
    assert streamed.key != held.key
    for name in ("key.json", "sae.json"):
        assert streamed.record(name)["shuffled_within"] == 640  # a ninth of 6000, in whole batches
        assert held.record(name)["shuffled_within"] is None
    # Class by class, an SAE forgets what it knew: the measure tells good orders from bad ones.
    monkeypatch.setattr("salve.activations.rows.RUN_BYTES", 1500 * 4 * WIDTH)
    unmixed = train_sae(replace(streaming, memory=1e-9), LARGER, *inputs)
    fve = [artifact.record("sae.json")["fve"] for artifact in (streamed, held, unmixed)]
    assert fve[1] > 0.7
    assert abs(fve[0] - fve[1]) < 0.005
    assert fve[2] < fve[1] - 0.02


@pytest.mark.slow
def test_a_stream_that_is_killed_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    streaming, _, *inputs = jobs(tmp_path / "killed")
    dying = replace(streaming, trainer=lambda stage, epochs, rest: trainer(stage, epochs, [*rest, Die(1)]))
    with pytest.raises(Killed):
        train_sae(dying, LARGER, *inputs)
    found = train_sae(streaming, LARGER, *inputs)
    calm, _, *inputs = jobs(tmp_path / "calm")
    assert found.digest == train_sae(calm, LARGER, *inputs).digest


def test_saes_of_a_stream_are_trained_one_by_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = [replace(LARGER, steps=100, seed=seed) for seed in (0, 1)]
    streaming, _, *inputs = jobs(tmp_path / "together")
    with caplog.at_level(logging.INFO):
        together = train_saes(streaming, settings, *inputs)
    assert "one by one" in caplog.text
    streaming, _, *inputs = jobs(tmp_path / "alone")
    assert [one.digest for one in together] == [train_sae(streaming, one, *inputs).digest for one in settings]


def test_a_start_from_data_is_the_same_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, Tensor]] = []
    plain = SAE.start_from

    def watched(self: SAE, rows: Tensor, mean: Tensor) -> None:
        plain(self, rows, mean)
        starts.append({name: tensor.detach().clone() for name, tensor in self.state_dict().items()})

    monkeypatch.setattr(SAE, "start_from", watched)
    streaming, holding, *inputs = jobs(tmp_path)
    for context in (streaming, holding):
        train_sae(context, replace(LARGER, steps=10, start="data", centre=True), *inputs)
    streamed, held = starts
    for name, tensor in held.items():
        assert torch.equal(streamed[name], tensor)


def test_resampling_draws_the_same_rows_from_disk(tmp_path: Path) -> None:
    rows = drawn(5000)  # more than one block
    write(tmp_path, rows, torch.zeros(5000, dtype=torch.long), 700)
    found = []
    for source in (rows, load_captured(tmp_path, "train").rows):
        sae = make_sae("relu_l1", WIDTH, 9, torch.Generator().manual_seed(0))
        optimizer, dead = torch.optim.Adam(sae.parameters()), torch.arange(9) > 5
        assert resample(sae, optimizer, source, dead, 0.1, torch.Generator().manual_seed(1)) == 3
        found.append(sae.decoder.detach())
    assert torch.equal(*found)


def test_latents_that_died_in_a_stream_begin_anew(tmp_path: Path) -> None:
    streaming, _, *inputs = jobs(tmp_path)
    settings = replace(LARGER, variant="relu_l1", dictionary_size=16, sparsity=1.0, resample=1)
    assert train_sae(streaming, settings, *inputs).record("sae.json")["fve"] > 0.5


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_stream_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    streaming, _, *inputs = jobs(tmp_path)
    streaming.activations(inputs[1], "train")
    rows, labels = by_class(500)
    rows[77, 3] = value
    save_tensors(tmp_path / "drawn" / "train-00007.safetensors", {"activations": rows.contiguous(), "labels": labels})
    with pytest.raises(UserError, match="activations at last are NaN or infinite"):
        train_sae(streaming, LARGER, *inputs)
    assert not list(tmp_path.glob("sae/*"))
