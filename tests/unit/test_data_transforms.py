"""Preprocessing, against the presets of the libraries themselves."""

import struct
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification

from salve.data.decode import UnknownWhite, read_rgb, to_rgb
from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess, to_uint8_tensor
from salve.types import UserError


@pytest.fixture
def photo() -> Image.Image:
    """Smooth, not square, different in every direction."""
    v, u = np.mgrid[0:90, 0:130] / 130
    channels = [u, v, 0.5 + 0.5 * np.sin(14 * u + 9 * v)]
    return Image.fromarray((np.stack(channels, axis=-1) * 255).astype(np.uint8))


def test_eval_agrees_with_torchvisions_preset(photo: Image.Image) -> None:
    ours = Preprocess(size=48, resize=56).eval_transform()(photo)
    theirs = ImageClassification(crop_size=48, resize_size=56)(photo)
    assert ours.shape == (3, 48, 48)
    assert (ours - theirs).abs().max() < 3 / 255 / min(IMAGENET_STD)


def test_eval_agrees_with_timms_bicubic_transform(photo: Image.Image) -> None:
    ours = Preprocess(48, 56, "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)).eval_transform()(photo)
    theirs = timm.data.create_transform(
        48, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=48 / 56, crop_mode="center"
    )(photo)
    assert (ours - theirs).abs().max() < 4 / 255 / 0.25


def test_without_resize_the_whole_image_is_squashed(photo: Image.Image) -> None:
    left_red_right_blue = Image.new("RGB", (80, 20), "red")
    left_red_right_blue.paste("blue", (40, 0, 80, 20))
    plain = Preprocess(16, None, mean=(0, 0, 0), std=(1, 1, 1))
    squashed = plain.eval_transform()(left_red_right_blue)
    assert squashed[0, :, :6].eq(1).all()
    assert squashed[2, :, 10:].eq(1).all()


def test_images_of_the_right_size_pass_unchanged() -> None:
    pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    for resize in (None, 32):
        out = Preprocess(32, resize, mean=(0, 0, 0), std=(1, 1, 1)).eval_transform()(pixels)
        torch.testing.assert_close(out, pixels / 255)


def test_denormalise_undoes_the_normalisation(photo: Image.Image) -> None:
    preprocess = Preprocess(64, 64)
    normalised = preprocess.eval_transform()(photo)[None]
    plain = Preprocess(64, 64, mean=(0, 0, 0), std=(1, 1, 1)).eval_transform()(photo)[None]
    torch.testing.assert_close(preprocess.denormalise(normalised), plain)
    assert preprocess.denormalise(normalised * 100).max() <= 1


def test_training_crops_differ_flip_and_follow_the_seed(photo: Image.Image) -> None:
    train = Preprocess(32, 36).train_transform()
    torch.manual_seed(3)
    first = torch.stack([train(photo) for _ in range(16)])
    torch.manual_seed(3)
    again = torch.stack([train(photo) for _ in range(16)])
    assert torch.equal(first, again)
    assert first.shape == (16, 3, 32, 32)
    # red grows to the right in the photo, so its slope tells the flipped crops apart
    rises = first[:, 0, :, -1].mean(1) > first[:, 0, :, 0].mean(1)
    assert 0 < rises.sum() < 16


def test_min_scale_bounds_what_a_crop_can_lose() -> None:
    v, u = np.mgrid[0:64, 0:64] / 64
    picture = torch.from_numpy((np.stack([u, v, v]) * 255).astype(np.uint8))
    for min_scale in (0.1, 0.9):
        train = Preprocess(64, None, mean=(0, 0, 0), std=(1, 1, 1)).train_transform(min_scale)
        crops = torch.stack([train(picture) for _ in range(40)])
        # the ranges of u and v that a crop spans multiply to its share of the area
        spans = crops.amax((2, 3)) - crops.amin((2, 3))
        smallest = (spans[:, 0] * spans[:, 1]).min()
        assert (smallest > 0.8) == (min_scale == 0.9)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "F"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
    red = Image.new("RGB", (8, 6), "red")
    converted = to_uint8_tensor(red.convert("RGB").convert("L").convert(mode) if mode == "LA" else red.convert(mode))
    assert converted.shape == (3, 6, 8)
    assert converted.dtype == torch.uint8
    if mode in ("P", "RGB", "RGBA", "CMYK", "YCbCr"):
        expected = torch.tensor([255, 0, 0]).view(3, 1, 1)
        assert (converted.int() - expected).abs().max() <= 2
    else:
        assert torch.equal(converted[0], converted[1])


def test_what_is_transparent_shows_white() -> None:
    for mode in ("RGBA", "LA", "PA"):
        assert to_uint8_tensor(Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert(mode)).eq(255).all(), mode
    palette = Image.new("RGB", (4, 4), "blue").convert("P")
    palette.info["transparency"] = bytes(256)  # every palette entry fully transparent
    assert to_uint8_tensor(palette).eq(255).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((5, 5), 65535 // 2, dtype=np.uint16))
    assert to_uint8_tensor(grey).eq(127).all()


GREY = np.asarray([[0, 51, 102], [153, 204, 255]], dtype=np.float64)


@pytest.mark.parametrize(
    ("dtype", "white", "suffix"),
    [(np.uint16, 65535, "png"), (np.uint16, 65535, "tif"), (np.int32, 255, "tif"), (np.int32, 65535, "tif"),
     (np.float32, 1, "tif"), (np.float32, 255, "tif"), (np.float32, 65535, "tif"), (np.uint16, 65535, "pgm")],
)  # fmt: skip
def test_grey_values_of_every_usual_range_look_alike(tmp_path: Path, dtype: type, white: int, suffix: str) -> None:
    path = tmp_path / f"grey.{suffix}"
    Image.fromarray((GREY / 255 * white).astype(dtype)).save(path)
    assert np.abs(np.asarray(read_rgb(path)) - GREY[:, :, None]).max() == 0


def test_twelve_bits_of_a_tiff_that_says_so(tmp_path: Path) -> None:
    """Two values in three bytes, which Pillow reads but does not write."""
    values = (GREY[:, :2] / 255 * 4095).round().astype(int)
    pixels = b"".join(((one << 12) + two).to_bytes(3, "big") for one, two in values.tolist())
    tags = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: len(pixels)}  # 273: where pixels are
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "12.tif").write_bytes(b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory)
    assert np.abs(np.asarray(read_rgb(tmp_path / "12.tif")) - GREY[:, :2, None]).max() <= 1


@pytest.mark.parametrize(
    ("values", "dtype"),
    [(GREY / 255 * 4095, np.uint16), (GREY * 4, np.int32), (GREY - 20, np.int32), (GREY * 1000, np.int32),
     (GREY / 60, np.float32), (GREY / 255 - 0.5, np.float32), (GREY * 1e4, np.float32)],
)  # fmt: skip
def test_grey_values_of_unknown_white_are_refused_until_it_is_given(values: np.ndarray, dtype: type) -> None:
    image = Image.fromarray(values.astype(dtype))
    with pytest.raises(UnknownWhite, match=r"unknown which one is white; set data\.white"):
        to_rgb(image)
    shown = np.asarray(to_rgb(image, white=float(values.max())))[:, :, 0]
    expected = (values / values.max() * 255).clip(0)
    assert np.abs(shown - expected).max() <= 1
    assert shown.max() == 255


def test_black_is_black_and_nonsense_is_refused() -> None:
    for dtype in (np.uint16, np.int32, np.float32):
        assert np.asarray(to_rgb(Image.fromarray(np.zeros((4, 4), dtype=dtype)))).max() == 0
    for wrong in (np.nan, np.inf):
        for white in (None, 1.0):
            with pytest.raises(UnknownWhite, match="not finite"):
                to_rgb(Image.fromarray(np.asarray([[0.5, wrong]], dtype=np.float32)), white)


def test_sixteen_bit_colours_that_would_be_black_are_refused(tmp_path: Path) -> None:
    for top, refused in ((65535, False), (4095, True)):
        path = tmp_path / f"{top}.png"
        write_rgb16(path, np.full((3, 4, 3), top, dtype=np.uint16))
        if refused:
            with pytest.raises(UnknownWhite, match="16-bit colours are almost black; save it with 8 bits"):
                read_rgb(path)
        else:
            assert np.asarray(read_rgb(path)).min() == 255


def write_rgb16(path: Path, pixels: np.ndarray) -> None:
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_camera_orientation_is_applied() -> None:
    picture = Image.new("RGB", (8, 4), "black")
    picture.paste("white", (0, 0, 1, 4))  # left edge
    picture.getexif()[0x0112] = 6  # the top of the scene is the right of the file
    upright = np.asarray(to_rgb(picture))
    assert upright.shape == (8, 4, 3)
    assert (upright[0] == 255).all()
    assert (upright[1:] == 0).all()


def test_wrong_values_are_refused() -> None:
    with pytest.raises(UserError, match=r"resize=32 must be at least preprocess.size=64"):
        Preprocess(64, 32)
    with pytest.raises(UserError, match="bilinear or bicubic"):
        Preprocess(64, 64, "nearest")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="std"):
        Preprocess(64, 64, std=(1, 1, 0))
    with pytest.raises(UserError, match="share of the image"):
        Preprocess(64, 64).train_transform(0)
    with pytest.raises(UserError, match=r"uint8 of shape \[3, H, W\]"):
        to_uint8_tensor(torch.zeros(1, 4, 4, dtype=torch.uint8))


def test_constants_are_imagenets() -> None:
    preset = ImageClassification(crop_size=224)
    assert (list(IMAGENET_MEAN), list(IMAGENET_STD)) == (preset.mean, preset.std)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "resize"), [(64, 64), (48, 64), (224, 256), (64, None)])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (101, 151), (151, 101), (67, 131), (333, 500), (99, 64)])
def test_masks_go_where_preprocessing_puts_their_pixels(
    height: int, width: int, size: int, resize: int | None, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    """The edge of a mask lies where an image of it crosses half its brightness."""
    preprocess = Preprocess(size, resize, interpolation, (0, 0, 0), (1, 1, 1))
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    masks[0, :, : width // 2] = True
    masks[1, : height // 2] = True
    moved = preprocess.moved_masks(masks)
    assert moved.shape == (2, size, size)
    for mask, found in zip(masks, moved, strict=True):
        shown = preprocess.eval_transform()((mask * 255).to(torch.uint8).expand(3, height, width))[0]
        sure = (shown - 0.5).abs() > 0.02  # at exactly a half, either side is right
        assert sure.any()
        assert torch.equal(found[sure], (shown > 0.5)[sure])
