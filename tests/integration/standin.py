"""A small CIFAR-100 in the published layout with our own pixels, and a network that tells its classes apart."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.models import resnet18

from salve.artifacts import save_tensors
from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD

CLASSES, GROUPS = 100, 20


def _images(per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gratings `[N, 3, 32, 32]` (uint8) on a background in the superclass's colour; labels `[N]`."""
    look, noise = np.random.default_rng(0), np.random.default_rng(seed)
    background = look.uniform(60, 190, (GROUPS, 3, 1, 1))
    wave, colour = look.uniform(-1.2, 1.2, (CLASSES, 2)), look.uniform(-60, 60, (CLASSES, 3, 1, 1))
    rows, columns = np.mgrid[:32, :32]
    labels = np.repeat(np.arange(CLASSES), per_class)
    phase = noise.uniform(0, 2 * np.pi, (len(labels), 1, 1))
    grating = np.cos(wave[labels, :1, None] * rows + wave[labels, 1:, None] * columns + phase)
    pixels = (
        background[labels % GROUPS] + colour[labels] * grating[:, None] + noise.normal(0, 6, (len(labels), 3, 32, 32))
    )
    return pixels.clip(0, 255).astype(np.uint8), labels


def write_standin(root: Path, train: int, val: int) -> None:
    """Write `cifar-100-python/` with so many images of each class, and beside it a `sitecustomize.py` that tells
    torchvision to expect these files' checksums in every process that has `root` on its PYTHONPATH."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)

    def put(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def split(per_class: int, seed: int) -> dict[str, object]:
        pixels, labels = _images(per_class, seed)
        coarse = [int(label) % GROUPS for label in labels]
        return {"data": pixels.reshape(len(labels), -1), "fine_labels": labels.tolist(), "coarse_labels": coarse}

    names = {
        "fine_label_names": [f"kind_{k:02d}" for k in range(CLASSES)],
        "coarse_label_names": [f"large_group_{k:02d}" for k in range(GROUPS)],
    }
    sums = [put("train", split(train, 1)), put("test", split(val, 2)), put("meta", names)]
    (root / "sitecustomize.py").write_text(
        "from torchvision.datasets import CIFAR100\n"
        f"CIFAR100.train_list, CIFAR100.test_list = [['train', {sums[0]!r}]], [['test', {sums[1]!r}]]\n"
        f"CIFAR100.meta = dict(CIFAR100.meta, md5={sums[2]!r})\n"
    )


def write_weights(file: Path, train: int) -> None:
    """A ResNet-18 with random features, and a head that is fitted to them by ridge regression."""
    torch.manual_seed(0)
    model = resnet18(num_classes=CLASSES).eval()
    pixels, labels = (torch.from_numpy(part) for part in _images(train, 1))
    scale = [torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]
    head, model.fc = model.fc, torch.nn.Identity()
    with torch.no_grad():
        features: Tensor = torch.cat([model((part / 255 - scale[0]) / scale[1]) for part in pixels.split(250)])
        size = features.pow(2).sum(dim=1).mean().sqrt()
        ones = torch.cat([features / size * features.shape[1] ** 0.5, torch.ones(len(features), 1)], dim=1).double()
        wanted = torch.nn.functional.one_hot(labels, CLASSES).double()
        gram = ones.T @ ones + 0.1 * torch.eye(ones.shape[1], dtype=torch.float64)
        solution = 10 * torch.linalg.solve(gram, ones.T @ wanted).float()
        head.weight.copy_(solution[:-1].T / size * features.shape[1] ** 0.5)
        head.bias.copy_(solution[-1])
        model.fc = head
    save_tensors(file, model.state_dict())
