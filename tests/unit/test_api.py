"""The public functions, called as the README and docs/python.md show them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torchvision.models import resnet18

import salve
from salve.backbones.tail import LinearTail


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_pipeline_in_a_notebook(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    model = resnet18(num_classes=5).eval().to(dtype)
    sae = salve.sae.make_sae("linear_l1", 512, 8, generator).to(dtype)
    images = torch.randn(4, 3, 64, 64, generator=generator, dtype=dtype)
    labels = torch.tensor([0, 1, 1, 3])
    site = salve.backbones.find_site(model, "avgpool")
    with torch.no_grad():
        activations = salve.backbones.site_activations(model, site, images)
        latents = sae.encode(activations)
        contribution = sae.decoder[:, 3].detach()
        weight, bias = model.fc.weight.detach(), model.fc.bias.detach()
    means = salve.features.class_means(latents, labels, 5)
    gate = salve.editing.gate(contribution, 2.0, mode="suppress")
    logits = salve.editing.edited_logits(
        LinearTail(weight, bias), activations, contribution, torch.tensor([0.0, 2.0]), "suppress"
    )
    strength = salve.diagnosis.critical_strength(
        LinearTail(weight, bias), activations, contribution, labels, "flip", "exact"
    )
    maps = salve.saliency.grad_fam(model, "avgpool", sae, images, torch.tensor([3, 5]))
    fve = salve.metrics.fraction_of_variance_explained(activations, sae.decode(latents).detach())
    shapes = [(means, (5, 8)), (gate, (512,)), (logits, (2, 4, 5)), (strength, (4,)), (maps, (4, 2, 64, 64)), (fve, ())]
    for found, shape in shapes:
        assert found.shape == shape
        assert found.dtype == dtype
    with torch.no_grad():
        torch.testing.assert_close(logits[0], model(images))


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_code_that_is_shown_runs(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    names = {"torch": torch, "torchvision": torchvision, "salve": salve, "images": torch.randn(2, 3, 64, 64)}
    # What reads a run is tested in tests/integration/test_results.py, which has one.
    [code] = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "outputs/" not in code]
    exec(code, names)
    assert names["maps"].shape[1:] == (1, 64, 64)
    assert names["gate"].shape == (512,)


def test_the_code_of_the_page_on_sites_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sites.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    site = names["site"]
    assert (site.width, site.positions) == (128, (8, 8))  # type: ignore[attr-defined]


def test_the_network_of_the_page_on_ones_own_has_the_sites_that_are_shown() -> None:
    text = (Path(__file__).parents[2] / "docs" / "your_network.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    found = salve.backbones.sites(names["make_net"](num_classes=10).eval(), 224).values()
    shown = re.findall(r"^     (\d+) +(\S.*?)  +(\d+)  (\d+(?: x \d+)?) ", text, re.MULTILINE)
    assert [(site.name, str(site.width)) for site in found] == [(name, width) for name, _, width, _ in shown]
    assert [" x ".join(map(str, site.positions)) or "1" for site in found] == [positions for *_, positions in shown]


@pytest.mark.slow
def test_importing_salve_imports_nothing_heavy() -> None:
    code = "import sys, salve; assert 'torch' not in sys.modules; salve.editing.gate; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_room_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'kitchen'"):
        _ = salve.kitchen
    assert "editing" in dir(salve)
