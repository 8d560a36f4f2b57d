"""The gate: Law 1 against a forward hook, its edge cases, and the fast path against a plain loop."""

import inspect
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18

from salve.backbones import find_site
from salve.backbones.tail import LinearTail
from salve.editing import contribution, edited_logits, gate, gates
from salve.types import UserError

MODELS = {
    "resnet18": lambda: resnet18(num_classes=7),
    "vit": lambda: VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=7),
    "timm-resnet": lambda: timm.create_model("test_resnet", num_classes=7),
    "timm-vit": lambda: timm.create_model("test_vit", num_classes=7, img_size=32),
}


@pytest.mark.parametrize("name", MODELS)
def test_law_1_scaling_the_readers_equals_gating_the_activation(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval().double()
    site = find_site(model, "last")
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    scale = torch.rand(site.width, dtype=torch.float64) * 2
    reader = model.get_submodule(site.readers[0].path)
    # torchvision's ViT starts with a head of zeros, for which any gate would look right.
    nn.init.normal_(reader.weight)

    hook = reader.register_forward_pre_hook(lambda _, inputs: (inputs[0] * scale,))
    with torch.no_grad():
        gated = model(images)
    hook.remove()
    with torch.no_grad():
        plain = model(images)
        reader.weight *= scale
        edited = model(images)

    torch.testing.assert_close(edited, gated, rtol=1e-12, atol=1e-12)
    assert (edited - plain).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["suppress", "enhance"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edited_logits_equal_a_loop_over_edited_heads(mode: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((4, 6), (4,)))
    activations, vector = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((5, 6), (6,)))
    alphas = torch.tensor([0.0, 0.3, 1.0, 7.0], dtype=dtype)
    found = edited_logits(LinearTail(weight, bias), activations, vector, alphas, mode)
    assert found.shape == (4, 5, 4)
    assert found.dtype == dtype
    for k, alpha in enumerate(alphas.tolist()):
        for n in range(5):
            for i in range(4):
                expected = float(bias[i])
                for j in range(6):
                    size = abs(float(vector[j]))
                    factor = max(0.0, 1 - alpha * size) if mode == "suppress" else 1 + alpha * size
                    expected += float(weight[i, j]) * factor * float(activations[n, j])
                assert float(found[k, n, i]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", ["suppress", "enhance"])
def test_many_strengths_of_one_latent_equal_the_gate_at_each(mode: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(*shape, generator=generator).double() for shape in ((4, 40), (4,)))
    activations, vector = (torch.randn(*shape, generator=generator).double() for shape in ((5, 40), (40,)))
    vector[:3] = 0  # channels that it does not touch
    vector[3] = vector[4]  # and two that close at once
    strengths = [
        7.0,
        0.0,
        0.3,
        0.3,
        1e9,
        1.0,
        1 / float(vector[3].abs()),
    ]  # in no order, one twice, one at a breakpoint
    strengths += [math.inf] if mode == "suppress" else []
    found = edited_logits(LinearTail(weight, bias), activations, vector[None], strengths, mode)
    for k, alpha in enumerate(strengths):
        expected = (activations * gate(vector, alpha, mode)) @ weight.T + bias
        torch.testing.assert_close(found[k], expected, rtol=1e-10, atol=1e-12)
    untouched = activations[:, :3] @ weight[:, :3].T + bias
    assert torch.allclose(found[-1], untouched) is (mode == "suppress")


def test_the_logits_of_a_set_of_latents_use_the_product_of_their_gates() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, bias, activations = (torch.randn(*shape, generator=generator).double() for shape in ((4, 9), (4,), (5, 9)))
    rows, strengths = torch.randn(2, 9, generator=generator).double(), [0.0, 0.5, 1.0, 4.0]
    found = edited_logits(LinearTail(weight, bias), activations, rows, strengths)
    for k, alpha in enumerate(strengths):
        gated = activations * gate(rows[0], alpha) * gate(rows[1], alpha)
        torch.testing.assert_close(found[k], gated @ weight.T + bias, rtol=1e-10, atol=1e-12)


def test_alpha_zero_keeps_every_bit() -> None:
    weight = torch.tensor([[0.0, -0.0, 1e-42, float("inf"), -3.3]])
    for mode in ("suppress", "enhance"):
        scaled = weight * gate(torch.randn(5), 0.0, mode)
        assert torch.equal(scaled.view(torch.int32), weight.view(torch.int32))


def test_infinite_alpha_closes_what_the_latent_touches_and_nothing_else() -> None:
    found = gate(torch.tensor([0.5, -1e-30, 0.0]), math.inf)
    assert found.tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("alpha", [-0.1, math.nan])
def test_impossible_strengths_are_refused(alpha: float) -> None:
    with pytest.raises(UserError, match="must not be negative or NaN"):
        gate(torch.ones(2), alpha)


def test_infinite_enhancement_and_unknown_modes_are_refused() -> None:
    with pytest.raises(UserError, match="infinite only for mode=suppress"):
        gate(torch.ones(2), math.inf, "enhance")
    with pytest.raises(UserError, match="suppress or enhance"):
        inspect.unwrap(gates)(torch.ones(2), torch.ones(1), "remove")


@pytest.mark.parametrize("latents", [1, 2])
@pytest.mark.parametrize("strengths", [[0.0, 1e38], [0.0, 1.0, 2.0, 1e38]])
def test_enhanced_logits_beyond_float32_are_refused(latents: int, strengths: list[float]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, activations = (torch.randn(*shape, generator=generator) for shape in ((3, 5), (3,), (4, 5)))
    rows = torch.nn.functional.normalize(torch.randn(latents, 5, generator=generator))
    with pytest.raises(UserError, match=r"Enhanced at α = 1e\+38, the logits are larger than float32 can hold"):
        edited_logits(LinearTail(weight, bias), 100 * activations, rows, strengths, "enhance")
    assert edited_logits(LinearTail(weight, bias), 100 * activations, rows, strengths, "suppress").isfinite().all()


def test_the_gate_of_a_set_is_the_product_in_any_order() -> None:
    rows = torch.tensor([[0.5, 0.0, 0.2], [0.1, 0.9, 0.0]])
    alphas = torch.tensor([0.0, 1.0, 3.0])
    together = gates(rows, alphas)
    assert torch.equal(together, gates(rows[:1], alphas) * gates(rows[1:], alphas))
    assert torch.equal(together, gates(rows.flip(0), alphas))


def test_contribution_scales_and_aligns() -> None:
    decoder = torch.tensor([[0.6, 0.0], [-0.8, 1.0]])
    assert contribution(decoder, 0).tolist() == pytest.approx([0.6, -0.8])
    assert contribution(decoder, 0, scale="max").abs().max() == 1
    assert contribution(decoder, 0, channels="aligned", sign=1).tolist() == pytest.approx([0.6, 0.0])
    assert contribution(decoder, 0, channels="aligned", sign=-1).tolist() == pytest.approx([0.0, 0.8])
    assert contribution(decoder, 1, scale="max", channels="aligned", sign=-1).tolist() == [0.0, 0.0]
    with pytest.raises(UserError, match="latents 0 to 1"):
        contribution(decoder, 2)
