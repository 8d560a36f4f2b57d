"""What a run of all stages takes with many classes: peak memory, bytes of files, seconds.

Each class has two images of 32 pixels in each split. The network is the quickstart's with random features, and a head
that is fitted to the training images. All settings of the stages are the defaults: 63 strengths, both modes.

Usage: python benchmarks/classes.py [CLASSES ...]
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from salve.artifacts import save_tensors
from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD

SIDE = 32
#: Images of a class by folder.
IMAGES = {"train": 2, "select": 2, "test": 2}
DEFAULT_CHANNELS = (32, 64, 128, 256)


def name_of(number: int) -> str:
    """The name of a class's folder."""
    return f"class {number:04d}"


def pixels_of(classes: int, per_class: int, seed: int) -> np.ndarray:
    """Images of each class's coloured patches under noise: uint8 ``[N, 32, 32, 3]``, class by class."""
    look, noise = np.random.default_rng(0), np.random.default_rng(seed)
    patches = look.uniform(40, 215, (classes, 4, 4, 3)).repeat(per_class, axis=0)
    pixels = patches.repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    return (pixels + noise.normal(0, 12, pixels.shape)).clip(0, 255).astype(np.uint8)


def write_images(root: Path, classes: int, images: dict[str, int] = IMAGES) -> None:
    """Write class folders with PNG files."""
    for seed, (split, per_class) in enumerate(images.items()):
        for number, pixels in enumerate(pixels_of(classes, per_class, seed)):
            folder = root / split / name_of(number // per_class)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{number % per_class}.png", compress_level=1)


@torch.no_grad()
def write_weights(
    file: Path, classes: int, channels: tuple[int, ...] = DEFAULT_CHANNELS, images: int = IMAGES["train"]
) -> nn.Module:
    """Write a network with random features and a head fitted to the training images by ridge regression."""
    torch.manual_seed(0)
    model: Any = timm.create_model("resnet10t", num_classes=classes, channels=channels, output_stride=8).eval()
    pixels = torch.from_numpy(pixels_of(classes, images, 0)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    head, model.fc = model.get_submodule("fc"), nn.Identity()
    assert isinstance(head, nn.Linear)
    features: Tensor = torch.cat([model(part) for part in ((pixels - mean) / std).split(256)]).double()
    centre, size = features.mean(dim=0), features.std(dim=0) + 1e-9
    rows = (features - centre) / size
    wanted = nn.functional.one_hot(torch.arange(classes).repeat_interleave(images), classes).double()
    gram = rows.T @ rows + 0.1 * torch.eye(rows.shape[1], dtype=torch.float64)
    solution = 10 * torch.linalg.solve(gram, rows.T @ (wanted - wanted.mean(dim=0))) / size[:, None]
    head.weight.copy_(solution.T)
    head.bias.copy_(-(centre @ solution))
    model.fc = head
    save_tensors(file, model.state_dict())
    return model


def settings_of(root: Path, weights: Path, channels: tuple[int, ...] = DEFAULT_CHANNELS) -> list[str]:
    """Settings of the stand-in's data and backbone, for the command line."""
    return [
        *("data=folder", f"data.root={root}", "data.num_workers=0"),
        *("backbone=resnet_small", f"backbone.weights={weights}", f"backbone.preprocess.size={SIDE}"),
        *(f"backbone.args.channels={list(channels)}".replace(" ", ""), "trainer=cpu", "finetune.mode=none"),
    ]


def bytes_of(folder: Path) -> Counter[str]:
    """Bytes of files by the first two folders of their path: ``artifacts/control``, ``runs/many``, …"""
    found: Counter[str] = Counter()
    for path in folder.rglob("*"):
        if path.is_file():
            found["/".join(path.relative_to(folder).parts[:2])] += path.stat().st_size
    return found


def seconds_of(folder: Path, begun: float) -> dict[str, float]:
    """Seconds that each kind of artifact took, from the one before it."""
    marks = sorted((path.stat().st_mtime, path.parts[-3]) for path in (folder / "artifacts").glob("*/*/DONE*"))
    starts = [begun, *(mark for mark, _ in marks)]
    return {kind: mark - start for start, (mark, kind) in zip(starts, marks, strict=False)}


def main() -> None:
    """Run the command for each number of classes, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classes", type=int, nargs="*", default=[250, 500, 1000])
    parser.add_argument("--set", nargs="*", default=[], help="further settings, as key=value")
    given = parser.parse_args()
    for classes in given.classes:
        with tempfile.TemporaryDirectory() as scratch:
            root, weights, out = Path(scratch) / "images", Path(scratch) / "weights.safetensors", Path(scratch) / "out"
            write_images(root, classes)
            write_weights(weights, classes)
            command = [*settings_of(root, weights), f"output_dir={out}", "name=many", *given.set]
            begun = time.time()
            process = subprocess.Popen([sys.executable, "-m", "salve.cli", *command], stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"The run with {classes} classes ended with {process.returncode}.")
            report(classes, out, time.time() - begun, begun, used)


def report(classes: int, out: Path, seconds: float, begun: float, used: resource.struct_rusage) -> None:
    """Print memory, files and seconds of one run."""
    files = bytes_of(out)
    peak = used.ru_maxrss / 2**20  # in KiB on Linux
    cpu = used.ru_utime + used.ru_stime
    print(f"{classes} classes: {peak:.2f} GiB at the peak, {files.total() / 1e6:.1f} MB of files, ", end="")
    print(f"{seconds:.0f} s ({cpu:.0f} s of CPU)")
    print("  MB: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in files.most_common(8)))
    print("  s: " + ", ".join(f"{kind} {took:.0f}" for kind, took in seconds_of(out, begun).items()), flush=True)


if __name__ == "__main__":
    main()
