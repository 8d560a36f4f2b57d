"""The whole pipeline on a few drawn images: what it leaves, what it reuses, and that its two paths agree."""

import io
import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from salve.activations import load_captured
from salve.artifacts import Artifact
from salve.data import ConceptsData, Preprocess
from salve.editing import apply_edit_file, load_edit_file, undo_edit_file
from salve.sae import load_sae
from salve.types import UserError
from tests.integration.conftest import Start

KINDS = ("classifier", "activations", "sae", "features", "atlas", "validate", "control", "diagnose")
Run = tuple[Path, dict[str, Artifact]]


def plain_model(artifacts: dict[str, Artifact]) -> Any:
    """A model built by timm alone, with the exported weights."""
    model: Any = timm.create_model("resnet10t", num_classes=10, channels=[8, 16, 24, 32], output_stride=8)
    model.load_state_dict(load_file(artifacts["classifier"].file("model.safetensors")), strict=True)
    return model.eval()


def images_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    data = ConceptsData(20, image_size=32, train_per_class=8, select_per_class=4, test_per_class=4)
    data.bind(Preprocess(32, None))
    images, labels = zip(*data.loader("test"), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_run_leaves_a_report_a_person_can_open(whole_run: Run) -> None:
    folder, artifacts = whole_run
    assert tuple(artifacts) == KINDS
    page = (folder / "run" / "index.html").read_text()
    classes = artifacts["classifier"].record("classifier.json")["classes"]
    assert len(classes) == 10
    assert all(name in page for name in classes)
    assert len(list((folder / "run" / "figures").glob("*.png"))) >= 8
    assert len(list((folder / "run" / "edits").glob("*.json"))) == 10
    config = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert config["sae"]["dictionary_size"] == 24
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["artifacts"]["sae"]["digest"] == artifacts["sae"].digest
    assert manifest["seed"] == 0
    summary = (folder / "console.txt").read_text()
    assert all(name in summary for name in classes)
    assert "index.html" in summary
    metrics = pd.read_csv(folder / "run" / "logs" / "discover" / "metrics.csv")
    assert {"fve", "l0", "dead_fraction", "l1", "downstream_accuracy"} <= set(metrics.columns)
    assert metrics["fve"].notna().sum() == len(artifacts["sae"].table("history.csv")) > 1


def test_cached_activations_and_reader_give_the_networks_logits(whole_run: Run) -> None:
    _, artifacts = whole_run
    model = plain_model(artifacts)
    images, labels = images_and_labels()
    captured = load_captured(artifacts["activations"].path, "test")
    assert torch.equal(captured.labels, labels)
    with torch.no_grad():
        torch.testing.assert_close(model.fc(captured.activations), model(images), rtol=1e-4, atol=1e-4)


def test_the_fast_path_agrees_with_the_edited_network(whole_run: Run) -> None:
    _, artifacts = whole_run
    table = artifacts["control"].table("evaluation.csv")
    assert len(table) == 10
    assert table["accuracy_edited"].tolist() == pytest.approx(table["accuracy_cached"].tolist())
    # And both agree with a network that only timm and this test have touched.
    summary = artifacts["control"].table("summary.csv")
    curves = artifacts["control"].table("curves.csv")
    classes = artifacts["classifier"].record("classifier.json")["classes"]
    images, labels = images_and_labels()
    for _, row in summary.iloc[[0, 7]].iterrows():
        model = plain_model(artifacts)
        edit_file = load_edit_file(artifacts["control"].file(row["edit_file"]))
        model.load_state_dict(apply_edit_file(edit_file, model.state_dict()))
        with torch.no_grad():
            right = model(images).argmax(1) == labels
        expected = curves.query(
            "split == 'test' and mode == 'suppress' and target == @row.target and alpha == @row.alpha_used"
        )
        found = [float(right[labels == k].double().mean()) for k in range(10)]
        own = classes.index(row.target)
        others = [value for k, value in enumerate(found) if k != own]
        [curve] = expected.to_dict("records")
        assert curve["accuracy"] == pytest.approx(found[own]) == row["accuracy_after"]
        assert curve["others_accuracy"] == pytest.approx(sum(others) / 9, rel=1e-5)
        assert (curve["others_lowest"], curve["others_highest"]) == (min(others), max(others))


def test_edit_files_undo_to_the_exported_bits(whole_run: Run) -> None:
    _, artifacts = whole_run
    state = load_file(artifacts["classifier"].file("model.safetensors"))
    for path in sorted(artifacts["control"].file("edits").glob("*.json")):
        edit_file = load_edit_file(path)
        back = undo_edit_file(edit_file, apply_edit_file(edit_file, state))
        assert all(
            torch.equal(back[name].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8))
            for name, t in state.items()
        )


def test_diagnosis_agrees_with_the_grid(whole_run: Run) -> None:
    _, artifacts = whole_run
    images, summary = artifacts["diagnose"].table("images.csv"), artifacts["diagnose"].table("summary.csv")
    assert len(images) == 40
    assert (images["flip_grid"] + 1e-3 >= images["flip_exact"]).all()
    assert (images.loc[~images["correct"], "flip_exact"] == 0).all()
    assert summary["correct"].sum() == images["correct"].sum()


def test_localisation_has_its_control_beside_it(whole_run: Run) -> None:
    _, artifacts = whole_run
    table = artifacts["validate"].table("localisation.csv")
    wanted = {"auroc", "concept", "pointing", "iou", "random_pointing", "random_iou", "insertion", "random_insertion"}
    assert wanted <= set(table.columns)
    assert table["pointing"].between(0, 1).all()


def test_the_atlas_has_the_images_that_excite_each_latent_most(whole_run: Run) -> None:
    atlas, sae = whole_run[1]["atlas"], load_sae(whole_run[1]["sae"].file("sae.safetensors"))
    latents = sae.encode(load_captured(whole_run[1]["activations"].path, "test").activations)
    signs = whole_run[1]["features"].table("latents.csv")["sign"]
    top = atlas.table("top.csv")
    for latent, rows in top.groupby("latent"):
        strongest = (latents[:, latent] * int(signs[latent])).sort(descending=True)
        assert rows["image"].tolist() == strongest.indices[: len(rows)].tolist()
        assert len(rows) == min(6, int((strongest.values > 0).sum()))
        assert rows["value"].tolist() == pytest.approx(latents[rows["image"].tolist(), latent].tolist(), rel=1e-5)
    assert set(top["latent"]) == set(range(24))
    # Every test image has its own picture: there are few.
    kept, (images, labels) = load_file(atlas.file("pictures.safetensors")), images_and_labels()
    assert sorted(kept["images"].tolist()) == list(range(len(images)))
    start = 0
    for number, end in zip(kept["images"].tolist(), kept["ends"].tolist(), strict=True):
        with Image.open(io.BytesIO(kept["bytes"][start:end].numpy().tobytes())) as file:
            small = pil_to_tensor(file.convert("RGB").resize((8, 8), Image.Resampling.BOX)).float() / 255
        start = end
        shown = Preprocess(32, None).denormalise(images[number][None])[0]
        assert (small - nn.functional.adaptive_avg_pool2d(shown, 8)).abs().mean() < 0.05
    classes = whole_run[1]["classifier"].record("classifier.json")["classes"]
    assert top["class"].tolist() == [classes[int(labels[image])] for image in top["image"]]


def test_a_second_run_makes_nothing(
    whole_run: Run, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, artifacts = whole_run
    shutil.copytree(folder / "store", tmp_path / "store")
    for name in ("fit", "test"):
        monkeypatch.setattr(pl.Trainer, name, lambda *_, **__: pytest.fail("something was computed again"))
    again = start(tmp_path, "stages=[finetune,discover,validate,control,diagnose]")  # of a report: below
    assert set(again) == {*KINDS} - {"atlas"}
    assert all(found.reused and found.digest == artifacts[kind].digest for kind, found in again.items())


def test_effect_chooses_the_latent_whose_suppression_lowers_the_class_most(
    whole_run: Run, start: Start, tmp_path: Path
) -> None:
    folder, artifacts = whole_run
    shutil.copytree(folder / "store", tmp_path / "store")
    found = start(tmp_path, "discover.select=effect", "stages=[discover]")
    assert [kind for kind, artifact in found.items() if not artifact.reused] == ["features"]
    train = load_captured(artifacts["activations"].path, "train")
    weight = load_file(artifacts["classifier"].file("model.safetensors"))["fc.weight"].double()
    decoder = load_sae(artifacts["sae"].file("sae.safetensors")).decoder.double().abs()
    step = 1e-3
    effects = torch.empty(10, decoder.shape[1], dtype=torch.float64)
    for k in range(10):
        own = train.activations[train.labels == k].double()
        for latent in range(decoder.shape[1]):
            lowered = own * (1 - step * decoder[:, latent])
            effects[k, latent] = ((own - lowered) @ weight[k]).mean() / step
    latents = found["features"].table("latents.csv")
    means = found["features"].tensors("class_means.safetensors")["class_means"]
    for k, row in enumerate(found["features"].table("selected.csv").itertuples()):
        others = torch.cat([effects[:k], effects[k + 1 :]]).abs().mean(dim=0)
        scores = (effects[k] - others).tolist()
        allowed = [one for one in range(len(latents)) if latents["frequency"][one] > 0 and means[k, one] != 0]
        assert row.latent == max(allowed, key=scores.__getitem__)


def test_another_sae_reuses_what_does_not_depend_on_it(whole_run: Run, start: Start, tmp_path: Path) -> None:
    folder, _ = whole_run
    shutil.copytree(folder / "store", tmp_path / "store")
    found = start(
        tmp_path,
        "sae=topk",
        "sae.dictionary_size=16",
        "sae.epochs=2",
        "stages=[discover,control]",
        "edit.sets=[[storm,3]]",
    )
    assert {kind: artifact.reused for kind, artifact in found.items()} == {
        "classifier": True,
        "activations": True,
        "sae": False,
        "features": False,
        "control": False,
    }
    assert load_sae(found["sae"].file("sae.safetensors")).variant == "topk"
    summary = found["control"].table("summary.csv")
    assert summary["target"].tolist()[-1] == "storm + latent 3"
    assert len(summary["latents"].tolist()[-1].split("; ")) in (1, 2)
    assert len(list(found["control"].file("edits").glob("*.json"))) == 11


@pytest.mark.usefixtures("no_figures")
def test_report_alone_only_reads(whole_run: Run, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fit", "test"):
        monkeypatch.setattr(pl.Trainer, name, lambda *_, **__: pytest.fail("something was computed"))
    with pytest.raises(UserError, match="nothing to report"):
        start(tmp_path, "stages=[report]")
    assert not list((tmp_path / "store").rglob("*.safetensors"))
    folder, _ = whole_run
    shutil.copytree(folder / "store", tmp_path / "store", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "store" / "artifacts" / "diagnose")
    found = start(tmp_path, "stages=[report]")
    assert tuple(found) == KINDS[:-1]
    assert (tmp_path / "run" / "index.html").is_file()


def test_same_seed_same_bits_other_seed_other_bits(whole_run: Run, start: Start, tmp_path: Path) -> None:
    _, artifacts = whole_run
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    same = start(tmp_path / "a", "stages=[discover]")
    assert {kind: a.digest for kind, a in same.items()} == {kind: artifacts[kind].digest for kind in same}
    other = start(tmp_path / "b", "stages=[finetune]", "seed=1")
    assert other["classifier"].digest != artifacts["classifier"].digest


def test_probe_trains_the_head_alone_and_captures_once(whole_run: Run, start: Start, tmp_path: Path) -> None:
    _, artifacts = whole_run
    weights = artifacts["classifier"].file("model.safetensors")
    found = start(tmp_path, "finetune=probe", "finetune.epochs=3", f"backbone.weights={weights}", "stages=[discover]")
    # The capture that the probe was trained on serves the SAE too.
    assert not found["classifier"].reused
    assert found["activations"].reused
    before, after = load_file(weights), load_file(found["classifier"].file("model.safetensors"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_weights_that_fit_are_taken_as_they_are(whole_run: Run, start: Start, tmp_path: Path) -> None:
    _, artifacts = whole_run
    weights = artifacts["classifier"].file("model.safetensors")
    found = start(tmp_path, f"backbone.weights={weights}", "stages=[finetune]")
    assert found["classifier"].record("classifier.json")["mode"] == "none"
    assert found["classifier"].file("model.safetensors").read_bytes() == weights.read_bytes()


def test_aligned_edits_are_refused_where_activations_are_signed(start: Start, tmp_path: Path) -> None:
    backbone = ["backbone=timm", "backbone.name=test_vit", "backbone.weights=random", "+backbone.args.img_size=32"]
    with pytest.raises(UserError, match=r"activations that are never negative.*cls"):
        start(tmp_path, *backbone, "edit.channels=aligned", "stages=[control]", "finetune.epochs=1")


def test_a_set_that_names_nothing_is_refused(whole_run: Run, start: Start, tmp_path: Path) -> None:
    folder, _ = whole_run
    shutil.copytree(folder / "store", tmp_path / "store")
    with pytest.raises(UserError, match="neither a class"):
        start(tmp_path, "stages=[control]", "edit.sets=[[castle]]")


@pytest.mark.usefixtures("no_figures")
def test_a_vit_goes_through_every_stage(start: Start, tmp_path: Path) -> None:
    backbone = ["backbone=timm", "backbone.name=test_vit", "backbone.weights=random", "+backbone.args.img_size=32"]
    found = start(tmp_path, *backbone, "+backbone.args.depth=2", "finetune.epochs=1", "edit.modes=[suppress]")
    assert tuple(found) == KINDS
    assert found["activations"].record("activations.json")["site"] == "cls"
    assert not found["activations"].record("activations.json")["nonnegative"]


@pytest.mark.usefixtures("no_figures")
def test_a_network_of_which_nothing_is_known_goes_through_every_stage(start: Start, tmp_path: Path) -> None:
    backbone = ["backbone=torchvision", "backbone.name=shufflenet_v2_x0_5", "backbone.weights=random"]
    found = start(tmp_path, *backbone, "finetune.epochs=1", "edit.modes=[suppress]")
    assert tuple(found) == KINDS
    assert found["activations"].record("activations.json")["site"] == "fc"


MINE = """
from torch import nn


class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3))
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, num_classes))

    def forward(self, images):
        return {"logits": self.head(self.body(images).relu().mean(dim=(2, 3)))}
"""


@pytest.mark.usefixtures("no_figures")
def test_a_network_of_ones_own_goes_through_every_stage_and_takes_its_edit_back(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_nets.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    backbone = ["backbone=own", "backbone._target_=own_nets.Net", "+backbone.args.width=12"]
    found = start(tmp_path, *backbone, "edit.modes=[suppress]")
    assert tuple(found) == KINDS
    assert found["activations"].record("activations.json")["site"] == "head.1"
    network = import_module("own_nets").Net(10, 12)
    state = load_file(found["classifier"].file("model.safetensors"))
    network.load_state_dict(state)
    edit_file = load_edit_file(next((tmp_path / "run" / "edits").glob("*.json")))
    edited = apply_edit_file(edit_file, state)
    network.load_state_dict(edited)
    assert [name for name in state if not torch.equal(edited[name], state[name])] == ["head.1.weight"]
    # Another code is another network.
    (tmp_path / "own_nets.py").write_text(MINE.replace("Dropout(0.1)", "Dropout(0.25)"))
    monkeypatch.delitem(sys.modules, "own_nets")
    again = start(tmp_path, *backbone, "edit.modes=[suppress]", "stages=[finetune]")
    assert again["classifier"].key != found["classifier"].key


FLAT = """
from torch import nn


def flat(num_classes, width=16):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, width), nn.ReLU(), nn.Linear(width, num_classes))
"""


@pytest.mark.usefixtures("no_figures")
def test_a_network_without_any_map_goes_through_every_stage_without_grad_fam(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flat_nets.py").write_text(FLAT)
    monkeypatch.syspath_prepend(tmp_path)
    found = start(tmp_path, "backbone=own", "backbone._target_=flat_nets.flat", "edit.modes=[suppress]")
    assert tuple(found) == KINDS
    assert set(found["validate"].tensors("saliency.safetensors")) == {"images"}
    scores = found["validate"].table("localisation.csv")
    assert scores["auroc"].notna().all()  # of the latents, which need no map
    assert not {"pointing", "iou", "insertion", "deletion"} & set(scores.columns)
    says = "has no spatial map in front of its site 3, so Grad-FAM is left out"
    assert says in " ".join((tmp_path / "console.txt").read_text().split())
    page = " ".join(re.sub("<[^>]*>", "", (tmp_path / "run" / "index.html").read_text()).split())
    assert says in page
    assert "under their Grad-FAM map" not in page
    assert len(list((tmp_path / "run" / "figures").glob("validate-0*.png"))) == 10
