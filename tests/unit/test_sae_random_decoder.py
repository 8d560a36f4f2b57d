"""SAEs whose decoder stays as it was drawn: not a bit of it changes, and the rest learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from salve.activations import ActivationsData, Schedule
from salve.metrics import fraction_of_variance_explained
from salve.sae import SAE, VARIANTS, SparseAutoencoder, load_sae, make_sae
from salve.stages import SAESettings
from salve.types import UserError
from tests.unit.sae_examples import SMALL, drawn, example, fit
from tests.unit.test_sae_ensemble import SETTINGS, WIDTH, alone, assert_same, together
from tests.unit.test_sae_revival import planted as planted

MORE: dict[str, dict[str, Any]] = {
    "linear_l1": {"resample": 2},
    "relu_l1": {"resample": 2, "centre": True},
    "gated": {"learn_b_dec": True},
    "topk": {"auxk": 3, "dictionary_size": 64},  # so few that products are sparse
    "jumprelu": {"bandwidth": 0.4},
    "batch_topk": {"precision": "bf16"},
    "matryoshka": {"prefixes": [0.5, 1.0]},
}


def settings_of(variant: str) -> SAESettings:
    return replace(SETTINGS, variant=variant, k=2, decoder="random", steps=8, **MORE[variant])


def start_of(settings: SAESettings) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    return make_sae(settings.variant, WIDTH, settings.dictionary_size, generator, **settings.options()).decoder.detach()


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_bit_of_the_decoder_changes(variant: str, tmp_path: Path) -> None:
    settings = settings_of(variant)
    [artifact] = alone(tmp_path, [settings])
    assert torch.equal(load_sae(artifact.file("sae.safetensors")).decoder, start_of(settings))


@pytest.mark.parametrize("variant", ["linear_l1", "batch_topk"])
def test_an_ensemble_keeps_its_decoders_too(variant: str, tmp_path: Path) -> None:
    base = replace(settings_of(variant), resample=0)
    grid = [replace(base, dictionary_size=size, seed=size) for size in (8, 6)]
    found = together(tmp_path / "together", grid)
    for one, artifact in zip(grid, found, strict=True):
        assert torch.equal(load_sae(artifact.file("sae.safetensors")).decoder, start_of(one))
    if base.precision == "float32":
        assert_same(found, alone(tmp_path / "alone", grid))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoder_learns(variant: str, planted: Tensor) -> None:
    def fve(sae: SAE) -> float:
        with torch.no_grad():
            return float(fraction_of_variance_explained(planted, sae.eval()(planted)[0]))

    sae = make_sae(variant, 12, 24, torch.Generator().manual_seed(0), **SMALL.get(variant, {}))
    sae.freeze_decoder()
    before, start = fve(sae), sae.decoder.detach().clone()
    data = ActivationsData(planted, planted[:64], torch.zeros(64, dtype=torch.long), Schedule(len(planted), 64, 200))
    fit(SparseAutoencoder(sae.train(), 0.05, 1e-2, head=None), 2, datamodule=data, limit_val_batches=0)
    assert torch.equal(sae.decoder, start)
    assert fve(sae) > before + 0.1


@pytest.mark.parametrize("variant", ["linear_l1", "relu_l1", "gated"])
def test_dead_latents_restart_towards_their_own_columns(variant: str) -> None:
    sae = example(variant)
    sae.freeze_decoder()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.restart(torch.tensor([2, 7]), torch.nn.functional.normalize(drawn(2, 6), dim=1))
    assert torch.equal(sae.decoder, before["decoder"])
    alive = [latent for latent in range(9) if latent not in (2, 7)]
    assert torch.equal(sae.encoder[alive], before["encoder"][alive])
    strength = before["encoder"][alive].norm(dim=1).mean()
    torch.testing.assert_close(sae.encoder.detach()[[2, 7]], 0.2 * strength * before["decoder"].T[[2, 7]])
    assert not sae.bias[[2, 7]].any()


def test_a_frozen_decoder_cannot_start_from_data(tmp_path: Path) -> None:
    sae = example("relu_l1")
    sae.freeze_decoder()
    with pytest.raises(UserError, match="cannot start from data"):
        sae.start_from(drawn(9, 6), drawn(6))
    with pytest.raises(UserError, match="cannot start from data"):
        alone(tmp_path, [replace(SETTINGS, decoder="random", start="data")])


def test_the_key_has_the_decoder_only_where_it_is_random(tmp_path: Path) -> None:
    trained, random = alone(tmp_path, [SETTINGS, replace(SETTINGS, decoder="random")])
    assert trained.key != random.key
    assert "decoder" not in trained.record("key.json")["settings"]
    assert random.record("key.json")["settings"]["decoder"] == random.record("sae.json")["decoder"] == "random"
