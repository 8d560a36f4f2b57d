"""SAEs: the loss's meaning, scale folding, files, and the recovery of a planted dictionary."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from salve.sae import VARIANTS, ActivationsData, SparseAutoencoder, fingerprint, load_sae, make_sae, sae_loss, save_sae
from salve.types import UserError


def example(variant: str, width: int = 6, size: int = 9) -> torch.nn.Module:
    sae = make_sae(variant, width, size, torch.Generator().manual_seed(0), **({"k": 3} if variant == "topk" else {}))
    with torch.no_grad():
        sae.shift.copy_(torch.linspace(-1, 1, width))
        if sae.has_bias:
            sae.bias.copy_(torch.linspace(-0.5, 0.5, size))
    return sae


def test_loss_is_the_definition_and_does_not_change_when_the_batch_is_repeated() -> None:
    generator = torch.Generator().manual_seed(0)
    a, a_hat, z = (torch.randn(5, w, generator=generator, dtype=torch.float64) for w in (4, 4, 7))
    expected = sum(
        sum((float(a[n, j]) - float(a_hat[n, j])) ** 2 for j in range(4)) + 0.3 * sum(abs(float(v)) for v in z[n])
        for n in range(5)
    )
    loss = sae_loss(a, a_hat, z, 0.3)
    assert float(loss) == pytest.approx(expected / 5)
    assert float(sae_loss(a.repeat(3, 1), a_hat.repeat(3, 1), z.repeat(3, 1), 0.3)) == pytest.approx(float(loss))


@pytest.mark.parametrize("variant", VARIANTS)
def test_folding_makes_it_take_raw_activations(variant: str) -> None:
    sae, raw = example(variant), torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    scale = 3.7
    before_hat, before = sae(raw / scale)
    columns = sae.decoder.clone()
    sae.fold(scale)
    after_hat, after = sae(raw)
    torch.testing.assert_close(after, before * scale)
    torch.testing.assert_close(after_hat, before_hat * scale)
    assert torch.equal(sae.decoder, columns)


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_equal_their_pre_activations_where_they_fire(variant: str) -> None:
    sae, raw = example(variant), torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
    latents, pre = sae.encode(raw), sae.pre_activations(raw)
    fires = latents != 0
    assert fires.any()
    assert torch.equal(latents[fires], pre[fires])
    if variant != "linear_l1":
        assert (latents >= 0).all()
        assert not fires.all()
    if variant == "topk":
        assert (fires.sum(1) <= 3).all()
        for row, kept in zip(pre, fires, strict=True):
            assert set(kept.nonzero()[:, 0].tolist()) <= set(row.sort(descending=True).indices[:3].tolist())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_sae_comes_back_the_same(variant: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    sae, raw = example(variant), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    save_sae(tmp_path / "a.safetensors", sae, {"site": "avgpool"})
    save_sae(tmp_path / "b.safetensors", sae, {"site": "avgpool"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_sae(tmp_path / "a.safetensors")
    assert type(loaded) is type(sae)
    assert torch.equal(loaded.encode(raw), sae.encode(raw))
    assert fingerprint(loaded) == fingerprint(sae)
    with torch.no_grad():
        sae.decoder[0, 0] += 1e-6
    assert fingerprint(loaded) != fingerprint(sae)


def test_bad_files_and_settings_are_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="no SAE at"):
        load_sae(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no SAE file"):
        load_sae(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="linear_l1, relu_l1, topk"):
        make_sae("dense", 4, 4)
    with pytest.raises(UserError, match="between 1 and"):
        make_sae("topk", 4, 4, k=5)


def train(
    variant: str, activations: Tensor, size: int, sparsity: float, epochs: int, **settings: int
) -> torch.nn.Module:
    pl.seed_everything(0, verbose=False)
    sae = make_sae(variant, activations.shape[1], size, torch.Generator().manual_seed(0), **settings)
    module = SparseAutoencoder(sae, sparsity, 3e-3, head=lambda a: a)
    data = ActivationsData(activations, activations[:64], torch.zeros(64, dtype=torch.long), 128)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=data)
    return sae.requires_grad_(False)


@pytest.mark.parametrize(("variant", "sparsity", "settings"), [("relu_l1", 0.3, {}), ("topk", 0.0, {"k": 2})])
def test_a_planted_dictionary_is_recovered(variant: str, sparsity: float, settings: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    width, atoms, images = 24, 16, 4096
    planted = torch.randn(width, atoms, generator=generator)
    planted /= planted.norm(dim=0)
    which = torch.rand(images, atoms, generator=generator).topk(2, dim=1).indices
    codes = torch.zeros(images, atoms).scatter(1, which, 1 + torch.rand(images, 2, generator=generator))
    activations = codes @ planted.T
    activations *= (width / activations.square().sum(1).mean()) ** 0.5
    sae = train(variant, activations, 2 * atoms, sparsity, 40, **settings)
    cosine = planted.T @ sae.decoder.detach()
    rows, columns = linear_sum_assignment(-cosine.numpy())
    assert float(cosine[rows, columns].mean()) >= 0.95
    torch.testing.assert_close(sae.decoder.norm(dim=0), torch.ones(2 * atoms))


def test_linear_l1_keeps_the_strong_direction_and_prices_the_weak_one_out() -> None:
    """With orthogonal inputs the linear L1 SAE soft-shrinks: a direction is kept only if its energy pays for λ."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(2048, 1, generator=generator) * 4
    weak = torch.randn(2048, 1, generator=generator) * 0.05
    activations = torch.cat([strong, weak], dim=1)
    activations *= (2 / activations.square().sum(1).mean()) ** 0.5
    sae = train("linear_l1", activations, 2, 0.2, 40)
    reconstruction, latents = sae(activations)
    kept = 1 - (activations - reconstruction).square().sum(0) / activations.square().sum(0)
    assert float(kept[0]) > 0.9
    assert float(kept[1]) < 0.5
    assert (latents < 0).any()  # signed, with no activation function
    torch.testing.assert_close(sae.encode(-activations), -latents)
