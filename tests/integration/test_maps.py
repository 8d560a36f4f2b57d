"""Stage ``validate`` at a site that is a map, and for a network that has none."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from salve.artifacts import Artifact, Store, read_record
from salve.backbones import load_backbone
from salve.processes.ranks import Ranks
from salve.run import tryout
from salve.run.build import build_context
from salve.run.schema import Config
from salve.sae import load_sae
from salve.saliency import grad_fam, own_maps
from salve.saliency.common import NoMap
from salve.stages import localise
from tests.integration.conftest import FEW, NARROW, SMALL, Start

SITE = "layer3.0.conv2"
EARLY = ["stages=[validate,report]", "validate.pictures=3", "sae.variant=relu_l1", "sae.sparsity=0.05"]


def by_hand(model: nn.Module, images: Tensor) -> Tensor:
    """What the second convolution of a block is given, ``[n, P, M]``."""
    seen: list[Tensor] = []
    hook = model.get_submodule(SITE).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images)
    hook.remove()
    return seen[0].flatten(2).transpose(1, 2)


Mapped = Callable[[str], tuple[Path, dict[str, Artifact]]]


@pytest.fixture(scope="module")
def mapped(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Mapped:
    """``mapped(pool)``: a run at a site that is a map, and its folder; they share what does not depend on the pool."""
    shared = tmp_path_factory.mktemp("mapped") / "store"

    @cache
    def run(pool: str) -> tuple[Path, dict[str, Artifact]]:
        folder = tmp_path_factory.mktemp(pool)
        return folder, start(folder, *EARLY, f"layer={SITE}", f"sae.pool={pool}", f"output_dir={shared}")

    return run


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_map_is_validated_by_its_pooled_latents(
    mapped: Mapped, composed: Callable[..., Config], tmp_path: Path, pool: str
) -> None:
    root, made = mapped(pool)
    folder = made["validate"].path
    weights = str(made["classifier"].file("model.safetensors"))
    model = load_backbone(
        "timm", "resnet10t", weights, 10, {"channels": [8, 16, 24, 32], "output_stride": 8}
    ).model.eval()
    sae = load_sae(made["sae"].file("sae.safetensors"))
    context = build_context(
        composed(*SMALL, *FEW, *NARROW), Store(tmp_path), lambda _: DummyLogger(), Console(), Ranks("cpu")
    )
    images = torch.stack([image for image, _ in context.data.dataset("test")])  # type: ignore[attr-defined]
    rows = by_hand(model, images)
    latents = torch.stack([sae.encode(one).mean(0) if pool == "mean" else sae.encode(one).amax(0) for one in rows])
    top = pd.read_csv(folder / "top.csv")
    assert len(top) == 20
    for row in top.itertuples():
        # The latents of this SAE are not negative, so that every sign is +1.
        expected = latents[:, int(row.latent)].sort(descending=True).values[int(row.rank) - 1]
        assert float(row.value) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    tensors, size = load_file(folder / "saliency.safetensors"), images.shape[-1]
    assert tensors["maps"].shape == tensors["own_maps"].shape == (3, 2, size, size)
    first = top.groupby("class", sort=False).head(2)
    for k in range(3):
        mine = first.iloc[2 * k : 2 * k + 2]
        shown, latent = images[mine["image"].tolist()], int(mine["latent"].iloc[0])
        own = own_maps(model, SITE, sae, shown, [latent])[:, 0]
        torch.testing.assert_close(tensors["own_maps"][k], own, rtol=1e-4, atol=1e-5)
        expected = grad_fam(model, SITE, sae, shown, [latent], pool=pool)[:, 0]
        torch.testing.assert_close(tensors["maps"][k], expected, rtol=1e-4, atol=1e-5)
    assert tensors["own_maps"].gt(0).any()
    record = read_record(folder / "maps.json")
    assert (record["site"], set(record["kinds"])) == (SITE, {"own", "grad_fam"})
    scores = pd.read_csv(folder / "localisation.csv")
    for name in ("pointing", "pointing_strict", "iou"):
        for column in (name, f"own_{name}", f"random_{name}", f"random_own_{name}"):
            assert scores[column].between(0, 1).all()
    for column in ("insertion", "deletion", "own_insertion", "own_deletion", "random_insertion", "random_deletion"):
        assert column in scores
    page = (root / "run" / "index.html").read_text()
    assert "own map" in page
    assert f"at the site {SITE}, at 16 of the 16 positions" in page.replace("\u00a0", " ")


@pytest.mark.usefixtures("_ranks_are_forks")
def test_two_ranks_give_the_bits_of_one(mapped: Mapped, start: Start, tmp_path: Path) -> None:
    _, made = mapped("mean")
    one = made["validate"].path
    shutil.copytree(one.parents[2], tmp_path / "store", ignore=shutil.ignore_patterns("validate"))
    ranks = ["trainer.devices=2", "trainer.strategy=ddp_spawn"]
    again = start(tmp_path, *EARLY, f"layer={SITE}", *ranks, "stages=[validate]")
    assert all(again[kind].reused for kind in ("classifier", "activations", "sae", "features"))
    two = again["validate"].path
    assert two != one
    names = {path.name for path in one.iterdir()}
    assert {"localisation.csv", "maximisation.safetensors", "top.csv"} <= names == {path.name for path in two.iterdir()}
    for name in ("localisation.csv", "maximisation.csv", "maximisation.safetensors", "saliency.safetensors", "top.csv"):
        assert (two / name).read_bytes() == (one / name).read_bytes(), name


@pytest.mark.usefixtures("no_figures")
def test_a_network_without_a_map_is_validated_without_one(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any, **__: Any) -> Tensor:
        raise NoMap("This Net has no spatial map in front of its site fc.")

    monkeypatch.setattr(localise, "grad_fam", none)
    monkeypatch.setattr(tryout, "grad_fam", none)
    folder = start(tmp_path, *EARLY, "finetune.epochs=1")["validate"].path
    assert read_record(folder / "maps.json")["kinds"] == []
    scores = pd.read_csv(folder / "localisation.csv")
    assert list(scores) == ["class", "latent", "concept", "auroc", "n"]
    assert scores["auroc"].between(0, 1).all()
    assert set(load_file(folder / "saliency.safetensors")) == {"images"}
    assert load_file(folder / "maximisation.safetensors")["images"].amax() > 0
    assert "This Net has no spatial map in front of its site fc." in (tmp_path / "run" / "index.html").read_text()
