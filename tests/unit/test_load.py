"""Weights from anywhere: cast, checked key by key, never unpickled; and the preprocessing that they expect."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, ViT_B_16_Weights, resnet18

from salve.backbones import load_backbone, preset, read_state_dict
from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from salve.types import UserError

RESNET10 = {"channels": (8, 16, 24, 32)}


def small(classes: int = 5) -> nn.Module:
    return timm.create_model("resnet10t", num_classes=classes, **RESNET10)


def load(weights: Path | str, classes: int = 5) -> tuple[nn.Module, bool]:
    return load_backbone("timm", "resnet10t", str(weights), classes, RESNET10)


def written(path: Path, state: dict[str, Tensor]) -> Path:
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def one_sentence(refused: pytest.ExceptionInfo[UserError]) -> str:
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


# -- weights that fit


def test_random_weights_have_the_right_head_which_is_not_trained() -> None:
    model, fits = load("random", 7)
    assert not fits
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_random_weights_follow_the_seed() -> None:
    def weights() -> Tensor:
        torch.manual_seed(3)
        return load("random")[0].fc.weight

    assert torch.equal(weights(), weights())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "no_suffix"])
def test_a_file_gives_back_the_same_bits(tmp_path: Path, name: str) -> None:
    state = small().state_dict()
    model, fits = load(written(tmp_path / name, state))
    assert fits
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_half_precision_is_cast_to_float32(tmp_path: Path, half: torch.dtype, name: str) -> None:
    state = {key: value.to(half) if value.is_floating_point() else value for key, value in small().state_dict().items()}
    path = written(tmp_path / name, state)
    read = read_state_dict(path)
    assert {value.dtype for value in read.values()} == {torch.float32, torch.int64}  # int64 counts batches
    model, _ = load(path)
    assert all(torch.equal(model.state_dict()[key], state[key].to(read[key].dtype)) for key in state)


def test_torchvision_weights_load_into_torchvision_models(tmp_path: Path) -> None:
    state = resnet18(num_classes=5).state_dict()
    model, fits = load_backbone("torchvision", "resnet18", str(written(tmp_path / "w.safetensors", state)), 5)
    assert fits
    assert type(model) is torchvision.models.ResNet
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)


def test_a_head_of_another_size_is_replaced_and_has_to_be_trained(tmp_path: Path) -> None:
    state = small(11).state_dict()
    model, fits = load(written(tmp_path / "w.safetensors", state), 4)
    assert not fits
    assert model.fc.weight.shape == (4, 32)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state if not key.startswith("fc."))


def test_a_model_that_has_no_head_by_itself_gets_one_that_fits_the_file(tmp_path: Path) -> None:
    """timm's DINOv2 models are made without a head unless asked for one."""
    arguments = {"img_size": 28, "depth": 1}
    state = timm.create_model("vit_small_patch14_dinov2", num_classes=6, **arguments).state_dict()
    path = str(written(tmp_path / "w.safetensors", state))
    model, fits = load_backbone("timm", "vit_small_patch14_dinov2", path, 6, arguments)
    assert fits
    assert torch.equal(model.head.weight, state["head.weight"])
    _, fits = load_backbone("timm", "vit_small_patch14_dinov2", path, 3, arguments)
    assert not fits


# -- weights that do not


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight"), ["lacks", "layer1.0.conv1.weight"]),
        (lambda s: s.pop("fc.weight"), ["lacks", "fc.weight"]),
        (lambda s: s.update({"module.extra": torch.zeros(1)}), ["unknown", "module.extra"]),
        (lambda s: s.update({"bn1.weight": torch.zeros(3)}), ["shape", "bn1.weight"]),
        (lambda s: s.update({"fc.weight": torch.zeros(5, 9)}), ["shape", "fc.weight"]),
        (lambda s: s.update({"fc.weight": torch.zeros(5)}), ["shape", "fc.weight"]),
        (lambda s: s.clear(), ["lacks", "more"]),
    ],
    ids=["missing", "no head", "unknown", "shape", "width of the head", "axes of the head", "empty"],
)
def test_weights_that_do_not_fit_are_refused_by_key(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], named: list[str]
) -> None:
    state = dict(small().state_dict())
    change(state)
    path = written(tmp_path / "w.safetensors", state)
    with pytest.raises(UserError) as refused:
        load(path)
    assert all(part in one_sentence(refused) for part in [str(path), "ResNet", *named])


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


def as_torch_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("wrap", [pickle.dumps, as_torch_file], ids=["plain pickle", "torch file"])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_code_in_a_file_is_never_run(tmp_path: Path, wrap: Callable[[Any], bytes], name: str) -> None:
    target = tmp_path / "made-by-the-file"
    (tmp_path / name).write_bytes(wrap({"conv1.weight": torch.ones(1), "x": Malicious(target)}))
    with pytest.raises(UserError) as refused:
        load(tmp_path / name)
    assert name in one_sentence(refused)
    assert not target.exists()
    os.mkdir(target)  # what it would have done is possible


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights at all", b"\x80\x02", b"PK\x03\x04 damaged", as_torch_file({"a": torch.ones(9)})[:-40]],
    ids=["empty", "text", "pickle", "zip", "cut short"],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_state_dict(tmp_path / name)
    assert name in one_sentence(refused)


@pytest.mark.parametrize(
    "content",
    [[torch.ones(1)], {"state_dict": {"a": torch.ones(1)}, "epoch": 3}, {0: torch.ones(1)}, torch.ones(1)],
    ids=["list", "checkpoint", "numbered", "tensor"],
)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match="no state_dict"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize("weights", ["missing.safetensors", "imagnet", "."])
def test_a_file_that_is_not_there_is_named_with_the_other_choices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        load(weights)
    assert all(part in one_sentence(refused) for part in (f"backbone.weights={weights}", "random", "imagenet"))


# -- models that cannot be built


@pytest.mark.parametrize(
    ("library", "name", "near"),
    [
        ("torchvision", "renset18", "resnet18"),
        ("torchvision", "vit_b16", "vit_b_16"),
        ("timm", "resnet10", "resnet10t"),
    ],
)
def test_an_unknown_model_suggests_names_near_it(library: str, name: str, near: str) -> None:
    with pytest.raises(UserError) as refused:
        load_backbone(library, name, "random", 5)
    assert f"backbone.name={name}" in one_sentence(refused)
    assert near in str(refused.value)


def test_a_name_like_no_other_is_refused_without_suggestions() -> None:
    with pytest.raises(UserError, match=r"backbone\.name=zzzzzzzzzz is no model of timm\.$"):
        load_backbone("timm", "zzzzzzzzzz", "random", 5)


def test_an_unknown_library_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"backbone\.library=keras .*torchvision and timm"):
        load_backbone("keras", "resnet18", "random", 5)


@pytest.mark.parametrize(
    ("library", "name", "arguments"),
    [
        ("torchvision", "resnet18", {"depth": 3}),
        ("timm", "resnet10t", {"depth": 3}),
        ("torchvision", "vit_b_16", {"image_size": 33}),
        ("timm", "resnet10t", {"act_layer": "nonsense"}),
    ],
)
def test_arguments_that_the_library_refuses_are_named(library: str, name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        load_backbone(library, name, "random", 5, arguments)
    assert name in one_sentence(refused)
    assert all(f"{key}" in str(refused.value) for key in arguments)


def test_a_model_without_a_site_is_refused_before_its_weights_are_used(tmp_path: Path) -> None:
    path = written(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    with pytest.raises(UserError, match="MobileNetV3"):
        load_backbone("torchvision", "mobilenet_v3_small", str(path), 5)


# -- the libraries' own weights


def test_torchvisions_weights_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(UserError) as refused:
        load_backbone("torchvision", "resnet18", "imagenet", 5)
    assert all(part in one_sentence(refused) for part in ("resnet18", "Name or service", "backbone.weights", "random"))


def test_timms_weights_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """HF_HUB_OFFLINE, which all tests run under, makes the hub refuse as it does without a network."""
    with pytest.raises(UserError) as refused:
        load_backbone("timm", "resnet10t", "imagenet", 5)
    assert all(part in one_sentence(refused) for part in ("resnet10t", "backbone.weights", "random"))


def test_torchvisions_weights_once_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    state = resnet18().state_dict()
    asked: list[str] = []

    def download(url: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        asked.append(url)
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    model, fits = load_backbone("torchvision", "resnet18", "imagenet", 5)
    assert asked == [ResNet18_Weights.DEFAULT.url]
    assert not fits
    assert model.fc.out_features == 5
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state if not key.startswith("fc."))
    model, fits = load_backbone("torchvision", "resnet18", "imagenet", 1000)
    assert not fits  # as many classes, but not the same ones
    assert not torch.equal(model.fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("name", "arguments", "head"),
    [("resnet10t", {}, "fc."), ("vit_small_patch14_dinov2", {"depth": 1}, "head.")],
    ids=["with a head", "without a head"],
)
def test_timms_weights_once_downloaded(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any], head: str
) -> None:
    state = timm.create_model(name, **arguments).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    model, fits = load_backbone("timm", name, "imagenet", 5, arguments)
    assert not fits
    assert model.get_classifier().out_features == 5
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state if not key.startswith(head))


# -- preprocessing


def resnet_preset(overrides: dict[str, Any], native: int = 64, pretrained: bool = True) -> Preprocess:
    return preset("torchvision", "resnet18", nn.Module(), native, overrides, pretrained)


def test_torchvisions_preset_is_that_of_the_weights() -> None:
    expected = Preprocess(size=224, resize=256, interpolation="bilinear", mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert resnet_preset({}) == expected


def test_torchvisions_preset_makes_the_same_pixels_as_torchvision() -> None:
    image = torch.randint(0, 256, (3, 300, 400), dtype=torch.uint8)
    theirs = ResNet18_Weights.DEFAULT.transforms()(image)
    # Resized in uint8 by both, which may round a pixel to the next level.
    assert (resnet_preset({}).eval_transform()(image) - theirs).abs().max() < 1.1 / 255 / min(IMAGENET_STD)


def test_random_weights_read_the_data_at_its_own_size() -> None:
    assert resnet_preset({}, native=64, pretrained=False) == Preprocess(size=64, resize=None)


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    assert resnet_preset({"size": 112, "squash": None}) == Preprocess(size=112, resize=128)
    assert resnet_preset({"size": 160, "squash": True}) == Preprocess(size=160, resize=None)
    assert resnet_preset({"squash": False}) == Preprocess(size=224, resize=256)
    assert resnet_preset({"interpolation": "bicubic"}) == Preprocess(224, 256, "bicubic")
    changed = resnet_preset({"mean": [0, 0.5, 1], "std": [1, 1, 2]})
    assert changed == Preprocess(224, 256, mean=(0.0, 0.5, 1.0), std=(1.0, 1.0, 2.0))
    assert resnet_preset({"size": 32}, native=64, pretrained=False) == Preprocess(size=32, resize=None)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"mean": [0.5]}, "mean"),
        ({"std": [0, 1, 1]}, "std"),
        ({"interpolation": "cubic"}, "bicubic"),
        ({"size": 0}, "size"),
    ],
)
def test_impossible_overrides_are_named(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError) as refused:
        resnet_preset(overrides)
    assert named in one_sentence(refused)


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "convnext_atto", "test_vit"])
def test_timms_preset_makes_the_same_pixels_as_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    pil = Image.fromarray(image.permute(1, 2, 0).numpy())
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)(pil)
    chosen = preset("timm", name, model, 64, {}, pretrained=True)
    ours = chosen.eval_transform()(pil)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 0.05  # Pillow rounds to whole levels between resizing and scaling


def test_timms_preset_with_random_weights_reads_the_data_at_its_own_size() -> None:
    model = timm.create_model("resnet10t", **RESNET10)
    chosen = preset("timm", "resnet10t", model, 64, {}, pretrained=False)
    assert (chosen.size, chosen.resize) == (64, None)
    assert chosen.mean == tuple(model.default_cfg["mean"])


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_vit_reads_the_size_that_it_is_built_for(pretrained: bool) -> None:
    with torch.device("meta"):
        ours = timm.create_model("vit_small_patch14_dinov2", img_size=98, depth=1)
        theirs = torchvision.models.vit_b_16(image_size=64)
    assert preset("timm", "vit_small_patch14_dinov2", ours, 224, {"squash": True}, pretrained).size == 98
    chosen = preset("torchvision", "vit_b_16", theirs, 224, {}, pretrained)
    assert (chosen.size, chosen.resize) == (64, round(64 * 256 / 224))


def test_torchvisions_vit_has_its_preset() -> None:
    with torch.device("meta"):
        model = torchvision.models.vit_b_16()
    transform = ViT_B_16_Weights.DEFAULT.transforms()
    chosen = preset("torchvision", "vit_b_16", model, 64, {}, pretrained=True)
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
        preset(library, name, model, 64, {"size": 56}, pretrained=True)
    size = 224 if library == "torchvision" else 98
    assert preset(library, name, model, 64, {"size": size}, pretrained=True).size == size


def test_a_vit_of_any_size_may_be_given_one() -> None:
    with torch.device("meta"):
        model = timm.create_model("test_vit", dynamic_img_size=True)
    assert preset("timm", "test_vit", model, 64, {"size": 64}, pretrained=False).size == 64
