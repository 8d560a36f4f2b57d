"""Activation maximisation on models whose best image is known, and on a small network."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import BasicBlock, ResNet

from salve.data.transforms import Preprocess
from salve.sae.models import SAE, make_sae
from salve.saliency import maximise
from salve.types import UserError

SIZE = 32


class MeanColour(nn.Module):
    """Its activation is the image's mean colour, so the image that a latent likes best is known."""

    def __init__(self) -> None:
        super().__init__()
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(3, 2)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.global_pool(images))


def colour_sae(*rows: list[float]) -> SAE:
    sae = make_sae("linear_l1", 3, len(rows))
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor(rows))
    return sae


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=SIZE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )


def test_without_penalties_the_image_takes_the_latents_colours() -> None:
    sae, signs = colour_sae([1.0, -1.0, 0.0], [1.0, -1.0, 0.0]), torch.tensor([1, -1])
    result = maximise(
        MeanColour(), "last", sae, [0, 1], Preprocess(SIZE, None), size=SIZE, l2=0.0, tv=0.0, signs=signs, steps=300
    )
    red, green, blue = result.images.mean(dim=(2, 3)).T
    # The sigmoid only nears its ends; blue is nothing to these latents and stays the grey that it was.
    assert red[0] > 0.9
    assert green[0] < 0.1
    assert red[1] < 0.1
    assert green[1] > 0.9
    assert (blue - 0.5).abs().max() < 0.02


def test_the_l2_penalty_has_its_stated_meaning() -> None:
    # max e·x / u − λ mean(x²) over images of one colour: x_c = 3 e_c / (2 λ u), with u = ‖e‖ · ‖a‖ at mid-grey.
    row, penalty = torch.tensor([1.0, -0.5, 0.25]), 20.0
    preprocess = Preprocess(SIZE, None, mean=(0.25, 0.25, 0.25), std=(0.5, 0.5, 0.5))
    unit = row.norm() * torch.full((3,), 0.5).norm()
    expected = 3 * row / (2 * penalty * unit) * 0.5 + 0.25
    result = maximise(
        MeanColour(), "last", colour_sae(row.tolist()), [0], preprocess, size=SIZE, l2=penalty, tv=0.0, steps=300
    )
    torch.testing.assert_close(result.images.mean(dim=(2, 3))[0], expected, rtol=0, atol=0.01)


def test_the_total_variation_penalty_calms_the_image(network: nn.Module) -> None:
    sae, preprocess = make_sae("linear_l1", 32, 4, torch.Generator().manual_seed(0)), Preprocess(SIZE, None)
    calm, wild = (
        maximise(network, "last", sae, [0, 1], preprocess, size=SIZE, l2=0.0, tv=tv, steps=20).images
        for tv in (5.0, 0.0)
    )
    assert calm.diff(dim=2).abs().mean() < 0.5 * wild.diff(dim=2).abs().mean()


@pytest.mark.parametrize("variant", ["linear_l1", "relu_l1", "topk"])
def test_values_rise_or_fall_by_sign_even_for_silent_latents(network: nn.Module, variant: str) -> None:
    settings = {"k": 1} if variant == "topk" else {}
    sae, preprocess = make_sae(variant, 32, 6, torch.Generator().manual_seed(0), **settings), Preprocess(SIZE, None)
    if sae.has_bias:
        nn.init.constant_(sae.bias, -50.0)
    signs = torch.tensor([1, 1, -1])
    result = maximise(network, "last", sae, [5, 2, 2], preprocess, size=SIZE, steps=20, signs=signs)
    gain = result.final_values - result.start_values
    assert (gain * signs > 0).all()
    assert result.images.shape == (3, 3, SIZE, SIZE)
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    # The final values are those of the images handed out, as an ordinary forward pass sees them.
    model = copy.deepcopy(network).eval()
    model.heads = nn.Identity()
    mean, std = (torch.tensor(channels).view(1, 3, 1, 1) for channels in (preprocess.mean, preprocess.std))
    with torch.no_grad():
        pre = (model((result.images - mean) / std) - sae.b_dec) @ sae.encoder.T + sae.bias
    torch.testing.assert_close(result.final_values, pre[torch.arange(3), torch.tensor([5, 2, 2])], rtol=1e-4, atol=1e-4)


def test_the_seed_determines_the_result(network: nn.Module) -> None:
    sae, preprocess = make_sae("linear_l1", 32, 4, torch.Generator().manual_seed(0)), Preprocess(SIZE, None)
    torch.manual_seed(1)
    first = maximise(network, "last", sae, [0, 3], preprocess, size=SIZE, steps=5, seed=3)
    torch.manual_seed(2)
    again = maximise(network, "last", sae, [0, 3], preprocess, size=SIZE, steps=5, seed=3)
    other = maximise(network, "last", sae, [0, 3], preprocess, size=SIZE, steps=5, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)


def test_the_model_is_left_as_found() -> None:
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    sae = make_sae("relu_l1", 512, 4)
    with torch.inference_mode():
        maximise(model, "last", sae, torch.tensor([1]), Preprocess(SIZE, None), size=SIZE, steps=2)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in (*model.parameters(), *sae.parameters()))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"lr": 0.0}, "lr=0.0 must be above 0"),
        ({"tv": -1.0}, "tv=-1.0 must be at least 0"),
        ({"l2": float("nan")}, "l2=nan"),
        ({"signs": torch.tensor([2])}, r"\+1 or -1"),
        ({"latents": [3]}, "Latent 3 does not exist"),
    ],
)
def test_bad_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"latents": [0], "size": SIZE, **change}
    latents = arguments.pop("latents")
    with pytest.raises(UserError, match=message):
        maximise(MeanColour(), "last", colour_sae([1.0, 0.0, 0.0]), latents, Preprocess(SIZE, None), **arguments)


def test_an_sae_of_another_site_is_refused(network: nn.Module) -> None:
    with pytest.raises(UserError, match=r"SAE reads 16 channels, but the site .* has 32"):
        maximise(network, "last", make_sae("linear_l1", 16, 4), [0], Preprocess(SIZE, None), size=SIZE, steps=1)
