"""Image classifiers of Hugging Face's transformers: built, loaded, prepared for; nothing beside them is run."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from salve.backbones import find_site, load_backbone, preset, sites
from salve.backbones.hugging_face import read_preprocess
from salve.backbones.load import code_of
from salve.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from salve.run.inputs import _check_name
from salve.run.schema import Config
from salve.types import UserError

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install salve[transformers])"
)

SMALL: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 32, "patch_size": 8},
}
#: How its classes' names begin, its configuration, and the site that its head reads.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("ViT", SMALL, "classifier"),
    "deit": ("DeiT", SMALL, "classifier"),
    "beit": ("Beit", SMALL, "classifier"),
    "swin": (
        "Swin",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 4},
        "classifier",
    ),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}, "classifier"),
    "resnet": (
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "classifier.1",
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
Make = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Make:
    """``saved(family, classes)``: a folder with a small network of random weights."""

    def make(family: str, classes: int = 5) -> Path:
        name, arguments, _ = FAMILIES[family]
        config = getattr(transformers, f"{name}Config")(**arguments, num_labels=classes)
        torch.manual_seed(7)
        folder = tmp_path / family
        getattr(transformers, f"{name}ForImageClassification")(config).save_pretrained(folder)
        return folder

    return make


def load(folder: Path | str, weights: Path | str = "pretrained", classes: int = 5, *more: Any) -> Any:
    return load_backbone("transformers", str(folder), str(weights), classes, *more)


def refusal(*arguments: Any) -> str:
    with pytest.raises(UserError) as refused:
        load(*arguments)
    message = str(refused.value)
    assert "\n" not in message
    return message


@every_family
def test_it_gives_the_librarys_logits_under_its_own_names(saved: Make, family: str) -> None:
    folder = saved(family)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    model, fits, remark = load(folder)
    assert (fits, remark) == (True, "")
    state = theirs.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(logits, theirs(images).logits)
        # A copy, and what is sent to another process, give logits too.
        assert torch.equal(copy.deepcopy(model)(images), logits)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), logits)
    site = find_site(model, "last")
    assert (site.readers[0].path, site.width, site.map != "") == (FAMILIES[family][2], 16, True)


@every_family
@pytest.mark.slow
def test_its_graph_has_sites_inside(saved: Make, family: str) -> None:
    model = load(saved(family)).model.eval()
    found = sites(model, 32)
    assert len(found) > 3
    assert find_site(model, "last") in found.values()


@pytest.mark.parametrize("family", ["vit", "swin"])
@torch.no_grad()
def test_law_1_and_weights_that_the_library_can_load_again(saved: Make, family: str, tmp_path: Path) -> None:
    folder = saved(family)
    model = load(folder).model.double().eval()
    images, gate = torch.randn(2, 3, 32, 32).double(), torch.rand(16).double()
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gate,))
    expected = model(images)
    hook.remove()
    plain = model(images)
    model.classifier.weight.mul_(gate)
    torch.testing.assert_close(model(images), expected)
    assert not torch.allclose(plain, expected)
    state = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder)
    theirs.load_state_dict(state)


def test_a_file_of_weights_and_random_weights(saved: Make, tmp_path: Path) -> None:
    folder = saved("vit", 7)
    state = load(folder, "pretrained", 7).model.state_dict()
    path = tmp_path / "w.safetensors"
    save_file({f"module.{name}": tensor.contiguous() for name, tensor in state.items()}, path)
    model, fits, remark = load(folder, path, 7)
    assert fits
    assert remark == f"{path}: 'module.' is removed from the names of its tensors."
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.manual_seed(0)
    model, fits, _ = load(folder, "random", 3)
    assert not fits
    assert model.classifier.weight.shape == (3, 16)
    assert not torch.equal(model.vit.embeddings.cls_token, state["vit.embeddings.cls_token"])
    torch.manual_seed(0)
    assert torch.equal(load(folder, "random", 3).model.classifier.weight, model.classifier.weight)


def test_a_head_of_other_classes_is_replaced_or_kept(saved: Make) -> None:
    folder = saved("vit", 7)
    state = load(folder, "pretrained", 7).model.state_dict()
    model, fits, remark = load(folder, "pretrained", 3)
    assert not fits
    assert remark.startswith("pretrained: its head of 7 outputs is left out, and one of 3 outputs must be trained")
    assert model.classifier.weight.shape == (3, 16)
    assert all(
        torch.equal(tensor, state[name])
        for name, tensor in model.state_dict().items()
        if not name.startswith("classifier")
    )
    model, fits, _ = load(folder, "pretrained", 2, {}, [6, 0])
    assert fits
    assert torch.equal(model.classifier.weight, state["classifier.weight"])


def test_weights_without_a_head_get_one_and_others_must_be_whole(saved: Make) -> None:
    folder = saved("vit", 7)
    state = load_file(folder / "model.safetensors")
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    model, fits, remark = load(folder, "pretrained", 3)
    assert not fits
    assert "it has no head" in remark
    assert model.classifier.weight.shape == (3, 16)
    assert "has no head" in refusal(folder, "pretrained", 2, {}, [1, 0])
    headless.pop(next(name for name in headless if "layer" in name))
    save_file(headless, folder / "model.safetensors", {"format": "pt"})
    assert "lack" in refusal(folder, "pretrained", 3)


def test_half_precision_becomes_float32_and_nan_is_refused(saved: Make) -> None:
    folder = saved("vit")
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model = load(folder).model
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    state["classifier.bias"][0] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert "NaN or infinite values in classifier.bias" in refusal(folder)


def test_entries_of_the_configuration_can_be_changed(saved: Make) -> None:
    folder = saved("vit")
    assert load(folder, "random", 5, {"hidden_size": 8, "image_size": 16}).model.classifier.weight.shape == (5, 8)
    for name in ("depth", "auto_map", "num_labels", "_name_or_path", "trust_remote_code", "to_dict"):
        message = refusal(folder, "random", 5, {name: 3})
        assert f"backbone.args.{name} is no entry of the configuration of {folder}; its entries are" in message
        assert "num_hidden_layers" in message
    assert "have another shape for" in refusal(folder, "pretrained", 5, {"hidden_size": 8})


def test_results_depend_on_its_configuration(saved: Make) -> None:
    folder = saved("vit")
    model = load(folder).model
    before = code_of("transformers", str(folder), {}, model)
    assert before == code_of("transformers", str(saved("vit", 3)), {}, model)  # the number of outputs is that of data
    assert before != code_of("transformers", str(folder), {"hidden_act": "relu"}, model)


# -- what lies beside it


def test_code_that_lies_beside_it_is_not_run(saved: Make, tmp_path: Path) -> None:
    folder, proof = saved("vit"), tmp_path / "proof"
    code = (
        f"import os\nos.mkdir({str(proof)!r})\nfrom transformers import PreTrainedModel as Net, PretrainedConfig as C\n"
    )
    (folder / "theirs.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    there = {"AutoConfig": "theirs.C", "AutoModelForImageClassification": "theirs.Net"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": there}))
    assert type(load(folder).model).__name__ == "ViTForImageClassification"  # the library's own
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": there, "model_type": "theirs"}))
    assert f"backbone.name={folder} could not be loaded as an image classifier" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"image_processor_type": "Mine", "auto_map": {"AutoImageProcessor": "theirs.Mine"}, "size": 24}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    assert preset("transformers", str(folder), "pretrained", load(folder).model, 64, {}).preprocess.size == 24
    assert not proof.exists()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        import os

        return os.mkdir, (str(self.target),)


def test_weights_are_not_unpickled(saved: Make, tmp_path: Path) -> None:
    folder = saved("vit")
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "proof")}, folder / "pytorch_model.bin")
    assert "could not be loaded as an image classifier" in refusal(folder)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(("kind", "content"), [("empty", b""), ("cut short", b"\xff" * 8), ("text", b"not weights")])
def test_a_damaged_file_is_named(saved: Make, kind: str, content: bytes) -> None:
    folder = saved("vit")
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refusal(folder)


def test_what_is_no_image_classifier_is_refused(tmp_path: Path) -> None:
    assert "name on the hub (USER/MODEL)" in refusal(tmp_path / "nothing")
    assert "name on the hub (USER/MODEL)" in refusal("somebody/nothing")  # there is no network here
    bert = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    bert.save_pretrained(tmp_path / "bert")
    assert "could not be loaded as an image classifier" in refusal(tmp_path / "bert", "random")
    (tmp_path / "bert" / "config.json").write_text("{")
    assert "could not be loaded as an image classifier" in refusal(tmp_path / "bert", "random")


def test_names_are_checked_before_the_library_is_imported(saved: Make, tmp_path: Path) -> None:
    folder = saved("vit")
    for name in (str(folder), "google/vit-base-patch16-224", "resnet-50"):
        _check_name("transformers", name)
    for name in (str(tmp_path / "nothing"), "a/b/c", "../net", "https://huggingface.co/x"):
        with pytest.raises(UserError, match="is neither a folder nor a name on the hub"):
            _check_name("transformers", name)
    with pytest.raises(UserError, match=r"is a folder without config\.json"):
        _check_name("transformers", str(tmp_path))


def test_the_settings_name_it(composed: Callable[..., Config], saved: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("vit")
    backbone = composed("backbone=transformers", f"backbone.name={folder}").backbone
    assert (backbone.library, backbone.name, backbone.weights) == ("transformers", str(folder), "pretrained")
    monkeypatch.setenv("HOME", str(folder.parent))
    assert composed("backbone=transformers", 'backbone.name="~/vit"').backbone.name == str(folder)


# -- preprocessing


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("ViTImageProcessor", {}),
        ("ViTImageProcessor", {"do_normalize": False}),
        ("ConvNextImageProcessor", {}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
        ("BeitImageProcessor", {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}),
        ("DeiTImageProcessor", {}),
        ("CLIPImageProcessor", {}),
        ("EfficientNetImageProcessor", {"resample": 2}),
        ("EfficientNetImageProcessor", {"resample": 2, "rescale_offset": True, "rescale_factor": 1 / 127.5}),
    ],
)
def test_images_are_prepared_as_the_library_prepares_them(tmp_path: Path, kind: str, arguments: dict[str, Any]) -> None:
    processor = getattr(transformers, kind)(**arguments)
    processor.save_pretrained(tmp_path)
    chosen, _ = read_preprocess(json.loads((tmp_path / "preprocessor_config.json").read_text()))
    assert chosen is not None
    coarse = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse[None].float(), (400, 400), mode="bicubic").clamp(0, 255)[0]
    image = Image.fromarray(smooth.to(torch.uint8).permute(1, 2, 0).numpy())
    theirs: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = chosen.eval_transform()(image)
    assert ours.shape == theirs.shape
    # Both round to whole levels after resizing.
    assert (ours - theirs).abs().max() < 4 / 255 / min(chosen.std)
    assert (ours - theirs).abs().mean() < 1 / 255 / min(chosen.std)


def test_a_squash_before_a_crop_is_said() -> None:
    squashed = {
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }
    chosen, remark = read_preprocess(squashed)
    assert chosen == Preprocess(224, 256, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
    assert remark == ", whose processor squashes to 256 × 256 before the crop, where here images keep their shape"
    for nothing in ({}, {"size": None}, {"size": {"height": 3, "width": 4}}):
        assert read_preprocess(nothing) == (None, "")


def test_where_the_preprocessing_comes_from(saved: Make) -> None:
    folder = saved("convnext")
    model = load(folder).model
    chosen, origin = preset("transformers", str(folder), "pretrained", model, 64, {})
    assert origin.startswith(
        f"the usual, since {folder} has no preprocessor_config.json that names a size: squashed to 224"
    )
    transformers.ConvNextImageProcessor(size={"shortest_edge": 48}, crop_pct=0.75).save_pretrained(folder)
    chosen, origin = preset("transformers", str(folder), "pretrained", model, 64, {})
    assert (chosen.size, chosen.resize, chosen.interpolation) == (48, 64, "bicubic")
    assert origin == f"the preprocessor_config.json of {folder}: resize 64, crop 48, bicubic"
    chosen, origin = preset("transformers", str(folder), "random", model, 64, {})
    assert (chosen.size, chosen.resize, chosen.mean) == (64, None, (0.5, 0.5, 0.5))
    # A ViT reads its own size alone.
    fixed = saved("vit")
    chosen, origin = preset("transformers", str(fixed), "random", load(fixed).model, 64, {})
    assert chosen.size == 32
    assert origin.startswith(f"a size that {fixed} can read, which the data's own 64 pixels are not")
