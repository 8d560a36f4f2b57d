"""Activations are captured once, in shards, and a killed capture goes on where it stopped."""

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from salve.activations import captured, load_captured
from salve.artifacts import DONE, Artifact, Store, load_tensors
from salve.backbones import find_site, site_activations
from salve.backbones.cut import Cut
from salve.data.base import ImageData, RawImages
from salve.data.transforms import Preprocess
from salve.processes.ranks import Ranks
from salve.types import Labels, Split, UserError

PREPROCESS = Preprocess(size=16, resize=None, mean=(0, 0, 0), std=(0.25, 0.25, 0.25))
COUNTS: dict[Split, int] = {"train": 11, "select": 3, "test": 5}


class Noise(ImageData):
    """Random images with random labels; white where asked."""

    name = "noise"

    def __init__(self, counts: dict[Split, int] = COUNTS, white: int | None = None, seed: int = 0) -> None:
        super().__init__(batch_size=2)
        self.seed = seed
        self.items: dict[str, list[tuple[Tensor, int]]] = {}
        generator = torch.Generator().manual_seed(seed)
        for split, count in counts.items():
            images = torch.randint(0, 128, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
            if white is not None:
                images[white] = 255
            labels = torch.randint(0, 4, (count,), generator=generator)
            self.items[split] = list(zip(images, labels.tolist(), strict=True))
        self.bind(PREPROCESS)

    @property
    def classes(self) -> tuple[str, ...]:
        return ("a", "b", "c", "d")

    def raw(self, split: Split) -> RawImages:
        return self.items[split]

    def labels(self, split: Split) -> Labels:
        return torch.tensor([label for _, label in self.items[split]])

    def fingerprint(self) -> str:
        return hashlib.sha256(f"noise {self.seed}".encode()).hexdigest()


@contextmanager
def no_progress(_: str, __: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def small(seed: int = 0, classes: int = 4) -> Any:
    torch.manual_seed(seed)
    return timm.create_model("resnet10t", num_classes=classes, channels=(8, 16, 24, 32)).eval()


class Count:
    """How many images have gone through a model."""

    def __init__(self, model: nn.Module) -> None:
        self.images = 0
        model.register_forward_pre_hook(self)

    def __call__(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self.images += len(inputs[0])


def cut_at_last(model: nn.Module) -> Cut:
    return Cut(model, find_site(model, "last"), torch.arange(4))


def run(store: Store, model: nn.Module, data: ImageData | None = None, progress: Callable = no_progress) -> Artifact:
    return captured(store, cut_at_last(model), data or Noise(), Ranks("cpu"), progress)


def in_order(data: ImageData, split: Split) -> list[tuple[Tensor, int]]:
    images: Any = data.dataset(split)
    return list(images)


@torch.no_grad()
def plain_loop(model: nn.Module, data: ImageData, split: Split) -> Tensor:
    """Image by image, without shards or batches."""
    site = find_site(model, "last")
    return torch.cat([site_activations(model, site, image[None]) for image, _ in in_order(data, split)])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 11, 2048])
def test_shards_hold_what_a_plain_loop_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: int) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_ROWS", rows)
    model, data = small(), Noise()
    made = run(Store(tmp_path), model, data)
    for split, count in COUNTS.items():
        found = load_captured(made.path, split)
        assert found.activations.dtype == torch.float32
        torch.testing.assert_close(found.activations, plain_loop(model, data, split), rtol=1e-5, atol=1e-6)
        assert found.labels.tolist() == data.labels(split).tolist()
        shards = [len(load_tensors(path)["labels"]) for path in sorted(made.path.glob(f"{split}-*.safetensors"))]
        assert shards == [min(rows, count - start) for start in range(0, count, rows)]
    assert made.record("activations.json") == {
        "site": "global_pool", "width": 32, "train": 11, "select": 3, "test": 5, "nonnegative": True
    }  # fmt: skip


def test_signed_activations_are_known_as_such(tiny: Callable[[str], nn.Module], tmp_path: Path) -> None:
    data = Noise()
    data.bind(Preprocess(size=32, resize=None))
    assert run(Store(tmp_path), tiny("vit"), data).record("activations.json")["nonnegative"] is False


def test_the_artifact_leaves_nothing_but_shards_and_its_record(tmp_path: Path) -> None:
    made = run(Store(tmp_path), small())
    assert {path.name for path in made.path.iterdir()} == {
        "activations.json",
        "train-00000.safetensors",
        "select-00000.safetensors",
        "test-00000.safetensors",
        "key.json",
        DONE,
    }
    assert not list(tmp_path.rglob("shards"))


def test_a_second_capture_runs_no_image(tmp_path: Path) -> None:
    model = small()
    count = Count(model)
    first = run(Store(tmp_path), model)
    assert count.images == sum(COUNTS.values())
    second = run(Store(tmp_path), model)
    assert second.reused
    assert second.digest == first.digest
    assert count.images == sum(COUNTS.values())


@pytest.mark.parametrize(
    ("killed_at", "left"), [(1, (11, 3, 5)), (5, (7, 3, 5)), (11, (3, 3, 5)), (14, (0, 3, 5)), (17, (0, 0, 5))]
)
def test_a_stopped_capture_goes_on_with_the_first_unfinished_shard(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, killed_at: int, left: tuple[int, int, int]
) -> None:
    """With shards of four images, killed when ``killed_at`` images are through: whole shards are not made again."""
    monkeypatch.setattr("salve.activations.capture.SHARD_ROWS", 4)
    expected = run(Store(tmp_path / "undisturbed"), small())
    done = 0

    @contextmanager
    def dying(_: str, __: int) -> Iterator[Callable[[int], None]]:
        def advance(images: int) -> None:
            nonlocal done
            done += images
            if done >= killed_at:
                raise KeyboardInterrupt

        yield advance

    store = Store(tmp_path / "disturbed")
    with pytest.raises(KeyboardInterrupt):
        run(store, small(), progress=dying)
    assert not list(store.root.rglob(DONE))

    told: dict[str, int] = {}

    @contextmanager
    def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
        told[what] = 0

        def advance(images: int) -> None:
            told[what] += images

        yield advance
        assert told[what] == total  # the bar ends full, whatever was there already

    model = small()
    count = Count(model)
    made = run(store, model, progress=counting)
    assert count.images == sum(left)
    assert len(told) == 3
    assert made.digest == expected.digest


def test_a_shard_that_was_cut_off_while_written_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dies(path: Path, _: dict[str, Tensor]) -> None:
        path.write_bytes(b"half of a shard")
        raise KeyboardInterrupt

    store = Store(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("salve.activations.capture.save_tensors", dies)
        with pytest.raises(KeyboardInterrupt):
            run(store, small())
    made = run(store, small())
    assert len(load_captured(made.path, "train").labels) == 11
    assert made.digest == run(Store(tmp_path / "other"), small()).digest


@pytest.mark.parametrize("how", ["cut", "flipped", "of another capture", "linked"])
def test_a_shard_that_was_damaged_after_a_kill_is_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_ROWS", 4)
    expected = run(Store(tmp_path / "undisturbed"), small())
    store = Store(tmp_path / "disturbed")

    def dies(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("salve.activations.capture.load_tensors", dies)  # once all shards are whole
        with pytest.raises(KeyboardInterrupt):
            run(store, small())
    [shard] = store.root.rglob("shards/train-00001.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    match how:
        case "cut":
            shard.write_bytes(content[:50])
        case "flipped":
            shard.write_bytes(content)
        case "of another capture":
            shutil.copyfile(shard.with_name("train-00000.safetensors"), shard)
        case "linked":
            shard.unlink()
            shard.symlink_to("nowhere")
    model = small()
    count = Count(model)
    made = run(store, model)
    assert count.images == 4
    assert "train-00001.safetensors is damaged and is captured again." in caplog.text
    assert made.digest == expected.digest


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [2, 2048])
def test_an_activation_that_is_no_number_is_refused_and_the_image_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float, rows: int
) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_ROWS", rows)
    model = small()
    # Normalised, only a white image exceeds 2.
    model.register_forward_pre_hook(lambda _, x: torch.where(x[0].amax((1, 2, 3), keepdim=True) > 2.1, value, x[0]))
    with pytest.raises(UserError, match=r"global_pool .* image 4 of the train split") as refused:
        run(Store(tmp_path), model, Noise({"train": 6, "select": 6, "test": 6}, white=4))
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.rglob(DONE))


def test_another_head_finds_what_was_captured_before(tmp_path: Path) -> None:
    first = run(Store(tmp_path), small())
    trained = small()
    nn.init.normal_(trained.fc.weight)
    nn.init.normal_(trained.fc.bias)
    assert run(Store(tmp_path), trained).reused
    larger = small()
    larger.fc = nn.Linear(32, 9)
    assert run(Store(tmp_path), larger).digest == first.digest


def other_weight() -> nn.Module:
    model = small()
    with torch.no_grad():
        model.layer4[0].conv1.weight[0, 0, 0, 0].nextafter_(torch.tensor(1.0))
    return model


def other_statistics() -> nn.Module:
    model = small()
    model.layer4[0].bn1.running_mean[0] += 1
    return model


@pytest.mark.parametrize("change", [other_weight, other_statistics, lambda: small(1)])
def test_another_trunk_is_captured_anew(tmp_path: Path, change: Callable[[], nn.Module]) -> None:
    first = run(Store(tmp_path), small())
    second = run(Store(tmp_path), change())
    assert not second.reused
    assert second.key != first.key


def test_other_data_and_other_preprocessing_are_captured_anew(tmp_path: Path) -> None:
    first = run(Store(tmp_path), small())
    smaller = Noise()
    smaller.bind(Preprocess(size=16, resize=None))
    keys = {first.key, run(Store(tmp_path), small(), Noise(seed=1)).key, run(Store(tmp_path), small(), smaller).key}
    assert len(keys) == 3


def test_a_single_image(tmp_path: Path) -> None:
    model, data = small(), Noise({"train": 1, "select": 1, "test": 1})
    made = run(Store(tmp_path), model, data)
    found = load_captured(made.path, "test")
    assert found.labels.tolist() == data.labels("test").tolist()
    torch.testing.assert_close(found.activations, plain_loop(model, data, "test"))


def test_the_batch_size_does_not_matter_to_what_is_found(tmp_path: Path) -> None:
    run(Store(tmp_path), small())
    data = Noise()
    data.batch_size = 5
    assert run(Store(tmp_path), small(), data).reused
