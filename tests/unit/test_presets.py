"""The preprocessing that weights expect, wherever they come from, and the sentence about it."""

import math
from typing import Any

import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models import ResNet18_Weights, ViT_B_16_Weights

from salve.backbones import load_backbone, preset
from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from salve.types import UserError

RESNET10: dict[str, Any] = {"channels": (8, 16, 24, 32)}
#: Any path: only its being one counts.
FILE = "mine.safetensors"


def one_sentence(refused: pytest.ExceptionInfo[UserError]) -> str:
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def resnet_preset(overrides: dict[str, Any], native: int = 64, weights: str = "imagenet") -> Preprocess:
    return preset("torchvision", "resnet18", weights, nn.Module(), native, overrides).preprocess


def test_torchvisions_preset_is_that_of_the_weights() -> None:
    expected = Preprocess(size=224, resize=256, interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert resnet_preset({}) == expected


def test_torchvisions_preset_makes_the_same_pixels_as_torchvision() -> None:
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    theirs = ResNet18_Weights.DEFAULT.transforms()(image)
    # Resized in uint8 by both, which may round a pixel to the next level.
    assert (resnet_preset({}).eval_transform()(image) - theirs).abs().max() < 1.1 / 255 / min(IMAGENET_STD)


def test_random_weights_read_the_data_at_its_own_size() -> None:
    assert resnet_preset({}, native=64, weights="random") == Preprocess(size=64, resize=None)


@pytest.mark.parametrize("weights", ["imagenet", FILE])
def test_weights_from_a_file_have_the_preset_of_the_model(weights: str) -> None:
    assert resnet_preset({}, native=32, weights=weights) == Preprocess(224, 256)
    with torch.device("meta"):
        lite1 = timm.create_model("tf_efficientnet_lite1", num_classes=10)
    config: Any = lite1.pretrained_cfg
    expected = Preprocess(240, math.floor(240 / config["crop_pct"]), "bicubic", config["mean"], config["std"])
    assert preset("timm", "tf_efficientnet_lite1", weights, lite1, 32, {}).preprocess == expected


def test_weights_of_a_model_that_was_never_published_read_the_data_at_its_own_size() -> None:
    """As ``backbone=resnet_small``, whose channels are not those of any published weights."""
    model = timm.create_model("resnet10t", num_classes=5, **RESNET10)
    chosen, origin = preset("timm", "resnet10t", FILE, model, 64, {}, RESNET10)
    assert (chosen.size, chosen.resize) == (64, None)
    assert origin == (
        "the data's own size, since resnet10t is published without its backbone.args: squashed to 64 × 64, bicubic"
    )
    # Other arguments do not make another model.
    dropping: dict[str, Any] = {"drop_rate": 0.1}
    model = timm.create_model("resnet10t", num_classes=5, **dropping)
    assert preset("timm", "resnet10t", FILE, model, 64, {}, dropping).preprocess.size == 176
    wider: dict[str, Any] = {"width_per_group": 128}
    model = torchvision.models.resnet50(num_classes=5, **wider)
    assert preset("torchvision", "resnet50", FILE, model, 64, {}, wider).preprocess.size == 64


def test_resize_and_crop_can_be_had_for_any_weights() -> None:
    for weights in ("random", "imagenet", FILE):
        wanted = {"resize": 256, "size": 224}
        assert resnet_preset(wanted, native=64, weights=weights) == Preprocess(224, 256)
        assert resnet_preset({**wanted, "squash": False}, native=64, weights=weights) == Preprocess(224, 256)
    assert resnet_preset({"resize": 232}) == Preprocess(224, 232)
    # Without the pixels, the ratio is the preset's, or the usual one where the preset squashes.
    assert resnet_preset({"squash": False}, native=112, weights="random") == Preprocess(112, 128)
    assert resnet_preset({"squash": False, "size": 56}, native=112, weights="random") == Preprocess(56, 64)
    with torch.device("meta"):
        model: Any = timm.create_model("resnet10t", num_classes=5)
    model.pretrained_cfg = {**model.pretrained_cfg, "crop_mode": "squash"}
    assert preset("timm", "resnet10t", FILE, model, 64, {}).preprocess.resize is None
    cropped = preset("timm", "resnet10t", FILE, model, 64, {"squash": False, "size": 224}).preprocess
    assert (cropped.size, cropped.resize) == (224, 256)


@pytest.mark.parametrize(
    ("weights", "overrides", "origin"),
    [
        (FILE, {}, "torchvision's preset of resnet18: resize 256, crop 224, bilinear"),
        ("random", {}, "the data's own size, since the weights are random: squashed to 64 × 64, bilinear"),
        (
            FILE,
            {"size": 160, "squash": True, "mean": None},
            "torchvision's preset of resnet18, with size, squash set by backbone.preprocess: squashed to 160 × 160, "
            "bilinear",
        ),
    ],
)
def test_where_the_preprocessing_comes_from_is_said(weights: str, overrides: dict[str, Any], origin: str) -> None:
    assert preset("torchvision", "resnet18", weights, nn.Module(), 64, overrides).origin == origin


def test_a_size_that_the_architecture_fixes_is_said() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", img_size=98, depth=1)
    assert preset("timm", "vit_small_patch14_dinov2", FILE, model, 64, {}).origin == (
        "timm's preset of vit_small_patch14_dinov2 at its fixed size of 98 pixels: resize 98, crop 98, bicubic"
    )


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    assert resnet_preset({"size": 112, "squash": None}) == Preprocess(size=112, resize=128)
    assert resnet_preset({"size": 160, "squash": True}) == Preprocess(size=160, resize=None)
    assert resnet_preset({"squash": False}) == Preprocess(size=224, resize=256)
    assert resnet_preset({"interpolation": "bicubic"}) == Preprocess(224, 256, "bicubic")
    changed = resnet_preset({"mean": [0, 0.5, 1], "std": [1, 1, 2]})
    assert changed == Preprocess(224, 256, mean=(0.0, 0.5, 1.0), std=(1.0, 1.0, 2.0))
    assert resnet_preset({"size": 32}, native=64, weights="random") == Preprocess(size=32, resize=None)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"mean": [0.5]}, "mean"),
        ({"std": [0, 1, 1]}, "std"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"size": 0}, "size"),
        ({"resize": 200}, "resize=200"),
        ({"resize": 256, "squash": True}, "preprocess.resize=256"),
    ],
)
def test_impossible_overrides_are_named(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as refused:
        resnet_preset(overrides)
    assert named in one_sentence(refused)


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite1", "convnext_tiny", "test_vit"])
def test_timms_preset_makes_the_same_pixels_as_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)(pil)
    chosen = preset("timm", name, "imagenet", model, 64, {}).preprocess
    ours = chosen.eval_transform()(pil)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.05  # Pillow rounds to whole levels between resizing and scaling


def test_timms_preset_with_random_weights_reads_the_data_at_its_own_size() -> None:
    model: Any = timm.create_model("resnet10t", **RESNET10)
    chosen = preset("timm", "resnet10t", "random", model, 64, {}).preprocess
    assert (chosen.size, chosen.resize) == (64, None)
    assert chosen.mean == tuple(model.default_cfg["mean"])


@pytest.mark.parametrize("weights", ["imagenet", "random", FILE])
def test_a_vit_reads_the_size_that_it_is_built_for(weights: str) -> None:
    with torch.device("meta"):
        ours = timm.create_model("vit_small_patch14_dinov2", img_size=98, depth=1)
        theirs = torchvision.models.vit_b_16(image_size=64)
    assert preset("timm", "vit_small_patch14_dinov2", weights, ours, 224, {"squash": True}).preprocess.size == 98
    chosen = preset("torchvision", "vit_b_16", weights, theirs, 224, {}).preprocess
    assert (chosen.size, chosen.resize) == (64, round(64 * 256 / 224))


def test_torchvisions_vit_has_its_preset() -> None:
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    transform = ViT_B_16_Weights.DEFAULT.transforms()
    chosen = preset("torchvision", "vit_b_16", "imagenet", model, 64, {}).preprocess
    assert (chosen.size, chosen.resize) == (transform.crop_size[0], transform.resize_size[0])


@pytest.mark.parametrize(
    ("library", "name", "arguments", "argument"),
    [
        ("torchvision", "vit_b_16", {}, "image_size"),
        ("timm", "vit_small_patch14_dinov2", {"img_size": 98, "depth": 1}, "img_size"),
    ],
)
def test_a_size_that_a_vit_cannot_read_is_refused_and_the_one_it_reads_is_not(
    library: str, name: str, arguments: dict[str, Any], argument: str
) -> None:
    with torch.device("meta"):
        model = (
            getattr(torchvision.models, name)() if library == "torchvision" else timm.create_model(name, **arguments)
        )
    with pytest.raises(UserError, match=rf"preprocess\.size=56.*backbone\.args\.{argument}=56"):
        preset(library, name, "imagenet", model, 64, {"size": 56})
    size = 224 if library == "torchvision" else 98
    assert preset(library, name, "imagenet", model, 64, {"size": size}).preprocess.size == size


def test_a_vit_of_any_size_may_be_given_one() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_vit", dynamic_img_size=True)
    assert preset("timm", "test_vit", "random", model, 64, {"size": 64}).preprocess.size == 64


@pytest.mark.parametrize(
    ("library", "name", "size"),
    [
        ("timm", "maxvit_pico_rw_256", 256),
        # Another of timm's that reads no 64 pixels.
        pytest.param("timm", "halonet_h1", 256, marks=pytest.mark.nightly),
        ("torchvision", "inception_v3", 299),
        ("torchvision", "swin_t", 64),
        ("torchvision", "mobilenet_v3_small", 64),
    ],
)
def test_random_weights_read_the_data_at_their_own_size_only_where_the_network_can(
    library: str, name: str, size: int
) -> None:
    arguments: dict[str, Any] = {"init_weights": False} if name == "inception_v3" else {}
    model = load_backbone(library, name, "random", 5, arguments).model
    chosen, origin = preset(library, name, "random", model, 64, {})
    assert (chosen.size, chosen.resize) == (size, None)
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 5)
    if size == 64:
        assert origin.startswith("the data's own size, since the weights are random: squashed to 64 × 64")
    else:
        assert origin.startswith(
            f"a size that {name} can read, which the data's own 64 pixels are not: squashed to {size}"
        )
        with pytest.raises((AssertionError, RuntimeError, ValueError)):
            model(torch.zeros(2, 3, 64, 64))
    # What the user sets is taken.
    assert preset(library, name, "random", model, 64, {"size": 96}).preprocess.size == 96
