"""CIFAR-100, on files of the published layout but with our own pixels."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from salve.data.cifar100 import Cifar100Data
from salve.data.transforms import Preprocess
from salve.types import UserError

NAMES = ["apple", "aquarium_fish", "maple_tree"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small CIFAR-100 whose checksums torchvision is told to expect."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()

    def put(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def images(n: int) -> dict[str, object]:
        pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
        return {"data": pixels, "fine_labels": [i % 3 for i in range(n)]}

    cifar = torchvision.datasets.CIFAR100
    monkeypatch.setattr(cifar, "train_list", [["train", put("train", images(15))]])
    monkeypatch.setattr(cifar, "test_list", [["test", put("test", images(12))]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": put("meta", {"fine_label_names": NAMES})})
    return tmp_path


def test_images_labels_and_names(root: Path) -> None:
    data = Cifar100Data(root, batch_size=4)
    data.check()
    assert data.native_size == 32
    assert data.classes == ("apple", "aquarium fish", "maple tree")
    assert data.labels("train").tolist() == [0, 1, 2] * 5
    data.bind(Preprocess(32, None, mean=(0, 0, 0), std=(1, 1, 1)))
    theirs = torchvision.datasets.CIFAR100(root, train=False)
    seen = []
    for split in ("select", "test"):  # the test set, divided
        assert data.labels(split).bincount().tolist() == [2, 2, 2]
        for place, index in enumerate(data.raw(split).indices.tolist()):
            image, label = data.dataset(split)[place]
            expected = torch.from_numpy(np.asarray(theirs[index][0]).copy()).permute(2, 0, 1) / 255
            torch.testing.assert_close(image, expected)
            assert label == data.labels(split)[place] == theirs[index][1]
            seen.append(index)
    assert sorted(seen) == list(range(12))


def test_superclasses_are_read_where_the_data_have_them(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cifar100Data(root, batch_size=4).superclasses is None  # these files say nothing about them
    cifar, folder = torchvision.datasets.CIFAR100, root / "cifar-100-python"

    def more(name: str, **parts: object) -> str:
        data = pickle.dumps({**pickle.loads((folder / name).read_bytes()), **parts})
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    coarse = {0: 1, 1: 0, 2: 2}
    changed = more("train", coarse_labels=[coarse[i % 3] for i in range(15)])
    monkeypatch.setattr(cifar, "train_list", [["train", changed]])
    names = more("meta", coarse_label_names=["fish", "fruit_and_vegetables", "trees"])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": names})
    data = Cifar100Data(root, batch_size=4, limit_per_class=1)
    assert dict(zip(data.classes, data.superclasses or (), strict=True)) == {
        "apple": "fruit and vegetables",
        "aquarium fish": "fish",
        "maple tree": "trees",
    }


def test_no_superclasses_are_unpickled_from_a_damaged_file(root: Path) -> None:
    (root / "cifar-100-python" / "train").write_bytes(pickle.dumps({"coarse_labels": []}))
    with pytest.raises(UserError, match="or a damaged one"):
        _ = Cifar100Data(root, batch_size=4).superclasses


def test_limit_and_fingerprint(root: Path, tmp_path: Path) -> None:
    data, limited = Cifar100Data(root, batch_size=4), Cifar100Data(root, batch_size=4, limit_per_class=2)
    assert limited.labels("train").tolist() == [0, 1, 2] * 2
    assert limited.labels("test").bincount().tolist() == [2, 2, 2]
    others = [Cifar100Data(root, batch_size=4, **o) for o in ({"split_seed": 1}, {"select_share": 0.3})]
    assert others[1].labels("select").bincount().tolist() == [1, 1, 1]
    assert len({d.fingerprint() for d in (data, limited, *others)}) == 4
    assert Cifar100Data(root, batch_size=9, limit_per_class=99).fingerprint() == data.fingerprint()
    with pytest.raises(UserError, match="limit_per_class"):
        Cifar100Data(root, batch_size=4, limit_per_class=0)


def test_thirty_two_pixels_are_remarked_where_they_are_enlarged(root: Path) -> None:
    data = Cifar100Data(root, batch_size=4)
    for size, enlarged in ((32, False), (224, True)):
        data.bind(Preprocess(size, None))
        assert ("The images (32 × 32) are enlarged to 224 × 224." in data.remarks()) == enlarged


def test_nothing_there_or_damaged_is_a_sentence(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.root=.*nowhere holds no CIFAR-100.*data.download=true"):
        Cifar100Data(tmp_path / "nowhere", batch_size=4).check()
    (root / "cifar-100-python" / "test").write_bytes(b"damaged")
    with pytest.raises(UserError, match="or a damaged one"):
        Cifar100Data(root, batch_size=4).labels("test")


def test_download_is_asked_for_only_when_needed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.CIFAR100, "download", unreachable)
    Cifar100Data(root, batch_size=4, download=True).check()
    with pytest.raises(UserError, match=r"The download of cifar100 into .* failed \(no network\)"):
        Cifar100Data(tmp_path / "new", batch_size=4, download=True).check()
