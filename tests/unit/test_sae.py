"""SAEs: the loss's meaning, scale folding, files, and the recovery of a planted dictionary."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from salve.activations import ActivationsData, Schedule
from salve.sae import VARIANTS, SparseAutoencoder, fingerprint, load_sae, make_sae, save_sae
from salve.sae.losses import l1_losses, mean_loss
from salve.types import UserError
from tests.unit.sae_examples import drawn, example, fit


def test_loss_is_the_definition_and_does_not_change_when_the_batch_is_repeated() -> None:
    generator = torch.Generator().manual_seed(0)
    a, a_hat, z = (torch.randn(5, w, generator=generator, dtype=torch.float64) for w in (4, 4, 7))
    expected = sum(
        sum((float(a[n, j]) - float(a_hat[n, j])) ** 2 for j in range(4)) + 0.3 * sum(abs(float(v)) for v in z[n])
        for n in range(5)
    )
    loss = mean_loss(l1_losses(a, a_hat, z, 0.3))
    repeated = mean_loss(l1_losses(a.repeat(3, 1), a_hat.repeat(3, 1), z.repeat(3, 1), 0.3))
    assert float(loss) == pytest.approx(expected / 5)
    assert float(repeated) == pytest.approx(float(loss))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_folding_makes_it_take_raw_activations(variant: str, training: bool) -> None:
    sae, raw = example(variant).train(training), drawn(8, 6)
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
    sae, raw = example(variant), drawn(30, 6)
    latents, pre = sae.encode(raw), sae.pre_activations(raw)
    fires = latents != 0
    assert fires.any()
    if variant != "gated":  # whose strength has a scale of its own
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
    sae, raw = example(variant).eval(), drawn(4, 6)
    save_sae(tmp_path / "a.safetensors", sae, {"site": "avgpool"})
    save_sae(tmp_path / "b.safetensors", sae, {"site": "avgpool"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    loaded = load_sae(tmp_path / "a.safetensors")
    assert type(loaded) is type(sae)
    assert loaded.settings() == sae.settings()
    assert not loaded.training
    assert torch.equal(loaded.encode(raw), sae.encode(raw))
    assert fingerprint(loaded) == fingerprint(sae)
    with torch.no_grad():
        loaded_as = [tensor.dtype for tensor in loaded.state_dict().values()]
        assert set(loaded_as) == {torch.float64}
        sae.decoder[0, 0] += 1e-6
    assert fingerprint(loaded) != fingerprint(sae)


def test_bad_files_and_settings_are_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="no SAE at"):
        load_sae(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="no SAE file"):
        load_sae(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="linear_l1, relu_l1, topk, batch_topk, jumprelu, gated, matryoshka"):
        make_sae("dense", 4, 4)
    with pytest.raises(UserError, match="no setting k; its settings are: bandwidth"):
        make_sae("jumprelu", 4, 4, k=2)
    with pytest.raises(UserError, match="between 1 and"):
        make_sae("topk", 4, 4, k=5)
    with pytest.raises(UserError, match=r"sae.bandwidth above 0, not 0"):
        make_sae("jumprelu", 4, 4, bandwidth=0.0)
    for prefixes in ([], [0.5], [0.5, 0.5, 1.0], [0.0, 1.0]):
        with pytest.raises(UserError, match="increase from above 0 to 1"):
            make_sae("matryoshka", 4, 4, k=2, prefixes=prefixes)
    with pytest.raises(UserError, match="batch_topk or topk"):
        make_sae("matryoshka", 4, 4, k=2, base="relu_l1")
    sae = make_sae("relu_l1", 4, 4)
    with torch.no_grad():
        sae.encoder[0, 0] = torch.nan
    save_sae(tmp_path / "nan.safetensors", sae)
    with pytest.raises(UserError, match="broken: its encoder holds NaN"):
        load_sae(tmp_path / "nan.safetensors")


def test_an_sae_of_something_else_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path, bare = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_sae(path, make_sae("relu_l1", 4, 4), {"backbone": "resnet18", "site": "avgpool"})
    save_sae(bare, make_sae("relu_l1", 4, 4))
    for fits in ({"width": 4}, {"backbone": "resnet18", "site": "avgpool"}, {"site": "last"}, {}):
        load_sae(path, **fits)
    for unfit, named in (
        ({"width": 5}, "width 5: it was made for 4"),
        ({"backbone": "vit_b_16"}, "backbone vit_b_16: it was made for resnet18"),
        ({"site": "global_pool"}, "site global_pool: it was made for avgpool"),
    ):
        with pytest.raises(UserError, match=f"does not fit {named}"):
            load_sae(path, **unfit)
    with pytest.raises(UserError, match="does not say which"):
        load_sae(bare, backbone="resnet18")


def test_an_sae_with_a_learned_b_dec_is_a_plain_one_when_it_is_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    sae = example("relu_l1").eval()
    sae.learn_b_dec()
    assert "b_dec" in dict(sae.named_parameters())
    save_sae(tmp_path / "a.safetensors", sae)
    loaded = load_sae(tmp_path / "a.safetensors")
    assert "b_dec" not in dict(loaded.named_parameters())
    torch.testing.assert_close(loaded(drawn(5, 6)), sae(drawn(5, 6)))


@pytest.mark.parametrize("rows", [40, 5])
def test_a_start_from_data_points_from_the_mean_to_rows(rows: int) -> None:
    data, sae = drawn(rows, 6) + 10, make_sae("relu_l1", 6, 9, torch.Generator().manual_seed(0)).double()
    random = sae.decoder.detach().clone()
    sae.start_from(data[:9], data.mean(dim=0))
    cosine = torch.nn.functional.normalize(data - data.mean(dim=0), dim=1) @ sae.decoder.detach()
    given = min(rows, 9)
    found = cosine[:, :given].max(dim=0)
    torch.testing.assert_close(found.values, torch.ones(given, dtype=torch.float64))
    assert len(set(found.indices.tolist())) == given
    assert torch.equal(sae.decoder[:, given:], random[:, given:])
    torch.testing.assert_close(sae.encoder, sae.decoder.T * 6 / 9)
    sae.start_from(torch.ones(9, 6, dtype=torch.float64), torch.ones(6, dtype=torch.float64))
    assert sae.decoder.isfinite().all()


def train(variant: str, activations: Tensor, size: int, sparsity: float, epochs: int, **settings: Any) -> Any:
    pl.seed_everything(0, verbose=False)
    sae = make_sae(variant, activations.shape[1], size, torch.Generator().manual_seed(0), **settings)
    module = SparseAutoencoder(sae, sparsity, 3e-3, head=lambda a: a)
    schedule = Schedule.of_epochs(len(activations), 128, epochs)
    data = ActivationsData(activations, activations[:64], torch.zeros(64, dtype=torch.long), schedule)
    fit(module, epochs, datamodule=data, limit_val_batches=0)
    return sae.requires_grad_(False).eval()


@pytest.mark.parametrize(
    ("variant", "sparsity", "settings"),
    [
        ("relu_l1", 0.3, {}),
        ("gated", 2.0, {}),
        ("topk", 0.0, {"k": 2}),
        ("batch_topk", 0.0, {"k": 2}),
        ("matryoshka", 0.0, {"k": 2, "prefixes": [0.5, 1.0]}),
        ("jumprelu", 0.5, {}),
    ],
)
@pytest.mark.slow
def test_a_planted_dictionary_is_recovered(variant: str, sparsity: float, settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    width, atoms, images = 24, 16, 2048
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
    if variant in ("batch_topk", "matryoshka", "jumprelu"):  # also with the threshold instead of the batch
        assert float((sae.encode(activations) > 0).sum(dim=1).double().mean()) == pytest.approx(2, rel=0.15)
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


@pytest.mark.parametrize("size", [4, 6, 24, 200])
def test_a_fresh_linear_sae_gives_back_about_what_it_gets(size: int) -> None:
    """For random unit columns ``E[D Dᵀ] = (d/M) I``: undone for ``d ≥ M``."""
    activations = drawn(2000, 6)
    gains = []
    for seed in range(20):
        sae = make_sae("linear_l1", 6, size, torch.Generator().manual_seed(seed)).double()
        gains.append(float((sae(activations)[0].detach() * activations).sum() / activations.square().sum()))
    assert sum(gains) / 20 == pytest.approx(min(1, size / 6), rel=0.05)


@pytest.mark.parametrize("size", [4, 24])
def test_a_fresh_top_k_starts_stronger_than_the_others(size: int) -> None:
    sae = make_sae("topk", 6, size, torch.Generator().manual_seed(0), k=2)
    torch.testing.assert_close(sae.encoder.norm(dim=1), torch.full((size,), min(1, 6 / size) ** 0.5))
