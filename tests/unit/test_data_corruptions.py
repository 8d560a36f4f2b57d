"""Corruptions: seeded per image, through a package that need not be here."""

from importlib.util import find_spec
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from salve.data import corruptions
from salve.data.concepts import ConceptsData, DrawnImages
from salve.data.corruptions import KINDS, SEVERITIES, corrupted, image_seed
from salve.types import UserError

installed = pytest.mark.skipif(
    not find_spec("imagecorruptions"), reason="imagecorruptions-imaug is not installed (salve[robustness])"
)


@pytest.fixture(scope="module")
def scenes() -> DrawnImages:
    data = ConceptsData(8, image_size=48, train_per_class=1, select_per_class=1, test_per_class=1)
    raw = data.raw("test")
    return DrawnImages(raw.images[:3], raw.labels[:3])  # type: ignore[attr-defined]


def test_kinds_are_the_fifteen_of_the_benchmark() -> None:
    assert len(KINDS) == len(set(KINDS)) == 15
    if find_spec("imagecorruptions"):
        from imagecorruptions import get_corruption_names

        assert list(KINDS) == get_corruption_names("common")


def test_every_image_has_a_seed_of_its_own() -> None:
    every = product((0, 1), KINDS, SEVERITIES, range(4))
    seeds = [image_seed(seed, kind, severity, index) for seed, kind, severity, index in every]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_refusals(scenes: DrawnImages, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no corruption 'rain'; the kinds are gaussian_noise"):
        corrupted(scenes, "rain", 1, 0)
    with pytest.raises(UserError, match="severity=6 of fog"):
        corrupted(scenes, "fog", 6, 0)
    with pytest.raises(UserError, match="seed"):
        corrupted(scenes, "fog", 1, -1)
    monkeypatch.setattr(corruptions, "_PACKAGE", "no-such-package")
    with pytest.raises(UserError, match=r"pip install 'salve\[robustness\]'"):
        corrupted(scenes, "fog", 1, 0)


def test_what_is_drawn_depends_on_the_image_alone(scenes: DrawnImages, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package that draws as it does: from numpy's global generator, or from a seed."""

    def corrupt(pixels: Any, severity: int, corruption_name: str, seed: int | None = None) -> Any:
        drawn = np.random if seed is None else np.random.RandomState(seed)
        return drawn.randint(0, 256, pixels.shape).astype(np.uint8)

    monkeypatch.setattr(corruptions, "_library", lambda: corrupt)
    for kind in ("fog", "impulse_noise"):
        images = corrupted(scenes, kind, 2, 0)
        np.random.seed(1)  # noqa: NPY002
        expected = np.random.random()  # noqa: NPY002
        np.random.seed(1)  # noqa: NPY002
        second, first = images[1], images[0]
        assert np.random.random() == expected, "numpy's generator was left changed"  # noqa: NPY002
        assert torch.equal(images[0][0], first[0])
        assert torch.equal(images[-2][0], second[0])
        assert not torch.equal(first[0], second[0])
        assert [label for _, label in (first, second)] == scenes.labels[:2].tolist()
        others = [corrupted(scenes, "snow", 2, 0), corrupted(scenes, kind, 3, 0), corrupted(scenes, kind, 2, 1)]
        assert not any(torch.equal(first[0], other[0][0]) for other in others)


@installed
@pytest.mark.slow
def test_every_kind_and_severity_with_the_package(scenes: DrawnImages) -> None:
    """Each picture is the package's own; harsher ones are further from the original, mostly."""
    rising = []
    for kind in KINDS:
        far = []
        for severity in SEVERITIES:
            images = corrupted(scenes, kind, severity, 7)
            image, label = images[2]
            assert image.shape == scenes.images[2].shape
            assert image.dtype == torch.uint8
            assert label == scenes.labels[2]
            np.random.seed(0)  # noqa: NPY002 - what is drawn must not depend on it
            assert torch.equal(images[2][0], image)
            far.append((image.float() - scenes.images[2].float()).square().mean().item())
        assert min(far) > 0, kind
        rising.append(far[-1] > far[0])
    assert sum(rising) >= 13


@installed
def test_an_image_that_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    class One:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("L", (40, 31)), 3

    with pytest.raises(UserError, match="Image 0 has 40 × 31 pixels"):
        corrupted(One(), "fog", 1, 0)[0]
