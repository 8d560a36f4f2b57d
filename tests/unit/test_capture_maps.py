"""Capture at maps, and on several ranks: sampled positions, and the bits of one rank."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salve.activations import ActivationsData, Captured, Schedule, captured, load_captured
from salve.activations.capture import capture, sampled_positions, shard_images
from salve.artifacts import DONE, Artifact, Store, load_tensors, save_tensors
from salve.backbones import Reader, Site, find_site, site_activations
from salve.backbones.cut import Cut
from salve.backbones.sites import graph_of
from salve.distributed import rank_and_world_size
from salve.processes.ranks import Ranks, gathered
from salve.sae import make_sae
from salve.settings import TrainerSettings
from salve.stages import train_sae
from salve.stages.measure import check_activations, measure_sae
from salve.types import UserError
from tests.integration.commands import Rank, ranks_are_forks
from tests.unit.test_capture import COUNTS, PREPROCESS, Count, Noise, cut_at_last, no_progress, small
from tests.unit.test_sae_ensemble import CLASSES, SETTINGS, SmallContext, context_and_inputs

CPU = torch.device("cpu")
WIDTH, SIDE = 6, 4
SITE = Site("conv2", (Reader("conv2.weight"),), WIDTH, positions=(SIDE, SIDE))
#: With four kept positions of six channels, shards of two images.
TWO_IMAGES = 2 * 4 * 4 * WIDTH


class Network(nn.Module):
    """Its site is the map ``[6, 4, 4]`` that ``conv2`` reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(WIDTH, 5, 1), nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv2(self.conv1(images).relu()).mean((2, 3)))
        return logits


def read_map(model: Any, images: Tensor) -> Tensor:
    activations: Tensor = model.conv1(images).relu().flatten(2).transpose(1, 2)
    return activations


class Read(Cut):
    """A network with a map that a function reads."""

    def __init__(self, model: nn.Module, reader: Callable[[Tensor], Tensor], site: Site = SITE) -> None:
        self.model, self.site, self.reader, self._graph = model, site, reader, None

    def read(self, images: Tensor) -> Tensor:
        return self.reader(images)

    def weights_before(self) -> set[str]:
        return {"conv1.weight", "conv1.bias"}


def pixels(images: Tensor) -> Tensor:
    """A map of three channels that is the same to the bit in whatever batch an image is."""
    return images.flatten(2).transpose(1, 2)


def run(
    store: Store,
    model: nn.Module,
    data: Noise | None = None,
    ranks: Any = None,
    read: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[..., Any] = no_progress,
    sampled: int = 4,
    seed: int = 0,
) -> Artifact:
    cut = Read(model, read or partial(read_map, model))
    return captured(store, cut, data or Noise(), ranks or Ranks("cpu"), progress, sampled, seed)


# -- which positions


def test_positions_depend_on_seed_split_and_image_alone() -> None:
    found = sampled_positions(0, "train", 49, 8, range(30))
    for image in (0, 7, 29):
        assert torch.equal(sampled_positions(0, "train", 49, 8, [image])[0], found[image])
    assert torch.equal(sampled_positions(0, "train", 49, 8, range(5, 9)), found[5:9])
    for other in (sampled_positions(1, "train", 49, 8, range(30)), sampled_positions(0, "test", 49, 8, range(30))):
        assert (other != found).any(dim=1).all()
    assert len({tuple(row) for row in found.tolist()}) == 30


def test_positions_are_drawn_evenly_and_without_replacement() -> None:
    images, positions, sampled = 2000, 20, 5
    found = sampled_positions(3, "train", positions, sampled, range(images))
    assert (found.diff(dim=1) > 0).all()  # in order, none twice
    assert found.min() >= 0
    counts = found.flatten().bincount(minlength=positions).double()
    share = sampled / positions
    assert len(counts) == positions
    assert ((counts - images * share).abs() < 5 * (images * share * (1 - share)) ** 0.5).all()
    assert torch.equal(sampled_positions(3, "train", 4, 4, range(2)), torch.arange(4).expand(2, 4))


@pytest.mark.parametrize(("batch", "shard"), [(1, 1), (2, 3), (5, 2), (11, 2048)])
def test_rows_are_those_of_the_sampled_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, shard: int
) -> None:
    sampled = 7
    monkeypatch.setattr("salve.activations.capture.SHARD_BYTES", 4 * 3 * sampled * shard)
    data = Noise()
    data.batch_size = batch
    cut = Read(Network(), pixels, replace(SITE, width=3, positions=(16, 16)))
    made = captured(Store(tmp_path), cut, data, Ranks("cpu"), no_progress, sampled, seed=5)
    for split, count in COUNTS.items():
        found = load_captured(made.path, split)
        items: Any = data.dataset(split)
        expected = [
            image.flatten(1).T[sampled_positions(5, split, 256, sampled, [i])[0]] for i, (image, _) in enumerate(items)
        ]
        assert torch.equal(found.activations, torch.cat(expected))
        assert found.labels.tolist() == data.labels(split).tolist()
        assert (len(found), found.sampled) == (count, sampled)
        assert found.row_labels.tolist() == [label for label in data.labels(split).tolist() for _ in range(sampled)]
        shards = [len(load_tensors(path)["labels"]) for path in sorted(made.path.glob(f"{split}-*.safetensors"))]
        assert shards == [min(shard, count - start) for start in range(0, count, shard)]


def test_the_record_of_a_map_says_what_was_kept(tmp_path: Path) -> None:
    expected = {"site": "conv2", "width": 6, "positions": [4, 4], "train": 11, "select": 3, "test": 5}
    for sampled, kept in ((4, 4), (99, 16)):
        record = run(Store(tmp_path), Network(), sampled=sampled).record("activations.json")
        assert record == {**expected, "sampled": kept, "nonnegative": True}


def test_the_key_of_a_map_holds_what_decides_its_rows(tmp_path: Path) -> None:
    store, model = Store(tmp_path), Network()
    keys = [run(store, model, sampled=p, seed=s).key for p, s in ((4, 0), (5, 0), (4, 1), (16, 0))]
    assert len(set(keys)) == 4
    assert run(store, model, sampled=16, seed=1).key == keys[3]  # nothing is drawn
    assert run(store, model, sampled=17).key == keys[3]


def test_a_vector_site_has_the_files_and_the_key_of_a_plain_loop(tmp_path: Path) -> None:
    model, data = small(), Noise()
    site = find_site(model, "last")
    made = captured(Store(tmp_path), cut_at_last(model), data, Ranks("cpu"), no_progress, sampled=9, seed=9)
    assert made.record("key.json").keys() == {"weights", "site", "data", "preprocess"}
    assert made.record("activations.json").keys() == {"site", "width", "nonnegative", *COUNTS}
    model.to(memory_format=torch.channels_last)
    for split in COUNTS:
        with torch.inference_mode():
            parts = [
                (site_activations(model, site, images.to(memory_format=torch.channels_last)), labels)
                for images, labels in data.loader(split)
            ]
        rows, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        save_tensors(tmp_path / "expected", {"activations": rows, "labels": labels})
        assert made.file(f"{split}-00000.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_a_shard_has_so_many_bytes_at_most() -> None:
    assert shard_images(1, 1, 768) == shard_images(1, 1, 100_000) == 2048
    for positions, sampled, width in ((196, 16, 768), (3136, 3136, 64), (49, 49, 2048), (9, 1, 8)):
        images = shard_images(positions, sampled, width)
        assert images == 2048 or images * sampled * width * 4 <= 32 * 2**20 < (images + 1) * sampled * width * 4
    assert shard_images(224**2, 224**2, 512) == 1


# -- activations that are no numbers


@dataclass(frozen=True)
class Broken:
    """Reads a map in which one position of one white image is no number."""

    model: nn.Module
    position: int
    value: float

    def __call__(self, images: Tensor) -> Tensor:
        activations = read_map(self.model, images)
        activations[images.amin((1, 2, 3)) > 3, self.position, 2] = self.value
        return activations


@pytest.mark.parametrize("position", range(0, SIDE * SIDE, 5))
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_one_position_that_is_no_number_is_refused_and_its_image_named(
    tmp_path: Path, position: int, value: float
) -> None:
    """Also where it is not sampled: four of these five are not."""
    model, data = Network(), Noise({"train": 6, "select": 6, "test": 6}, white=4)
    assert PREPROCESS.std == (0.25, 0.25, 0.25)  # white is 4
    with pytest.raises(UserError, match=r"conv2 are NaN or infinite for image 4 of the train split") as refused:
        run(Store(tmp_path), model, data, read=Broken(model, position, value), sampled=1)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob(DONE))


# -- several ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes, shared by the tests of this module."""
    with pytest.MonkeyPatch.context() as patch:
        ranks_are_forks(patch)
        with gathered(TrainerSettings("cpu", 2, "ddp_spawn", "32-true")) as ranks:
            yield ranks


@pytest.mark.slow
def test_two_ranks_capture_the_bits_of_one(two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_BYTES", TWO_IMAGES)
    told: dict[str, int] = {}

    @contextmanager
    def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
        told[what] = 0

        def advance(images: int) -> None:
            told[what] += images

        yield advance
        assert told[what] == total

    model = Network()
    count = Count(model.conv1)
    one = run(Store(tmp_path / "one"), model)
    assert count.images == 19
    both = run(Store(tmp_path / "two"), model, ranks=two, progress=counting)
    assert len(told) == 3
    # Of six shards of train images the first has 0, 2 and 4; of two and three shards of the others the even ones.
    assert count.images - 19 == 6 + 2 + 3
    assert (both.key, both.digest) == (one.key, one.digest)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [2048, 3])
def test_two_ranks_capture_the_bits_of_one_at_a_vector_site(
    two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_ROWS", shard)
    model, made = small(), []
    for name, ranks in (("one", Ranks("cpu")), ("two", two)):
        made.append(captured(Store(tmp_path / name), cut_at_last(model), Noise(), ranks, no_progress))
    assert made[0].digest == made[1].digest


@pytest.mark.slow
def test_the_image_is_named_whichever_rank_met_it(two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_BYTES", TWO_IMAGES)
    for white in (2, 5):  # in shards 1 and 2, of the second and of the first rank
        model, data = Network(), Noise({"train": 6, "select": 6, "test": 6}, white=white)
        with pytest.raises(UserError, match=rf"^The activations at conv2 .* image {white} of the train split"):
            run(Store(tmp_path / str(white)), model, data, two, Broken(model, 3, torch.nan))


@pytest.mark.slow
def test_two_ranks_capture_the_bits_of_one_at_a_site_of_the_graph(two: Ranks, tmp_path: Path) -> None:
    model, made = Network().eval(), []
    cut = Cut(model, find_site(model, "conv2", 16), torch.arange(4), graph_of(model, 16))
    assert cut.site.positions == (SIDE, SIDE)
    for name, ranks in (("one", Ranks("cpu")), ("two", two)):
        made.append(captured(Store(tmp_path / name), cut, Noise(), ranks, no_progress, sampled=4))
    assert made[0].digest == made[1].digest
    # The graph's positions are in the order of the picture.
    by_hand = run(Store(tmp_path / "by hand"), model)
    ours, theirs = (load_captured(one.path, "test").activations for one in (made[0], by_hand))
    torch.testing.assert_close(ours, theirs)


@dataclass(frozen=True)
class Killed:
    """Reads a map; in the process that is no leader, the read with this number is its last."""

    model: nn.Module
    leader: int
    seen: Path
    last: int

    def __call__(self, images: Tensor) -> Tensor:
        if os.getpid() != self.leader:
            with self.seen.open("a") as file:
                file.write(".")
            if self.seen.stat().st_size == self.last:
                os.kill(os.getpid(), signal.SIGKILL)
        return read_map(self.model, images)


@pytest.mark.slow
def test_a_capture_whose_rank_was_killed_goes_on_with_what_is_missing(
    two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_BYTES", TWO_IMAGES)
    model = Network()
    expected = run(Store(tmp_path / "calm"), model)
    store = Store(tmp_path / "killed")
    # Batches have two images, as shards have: killed in its second shard, number 3 of all.
    with pytest.raises(RuntimeError, match="status -9"):
        run(store, model, ranks=two, read=Killed(model, os.getpid(), tmp_path / "seen", 2))
    kept = {path.name for path in store.root.rglob("*.safetensors")}
    assert {"train-00000.safetensors", "train-00001.safetensors"} <= kept
    assert "train-00003.safetensors" not in kept
    count = Count(model.conv1)
    made = run(store, model)  # one rank goes on with what two have begun
    assert count.images == 19 - 2 * len(kept)
    assert made.digest == expected.digest


def test_a_node_that_does_not_see_the_folder_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Rank 0 does not see .*/nowhere: all nodes need a disk that they share"):
        capture(pixels, "x", 1, lambda _: [], tmp_path / "nowhere", "train", CPU)
    assert rank_and_world_size() == (0, 1)


# -- memory


def wide(images: Tensor) -> Tensor:
    """A map ``[n, 256, 264]`` of images of 16 pixels."""
    return images.flatten(2).transpose(1, 2).repeat(1, 1, 88)


def in_batches(rows: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(rows), 4):
        count = min(4, len(rows) - start)
        yield torch.rand(count, 3, 16, 16), torch.zeros(count, dtype=torch.long)


def status(field: str) -> int:
    """Bytes of this process's memory."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def stream(folder: Path, images: int) -> tuple[int, int]:
    """Capture a map, and read it as a training does; returns the rows that were read, and bytes on the disk."""
    folder.mkdir()
    sample = partial(sampled_positions, 0, "train", 256, 64)
    size = shard_images(256, 64, 264) // 32  # of a MiB
    capture(wide, "x", images, in_batches, folder, "train", CPU, sample=sample, images_per_shard=size)
    found = load_captured(folder, "train")
    schedule = Schedule.of_epochs(len(found.rows), 256, 1)
    data = ActivationsData(found.rows, found.rows, found.row_labels, schedule, block=2048)
    read = sum(len(block.rows) for block in data.train_dataloader())
    return read, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def measured_stream(folder: Path, images: int) -> None:
    torch.set_num_threads(1)
    stream(folder / "warm", 64)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    found = *stream(folder / "measured", images), status("VmHWM") - before
    (folder / "found.json").write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak of memory")
def test_a_map_of_twenty_times_the_memory_is_captured_and_read(tmp_path: Path) -> None:
    images = 3000
    process = Rank(measured_stream, (tmp_path, images))
    process.start()
    process.join()
    assert process.exitcode == 0
    read, size, peak = json.loads((tmp_path / "found.json").read_text())
    assert read == images * 64
    assert size > images * 64 * 264 * 4
    assert peak < size / 20


# -- what is made of rows


class MapContext(SmallContext):
    """A context whose images have three rows each, or as many images of one row."""

    sampled = 3

    def activations(self, activations: Artifact, split: str) -> Captured:
        rows, _ = super().activations(activations, split)
        rows = rows[: len(rows) // 3 * 3]
        labels = torch.arange(len(rows) // 3) % CLASSES
        return Captured(rows, labels, 3) if self.sampled == 3 else Captured(rows, labels.repeat_interleave(3))


class RowContext(MapContext):
    sampled = 1


def test_rows_of_maps_are_measured_and_trained_on_as_rows_of_vectors_are(tmp_path: Path) -> None:
    digests, measures = [], []
    for kind in (MapContext, RowContext):
        plain, *inputs = context_and_inputs(tmp_path / kind.__name__)
        context = kind(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
        digests.append(train_sae(context, replace(SETTINGS, steps=20), *inputs).digest)
        train, test = (context.activations(inputs[1], split) for split in ("train", "test"))
        assert len(train.rows) == len(train.row_labels)
        width = train.rows.shape[1]
        sae = make_sae("topk", width, 8, torch.Generator().manual_seed(0), k=2).eval()
        measures.append((measure_sae(sae, train, {"test": test}, context.tail(inputs[0])), check_activations(test, "")))
    assert digests[0] == digests[1]
    assert measures[0] == measures[1]
