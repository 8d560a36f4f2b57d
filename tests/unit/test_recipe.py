"""Recipes: exact apply, bit-exact undo, plain state_dicts, and refusals."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import ResNet, resnet18

from salve.backbones import Site, find_site
from salve.editing import Edit, Recipe, apply_recipe, load_recipe, make_recipe, save_recipe, undo_recipe
from salve.editing.cli import main
from salve.sae import SAE, make_sae
from salve.types import UserError


@pytest.fixture(scope="module")
def parts() -> tuple[ResNet, Site, SAE]:
    torch.manual_seed(0)
    model = resnet18(num_classes=4).eval()
    return model, find_site(model, "avgpool"), make_sae("linear_l1", 512, 16, torch.Generator().manual_seed(0))


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in state.items()}


def test_apply_touches_the_reader_alone_and_undo_restores_every_bit(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    state = model.state_dict()
    before = bits(state)
    recipe = make_recipe(model, site, sae, [Edit(3, 9.0), Edit(5, math.inf)], "torchvision/resnet18")
    edited = apply_recipe(recipe, state)
    changed = [name for name in before if bits(edited)[name] != before[name]]
    assert changed == ["fc.weight"]
    assert (edited["fc.weight"] == 0).any()  # α = ∞ closed channels, which no arithmetic brings back
    assert bits(undo_recipe(recipe, edited)) == before
    assert bits(model.state_dict()) == before


def test_the_exported_state_loads_into_a_fresh_model_with_the_edited_logits(
    parts: tuple[ResNet, Site, SAE], tmp_path: Path
) -> None:
    model, site, sae = parts
    recipe = make_recipe(model, site, sae, [Edit(3, 4.0)], "torchvision/resnet18")
    save_file(apply_recipe(recipe, model.state_dict()), tmp_path / "edited.safetensors")
    fresh = resnet18(num_classes=4).eval()
    fresh.load_state_dict(load_file(tmp_path / "edited.safetensors"), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    # The oracle: the untouched model with a gate on the activation.
    closed = (1 - 4.0 * sae.decoder[:, 3].detach().abs()).clamp_min(0)
    hook = model.fc.register_forward_pre_hook(lambda _, inputs: (inputs[0] * closed,))
    with torch.no_grad():
        expected, found = model(images), fresh(images)
    hook.remove()
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert (found - model(images)).abs().max() > 1e-4


def test_edits_compose_in_any_order(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    edits = [Edit(3, 2.0), Edit(7, 1.5, "enhance")]
    one, other = (apply_recipe(make_recipe(model, site, sae, e, "r"), model.state_dict()) for e in (edits, edits[::-1]))
    torch.testing.assert_close(one["fc.weight"], other["fc.weight"])


def test_alpha_zero_keeps_every_bit(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    recipe = make_recipe(model, site, sae, [Edit(3, 0.0)], "r")
    assert recipe.before == recipe.after
    assert bits(apply_recipe(recipe, model.state_dict())) == bits(model.state_dict())


@pytest.mark.parametrize("alpha", [2.5, math.inf])
def test_a_saved_recipe_comes_back_the_same(parts: tuple[ResNet, Site, SAE], tmp_path: Path, alpha: float) -> None:
    model, site, sae = parts
    recipe = make_recipe(model, site, sae, [Edit(3, alpha, sign=-1)], "torchvision/resnet18")
    save_recipe(recipe, tmp_path / "r.json")
    loaded = load_recipe(tmp_path / "r.json")
    assert loaded.edits == recipe.edits
    assert (loaded.before, loaded.after, loaded.sae, loaded.readers) == (
        recipe.before,
        recipe.after,
        recipe.sae,
        recipe.readers,
    )
    assert bits(apply_recipe(loaded, model.state_dict())) == bits(apply_recipe(recipe, model.state_dict()))
    text = (tmp_path / "r.json").read_text()
    assert '"latent": 3' in text
    assert '"site": "avgpool"' in text


def test_wrong_weights_twice_applied_and_empty_edits_are_refused(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    recipe = make_recipe(model, site, sae, [Edit(3, 4.0)], "torchvision/resnet18")
    other = {**model.state_dict(), "fc.bias": model.fc.bias.detach() + 1}
    with pytest.raises(UserError, match="not the ones that the recipe was made for"):
        apply_recipe(recipe, other)
    with pytest.raises(UserError, match="carry this edit already"):
        apply_recipe(recipe, apply_recipe(recipe, model.state_dict()))
    with pytest.raises(UserError, match="cannot be undone"):
        undo_recipe(recipe, model.state_dict())
    empty = make_sae("linear_l1", 512, 2)
    with torch.no_grad():
        empty.decoder[:, 0] = 0
    with pytest.raises(UserError, match="leave the model as it is"):
        make_recipe(model, site, empty, [Edit(0, 4.0)], "r")
    with pytest.raises(UserError, match="latents 0 to 15"):
        make_recipe(model, site, sae, [Edit(16, 4.0)], "r")
    with pytest.raises(UserError, match="reads 8 channels"):
        make_recipe(model, site, make_sae("linear_l1", 8, 2), [Edit(0, 4.0)], "r")


def test_a_damaged_recipe_is_found_out(parts: tuple[ResNet, Site, SAE]) -> None:
    model, site, sae = parts
    good = make_recipe(model, site, sae, [Edit(3, 4.0)], "r")
    damaged = Recipe(**{**good.__dict__, "contributions": good.contributions * 1.01})
    with pytest.raises(RuntimeError, match="damaged"):
        apply_recipe(damaged, model.state_dict())
    with pytest.raises(ValueError, match="1 edits, but 2"):
        Recipe(**{**good.__dict__, "contributions": good.contributions.repeat(2, 1)})


def test_the_command_applies_and_undoes_files(
    parts: tuple[ResNet, Site, SAE], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, site, sae = parts
    save_recipe(make_recipe(model, site, sae, [Edit(3, 4.0)], "r"), tmp_path / "r.json")
    original, edited, undone = (tmp_path / f"{name}.safetensors" for name in ("original", "edited", "undone"))
    save_file(model.state_dict(), original)
    assert main(["apply", str(tmp_path / "r.json"), str(original), str(edited)]) == 0
    assert main(["undo", str(tmp_path / "r.json"), str(edited), str(undone)]) == 0
    assert bits(load_file(undone)) == bits(load_file(original))
    assert bits(load_file(edited)) != bits(load_file(original))
    assert main(["undo", str(tmp_path / "r.json"), str(original), str(tmp_path / "x.safetensors")]) == 2
    assert "cannot be undone" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()
    assert main(["apply", str(tmp_path / "none.json"), str(original), str(edited)]) == 2
    assert main(["apply", str(tmp_path / "r.json"), str(original), str(tmp_path / "x.pt")]) == 2
