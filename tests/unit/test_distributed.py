"""Batches over several ranks, against torch's own DataLoader; and draws that depend on the row alone."""

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from salve.data import ConceptsData
from salve.data.transforms import Preprocess
from salve.distributed import DrawnBatches, DrawnItems, OnLeader, RankBatches, batch_share, divided

SHAPES = [(10, 3), (12, 4), (1, 4), (13, 13), (9, 1), (7, 100)]

As = Callable[[int, int], None]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> As:
    """``as_rank(rank, ranks)``: from here on this process is that rank."""
    return lambda rank, ranks: monkeypatch.setattr("salve.distributed.rank_and_world_size", lambda: (rank, ranks))


def epochs(batches: RankBatches, count: int = 2) -> list[list[int]]:
    torch.manual_seed(5)
    return [batch for _ in range(count) for batch in batches]


@pytest.mark.parametrize(("n", "size"), SHAPES)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_alone_they_are_the_batches_of_a_dataloader(n: int, size: int, shuffle: bool, drop_last: bool) -> None:
    torch.manual_seed(5)
    plain = DataLoader[Any](range(n), size, shuffle=shuffle, drop_last=drop_last)  # type: ignore[arg-type]
    expected = [batch.tolist() for _ in range(2) for batch in plain]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    ours = DataLoader[Any](range(n), batch_sampler=RankBatches(n, size, shuffle, drop_last))  # type: ignore[arg-type]
    assert [batch.tolist() for _ in range(2) for batch in ours] == expected
    assert len(ours) == len(plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("n", "size"), SHAPES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_parts_of_all_ranks_are_the_batch(as_rank: As, n: int, size: int, ranks: int) -> None:
    batches = RankBatches(n, size, shuffle=True)
    whole = epochs(batches)
    parts = []
    for rank in range(ranks):
        as_rank(rank, ranks)
        parts.append(epochs(batches))
    assert {len(part) for part in parts} == {len(whole)}  # a rank that came short would leave the others waiting
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(row for share in shares for row in share) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_share_is_one_without_other_ranks() -> None:
    assert batch_share(3) == 1.0
    assert batch_share(0) == 1.0


@pytest.fixture
def scenes() -> Callable[[int], ConceptsData]:
    """``scenes(num_workers)``: twenty drawn images in batches of six."""

    def make(workers: int) -> ConceptsData:
        data = ConceptsData(6, workers, image_size=32, train_per_class=2, test_per_class=1)
        data.bind(Preprocess(32, None))
        return data

    return make


def train_batches(data: ConceptsData, seed: int = 3) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    loader = data.loader("train", augment=True, shuffle=True)
    for epoch in range(2):
        torch.manual_seed(seed + epoch)
        yield from loader


def test_augmented_batches_do_not_depend_on_the_number_of_workers(scenes: Callable[[int], ConceptsData]) -> None:
    alone, helped = list(train_batches(scenes(0))), list(train_batches(scenes(2)))
    assert len(alone) == len(helped) == 8
    for (images, labels), (others, their_labels) in zip(alone, helped, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, their_labels)


def test_augmented_images_do_not_depend_on_the_ranks(as_rank: As, scenes: Callable[[int], ConceptsData]) -> None:
    whole = list(train_batches(scenes(0)))
    as_rank(0, 2)
    first = list(train_batches(scenes(0)))
    as_rank(1, 2)
    second = list(train_batches(scenes(0)))
    for (images, _), (ones, _), (others, _) in zip(whole, first, second, strict=True):
        assert torch.equal(images[0::2], ones)
        assert torch.equal(images[1::2], others)


def test_a_row_is_augmented_otherwise_in_every_epoch_and_no_two_rows_alike() -> None:
    class Noise(torch.utils.data.Dataset[float]):
        def __getitem__(self, index: int) -> float:
            return float(torch.rand(()))

    loader = DataLoader(DrawnItems(Noise()), batch_sampler=DrawnBatches(RankBatches(50, 7)))
    draws = torch.cat([batch for _ in range(3) for batch in loader])
    assert len(draws.unique()) == 150
    state = torch.get_rng_state()
    _ = DrawnItems(Noise())[3, 11]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rank_may_get_no_image_of_a_batch(as_rank: As, scenes: Callable[[int], ConceptsData]) -> None:
    as_rank(1, 2)
    sizes = []
    for images, labels in scenes(0).loader("test", batch_size=3):  # ten images: the last batch has one
        assert images.shape == (len(labels), 3, 32, 32)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        sizes.append(len(labels))
    assert sizes == [1, 1, 1, 0]


def test_parts_of_one_rank_are_done_in_order_and_counted() -> None:
    done: list[int] = []
    assert divided(lambda part: part * part, [3, 1, 2], done.append) == [9, 1, 4]
    assert done == [1, 1, 1]
    assert divided(lambda part: part, []) == []


def test_a_function_for_the_leader_does_nothing_where_it_is_sent_to() -> None:
    done: list[int] = []
    here = OnLeader(done.append)
    there = pickle.loads(pickle.dumps(here))
    there(1)
    here(2)
    assert done == [2]
