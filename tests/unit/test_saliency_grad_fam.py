"""Grad-FAM against the grad-cam package and plain autograd; the model is left as it was."""

import copy
import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet

from salve.sae.models import SAE, VARIANTS, make_sae
from salve.saliency import grad_fam
from salve.types import UserError

DICTIONARY = 6
CNN_LATENTS = [4, 0, 2]


def random_sae(variant: str, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> SAE:
    """An SAE whose encoder, bias and b_dec all differ from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"k": 2} if "k" in VARIANTS[variant].takes else {}
    sae: Any = make_sae(variant, width, DICTIONARY, generator, **settings).eval()
    with torch.no_grad():
        sae.encoder.copy_(torch.randn(sae.encoder.shape, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(width, generator=generator))
        if sae.has_bias:
            sae.bias.copy_(0.1 * torch.randn(DICTIONARY, generator=generator))
        if variant == "gated":
            sae.magnitude.copy_(0.3 * torch.randn(DICTIONARY, generator=generator))
    return sae.to(dtype)


def make_images(count: int, height: int = 64, width: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(7), dtype=dtype)


def make_resnet(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval().to(dtype)  # a ResNet-10


def make_torchvision_vit(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    vit = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    # The heads are initialised to zero, and CLS too.
    nn.init.normal_(vit.class_token)
    return vit.eval().to(dtype)


def make_timm_vit(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "num_classes": 10,
    }
    return timm.create_model("vit_tiny_patch16_224", **{**small, **settings}).eval().to(dtype)


def by_autograd(
    model: nn.Module,
    sae: SAE,
    images: Tensor,
    latents: list[int],
    path: str,
    activation_of: Callable[[], Tensor],
    to_map: Callable[[Tensor], Tensor],
    start: float | None = None,
) -> Tensor:
    """The published formula with the whole network's graph: one image and one latent at a time.

    The first cell's centre is at pixel ``start``; by default the cells divide the image evenly.
    """
    maps = torch.zeros(len(images), len(latents), *images.shape[2:], dtype=images.dtype)
    for n, image in enumerate(images):
        for position, latent in enumerate(latents):
            seen: list[Tensor] = []

            def keep(_: nn.Module, __: object, output: Tensor, seen: list[Tensor] = seen) -> Tensor:
                output.retain_grad()
                seen.append(output)
                return output.clone()

            hook = model.get_submodule(path).register_forward_hook(keep)
            model(image[None])
            hook.remove()
            sae.encode(activation_of())[0, latent].backward()
            assert seen[0].grad is not None
            gradient, value = to_map(seen[0].grad)[0], to_map(seen[0].detach())[0]
            weighted = torch.stack([gradient[k].mean() * value[k] for k in range(len(value))]).sum(dim=0)
            maps[n, position] = drawn(weighted.clamp_min(0), images.shape[2:], start)
            model.zero_grad()
    return maps


def drawn(values: Tensor, size: Sequence[int], start: float | None) -> Tensor:
    """Cells ``[h, w]`` as an image, bilinear between their centres, by SciPy."""
    axes = []
    for length, count in zip(size, values.shape, strict=True):
        stride = length / count
        axes.append((np.arange(length) - ((stride - 1) / 2 if start is None else start)) / stride)
    places = np.meshgrid(*axes, indexing="ij")
    return torch.from_numpy(map_coordinates(values.detach().numpy(), places, order=1, mode="nearest"))


class ReaderInput:
    """Remembers what the head was given."""

    def __init__(self, head: nn.Module) -> None:
        head.register_forward_pre_hook(self.remember)

    def remember(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.value = inputs[0]

    def __call__(self) -> Tensor:
        return self.value


def tokens_to_map(prefix: int, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    def to_map(tokens: Tensor) -> Tensor:
        return tokens[:, prefix:].reshape(len(tokens), rows, columns, -1).permute(0, 3, 1, 2)

    return to_map


def unchanged(value: Tensor) -> Tensor:
    return value


@pytest.mark.parametrize("variant", VARIANTS)
def test_closed_form_is_what_autograd_gives(variant: str) -> None:
    model, images = make_resnet(torch.float64), make_images(3, dtype=torch.float64)
    sae = random_sae(variant, 512, torch.float64)
    oracle_model = copy.deepcopy(model)
    oracle = by_autograd(oracle_model, sae, images, CNN_LATENTS, "layer4", ReaderInput(oracle_model.fc), unchanged, 0)
    maps = grad_fam(model, "avgpool", sae, images, CNN_LATENTS)
    assert maps.dtype == torch.float64
    assert not maps.requires_grad
    assert maps.max() > 0
    torch.testing.assert_close(maps, oracle, rtol=1e-9, atol=1e-12)


def test_both_branches_agree_and_the_default_needs_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, sae = make_resnet(torch.float64), make_images(2, dtype=torch.float64), random_sae("relu_l1", 512)
    sae = sae.double()
    by_gradient = grad_fam(model, "avgpool", sae, images, range(DICTIONARY), at="layer4")

    def refuse(*_: object) -> None:
        raise AssertionError("the closed form was not used")

    monkeypatch.setattr(importlib.import_module("salve.saliency.grad_fam"), "_by_gradient", refuse)
    closed = grad_fam(model, "avgpool", sae, images, range(DICTIONARY))
    assert closed.amax(dim=(2, 3)).gt(0).any()
    torch.testing.assert_close(closed, by_gradient, rtol=1e-9, atol=1e-12)


def test_signs_ask_for_the_negated_latent() -> None:
    model, images, sae = make_resnet(), make_images(2), random_sae("linear_l1", 512)
    negated = copy.deepcopy(sae)
    with torch.no_grad():
        negated.encoder.neg_()
    expected = grad_fam(model, "last", negated, images, [1])
    for at in (None, "layer4"):
        maps = grad_fam(model, "last", sae, images, [1, 1], at=at, signs=torch.tensor([1, -1]))
        torch.testing.assert_close(maps[:, 1:], expected, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(maps[:, 0], maps[:, 1])


@pytest.mark.parametrize(
    ("make", "head", "path", "prefix", "grid"),
    [
        (make_torchvision_vit, "heads.head", "encoder.layers.encoder_layer_1.ln_1", 1, (4, 4)),
        (make_timm_vit, "head", "blocks.1.norm1", 1, (4, 4)),
        (lambda dtype: make_timm_vit(dtype, global_pool="avg", reg_tokens=2), "head", "blocks.1.norm1", 3, (4, 4)),
        (lambda dtype: make_timm_vit(dtype, img_size=(32, 64)), "head", "blocks.1.norm1", 1, (4, 8)),
    ],
    ids=["torchvision", "timm", "timm-avg-registers", "timm-oblong"],
)
def test_vit_maps_are_what_autograd_gives(
    make: Callable[..., nn.Module], head: str, path: str, prefix: int, grid: tuple[int, int]
) -> None:
    model = make(torch.float64)
    images = make_images(2, 8 * grid[0], 8 * grid[1], torch.float64)
    sae = random_sae("linear_l1", 32, torch.float64)
    oracle_model = copy.deepcopy(model)
    activation = ReaderInput(oracle_model.get_submodule(head))
    oracle = by_autograd(oracle_model, sae, images, [5, 1], path, activation, tokens_to_map(prefix, *grid))
    maps = grad_fam(model, "last", sae, images, torch.tensor([5, 1]))
    assert maps.max() > 0
    torch.testing.assert_close(maps, oracle, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("variant", ["linear_l1", "topk"])
def test_more_latents_than_channels_need_no_more_backward_passes(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = make_timm_vit(torch.float64), make_images(2, 32, 32, torch.float64)
    sae, width = random_sae(variant, 32, torch.float64), 32
    latents = [i % DICTIONARY for i in range(width + 1)]
    signs = torch.tensor([1 - 2 * (i % 2) for i in range(width + 1)])
    expected = [grad_fam(model, "last", sae, images, latents[i : i + 11], signs=signs[i : i + 11]) for i in (0, 11, 22)]
    passes, backward = [0], torch.autograd.grad

    def counted(*arguments: Any, **settings: Any) -> Any:
        passes[0] += 1
        return backward(*arguments, **settings)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    maps = grad_fam(model, "last", sae, images, latents, signs=signs)
    assert passes[0] == width + 2  # one to probe the map, one through the SAE's activation function
    assert maps.max() > 0
    torch.testing.assert_close(maps, torch.cat(expected, dim=1), rtol=1e-9, atol=1e-12)


def test_an_earlier_module_with_in_place_work_behind_it() -> None:
    # The residual sum adds to this batch norm's output in place, and the ReLU behind it is in place too.
    model, images = make_resnet(torch.float64), make_images(1, dtype=torch.float64)
    sae = random_sae("linear_l1", 512, torch.float64)
    oracle_model = copy.deepcopy(model)
    oracle = by_autograd(oracle_model, sae, images, [3], "layer3.0.bn2", ReaderInput(oracle_model.fc), unchanged, 0)
    maps = grad_fam(model, "last", sae, images, [3], at="layer3.0.bn2")
    assert maps.max() > 0
    torch.testing.assert_close(maps, oracle, rtol=1e-8, atol=1e-12)


def test_channels_last_maps() -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (1, 1),
        "num_heads": (2, 2),
    }
    model: Any = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10, **settings).eval().double()
    images, sae = make_images(2, 32, 32, torch.float64), random_sae("linear_l1", 32, torch.float64)
    oracle_model = copy.deepcopy(model)
    activation = ReaderInput(oracle_model.head.fc)
    for path, at in (("norm", None), ("layers.0", "layers.0")):
        oracle = by_autograd(
            oracle_model, sae, images, [0, 3], path, activation, lambda value: value.permute(0, 3, 1, 2)
        )
        maps = grad_fam(model, "last", sae, images, [0, 3], at=at)
        assert maps.max() > 0
        torch.testing.assert_close(maps, oracle, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["resnet", "torchvision-vit", "timm-vit"])
def test_against_the_grad_cam_package(kind: str) -> None:
    from pytorch_grad_cam import GradCAM

    if kind == "resnet":
        model, size, width, to_map = make_resnet(), 160, 512, None
        latent_model = copy.deepcopy(model)
        latent_model.fc, target_layer = nn.Linear(width, DICTIONARY), latent_model.layer4
        head = latent_model.fc
    elif kind == "torchvision-vit":
        model, size, width, to_map = make_torchvision_vit(), 32, 32, tokens_to_map(1, 4, 4)
        latent_model = copy.deepcopy(model)
        latent_model.heads.head = nn.Linear(width, DICTIONARY)
        head, target_layer = latent_model.heads.head, latent_model.encoder.layers[-1].ln_1
    else:
        model, size, width, to_map = make_timm_vit(), 32, 32, tokens_to_map(1, 4, 4)
        latent_model = copy.deepcopy(model)
        latent_model.head = nn.Linear(width, DICTIONARY)
        head, target_layer = latent_model.head, latent_model.blocks[-1].norm1
    sae = random_sae("linear_l1", width)
    # A classifier whose "classes" are the latents.
    with torch.no_grad():
        head.weight.copy_(sae.encoder)
        head.bias.copy_(-sae.encoder @ sae.b_dec)
    images = make_images(3, size, size)
    maps = grad_fam(model, "last", sae, images, range(DICTIONARY))
    compared = 0
    with GradCAM(latent_model, [target_layer], reshape_transform=to_map) as cam:
        if kind == "resnet":  # where the package does not see to it that cells lie where they look: cell by cell
            maps = maps[:, :, ::32, ::32]
            cam.get_target_width_height = lambda _: None
        for latent in range(DICTIONARY):
            targets = [lambda output, latent=latent: output[latent]] * len(images)
            theirs = torch.from_numpy(cam(images, targets)).float()
            for ours, other in zip(maps[:, latent], theirs, strict=True):
                if ours.max() == 0:
                    assert other.max() == 0
                    continue
                # The package scales every map to 0..1 and resizes with OpenCV.
                scaled = (ours - ours.min()) / (ours.max() - ours.min())
                torch.testing.assert_close(scaled, other, rtol=0, atol=1e-4)
                compared += 1
    assert compared >= DICTIONARY


@pytest.mark.parametrize(
    ("make", "width", "wrong", "default"),
    [
        (make_torchvision_vit, 32, "encoder.ln", "encoder.layers.encoder_layer_1.ln_1"),
        (make_torchvision_vit, 32, "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_1.ln_1"),
        (make_timm_vit, 32, "norm", "blocks.1.norm1"),
        (make_timm_vit, 32, "blocks.1", "blocks.1.norm1"),
    ],
)
def test_patch_tokens_after_the_last_block_are_refused(
    make: Callable[[], nn.Module], width: int, wrong: str, default: str
) -> None:
    images, sae = make_images(2, 32, 32), random_sae("relu_l1", width)
    with pytest.raises(UserError, match=f"{wrong}.*does not depend on.*{default}"):
        grad_fam(make(), "last", sae, images, [0], at=wrong)


def test_the_same_tokens_are_right_when_the_model_averages_its_patches() -> None:
    model, sae = make_timm_vit(global_pool="avg", class_token=False, fc_norm=False), random_sae("linear_l1", 32)
    maps = grad_fam(model, "last", sae, make_images(2, 32, 32), range(DICTIONARY), at="norm")
    assert maps.amax(dim=(2, 3)).gt(0).any()


@pytest.mark.parametrize(
    ("make", "size", "width", "at"),
    [(make_resnet, 64, 512, None), (make_resnet, 64, 512, "layer3"), (make_torchvision_vit, 32, 32, None)],
)
def test_an_inactive_latent_has_a_blank_map(
    make: Callable[[], nn.Module], size: int, width: int, at: str | None
) -> None:
    sae = random_sae("relu_l1", width)
    with torch.no_grad():
        sae.bias[2] = -1e6
    maps = grad_fam(make(), "last", sae, make_images(2, size, size), [2, 2], at=at)
    assert maps.shape == (2, 2, size, size)
    assert maps.eq(0).all()


def make_pooling_resnet(dtype: torch.dtype) -> nn.Module:
    """A network whose shortcuts have other receptive fields than their branches, depending on the image."""
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet10t", channels=(8, 16, 24, 32), output_stride=8, num_classes=10, zero_init_last=False
    )
    return model.eval().to(dtype)


@pytest.mark.parametrize(
    ("make", "size", "width"), [(make_resnet, 64, 512), (make_pooling_resnet, 64, 32), (make_torchvision_vit, 32, 32)]
)
def test_an_image_alone_gets_the_map_it_gets_in_a_batch(make: Callable[..., nn.Module], size: int, width: int) -> None:
    model, sae = make(torch.float64), random_sae("topk", width, torch.float64)
    images = make_images(4, size, size, torch.float64)
    together = grad_fam(model, "last", sae, images, range(DICTIONARY))
    alone = torch.cat([grad_fam(model, "last", sae, image[None], range(DICTIONARY)) for image in images])
    one_latent = torch.cat([grad_fam(model, "last", sae, images, [latent]) for latent in range(DICTIONARY)], dim=1)
    torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one_latent, together, rtol=1e-9, atol=1e-12)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad for parameter in model.parameters()],
        "state": {name: value.clone() for name, value in model.state_dict().items()},
    }


def assert_as_found(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, old_state = after.pop("state"), before["state"]
    assert after == {key: value for key, value in before.items() if key != "state"}
    assert all(torch.equal(value, old_state[name]) for name, value in state.items())


@pytest.mark.parametrize("at", [None, "layer3", "fc", "layer4.0.relu", "nowhere"])
def test_the_model_is_left_as_found(at: str | None) -> None:
    model, sae = make_resnet(), random_sae("relu_l1", 512)
    model.train()
    model.layer2.eval()
    model.conv1.requires_grad_(False)
    before, sae_before = snapshot(model), snapshot(sae)
    if at in (None, "layer3"):
        grad_fam(model, "last", sae, make_images(2), [0, 1], at=at)
    else:
        with pytest.raises(UserError):
            grad_fam(model, "last", sae, make_images(2), [0, 1], at=at)
    assert torch.is_grad_enabled()
    assert_as_found(model, before)
    assert_as_found(sae, sae_before)


def test_the_model_is_left_as_found_when_its_own_code_fails() -> None:
    model, sae = make_resnet(), random_sae("relu_l1", 512)
    model.train()
    model.fc = nn.Linear(13, 10)
    model.fc.in_features = 512
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        grad_fam(model, "last", sae, make_images(1), [0])
    assert torch.is_grad_enabled()
    assert_as_found(model, before)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_works_where_the_caller_has_switched_gradients_off(context: Callable[[], AbstractContextManager[None]]) -> None:
    model, sae = make_torchvision_vit(), random_sae("linear_l1", 32)
    expected = grad_fam(model, "cls", sae, make_images(2, 32, 32), [0, 1])
    with context():
        latents, signs = torch.tensor([0, 1]), torch.tensor([1.0, 1.0])
        maps = grad_fam(model, "cls", sae, make_images(2, 32, 32), latents, signs=signs)
        assert not torch.is_grad_enabled()
    assert expected.max() > 0
    torch.testing.assert_close(maps, expected)


def test_works_on_images_made_in_inference_mode() -> None:
    model, sae = make_resnet(), random_sae("linear_l1", 512)
    expected = grad_fam(model, "last", sae, make_images(2), range(DICTIONARY))
    with torch.inference_mode():
        images = make_images(2).to(memory_format=torch.channels_last)  # as the model is given them: not copied
        maps = grad_fam(model, "last", sae, images, range(DICTIONARY))
    assert expected.max() > 0
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": "layer9"}, "layer9 is no site"),
        ({"images": torch.zeros(3, 64, 64)}, r"must be \[N, 3, H, W\]"),
        ({"images": torch.zeros(2, 1, 64, 64)}, r"must be \[N, 3, H, W\]"),
        ({"images": torch.full((1, 3, 64, 64), torch.nan)}, "NaN or infinite"),
        ({"images": torch.zeros(1, 3, 64, 64, dtype=torch.float64)}, "same floating-point dtype"),
        (
            {"latents": [0, DICTIONARY]},
            f"Latent {DICTIONARY} does not exist; this SAE has latents 0 to {DICTIONARY - 1}",
        ),
        ({"latents": [-1]}, "Latent -1 does not exist"),
        ({"latents": []}, "at least one latent"),
        ({"latents": torch.tensor([0.5])}, "must be integers"),
        ({"signs": torch.ones(2)}, "one sign for each"),
        ({"signs": torch.tensor([0.5])}, r"\+1 or -1"),
        ({"at": "nowhere"}, "nowhere is no module.*the input of avgpool"),
        ({"at": "layer4.0.relu"}, "runs several times"),
        ({"at": "fc"}, "neither a map"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"layer": "last", "images": make_images(1), "latents": [0], **change}
    with pytest.raises(UserError, match=message):
        grad_fam(make_resnet(), arguments.pop("layer"), random_sae("linear_l1", 512), **arguments)


@pytest.mark.parametrize("at", [None, "layer4"])
def test_an_sae_of_another_site_is_refused(at: str | None) -> None:
    with pytest.raises(UserError, match=r"SAE reads 64 channels, but the site avgpool has 512"):
        grad_fam(make_resnet(), "last", random_sae("linear_l1", 64), make_images(1), [0], at)


def test_tokens_that_are_no_grid_are_refused() -> None:
    # Before the CLS token is put in front there are 16 tokens; without a prefix to strip they would be 4 × 4.
    with pytest.raises(UserError, match=r"15 tokens .* are no grid .* 32 x 32"):
        grad_fam(make_timm_vit(), "last", random_sae("linear_l1", 32), make_images(1, 32, 32), [0], at="patch_embed")


def test_a_module_that_does_not_run_is_refused() -> None:
    model = make_resnet()
    model.unused = nn.Identity()
    with pytest.raises(UserError, match="does not run in a forward pass"):
        grad_fam(model, "last", random_sae("linear_l1", 512), make_images(1), [0], at="unused")
