"""What a finished SAE is said to do, and what its latents are, against libraries and plain loops."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.metrics import accuracy_score, r2_score, roc_auc_score
from sklearn.metrics.pairwise import paired_cosine_distances
from torch import Tensor

from salve.activations import Captured
from salve.artifacts import Artifact, Store, load_tensors, write_record
from salve.backbones.tail import LinearTail
from salve.data.base import ConceptTruth
from salve.sae import SAE, make_sae, save_sae
from salve.stages import DiscoverSettings, StageContext, read_features
from salve.stages.discover import concept_table
from salve.stages.measure import MOST_ERROR, blocks, check_activations, check_sae, measure_sae
from salve.types import Diverged, UserError
from tests.unit.sae_examples import ALL, drawn, example

WIDTH, CLASSES = 6, 4


def split(rows: int, seed: int, width: int = WIDTH) -> Captured:
    """Activations with a mean that differs between channels; class 3 has no images."""
    return Captured(drawn(rows, width, seed=seed) + torch.arange(width) / 4, torch.arange(rows) % (CLASSES - 1))


TRAIN, SELECT, TEST = split(90, 1), split(40, 5), split(50, 2)
WEIGHT, BIAS = drawn(CLASSES, WIDTH, seed=3), drawn(CLASSES, seed=4)


def measured(sae: SAE) -> dict[str, float | None]:
    return measure_sae(sae.eval(), TRAIN, {"select": SELECT, "test": TEST}, LinearTail(WEIGHT, BIAS))


def logits_of(activations: Tensor) -> np.ndarray:
    return activations.numpy() @ WEIGHT.numpy().T + BIAS.numpy()


# -- blocks


@pytest.mark.parametrize("columns", [1, 7, 90, 4000])
def test_blocks_cover_a_split_in_order_and_stay_small(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.stages.measure.AT_ONCE", 100)
    parts = list(blocks(TRAIN, columns))
    activations, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    assert torch.equal(activations, TRAIN.activations)
    assert torch.equal(labels, TRAIN.labels)
    assert all(len(rows) * max(columns, WIDTH) <= 100 or len(rows) == 1 for rows, _ in parts)
    assert len(parts) > 1


@pytest.mark.parametrize("columns", [1, 7, 4000])
def test_rows_of_a_map_come_with_their_images_labels(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.stages.measure.AT_ONCE", 100)
    of_map = Captured(TRAIN.rows, torch.arange(len(TRAIN) // 3) % CLASSES, 3)
    parts = [labels for _, labels in blocks(of_map, columns)]
    assert len(parts) > 1
    assert torch.cat(parts).tolist() == [(row // 3) % CLASSES for row in range(len(TRAIN))]


# -- the record of an SAE


def held_out_measures(sae: SAE, split: Captured) -> dict[str, float | None]:
    """What libraries and plain loops say of reconstructions."""
    rows, labels = split.activations, split.labels
    reconstruction = sae.decode(sae.encode(rows))
    fires = (sae.encode(rows).abs() > sae.firing_threshold * rows.norm(dim=1, keepdim=True)).numpy()
    fed = {
        "original": rows,
        "downstream": reconstruction,
        "zero": 0 * rows,
        "mean": 0 * rows + TRAIN.activations.mean(0),
    }
    accuracy = {name: accuracy_score(labels, logits_of(part).argmax(1)) for name, part in fed.items()}
    p = softmax(logits_of(rows), 1)
    kl = {name: rel_entr(p, softmax(logits_of(part), 1)).sum(1).mean() for name, part in fed.items()}
    expected: dict[str, float | None] = {
        "fve": r2_score(rows, reconstruction, multioutput="variance_weighted"),
        "cosine": 1 - paired_cosine_distances(rows, reconstruction).mean(),
        "l0": fires.sum(1).mean(),
        "l1": float(sae.encode(rows).abs().sum(1).mean()),
        **{f"{name}_accuracy": value for name, value in accuracy.items()},
        **{f"{name}_kl": kl[name] for name in ("downstream", "zero", "mean")},
    }
    for name in ("zero", "mean"):
        cost = accuracy["original"] - accuracy[name]
        share = (accuracy["downstream"] - accuracy[name]) / cost if cost else None
        expected |= {f"accuracy_recovered_from_{name}": share}
        expected |= {f"kl_recovered_from_{name}": 1 - kl["downstream"] / kl[name]}
    return expected


@pytest.mark.parametrize("variant", ALL)
def test_measures_equal_libraries_and_loops_whatever_the_blocks(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = example(variant, WIDTH).eval().requires_grad_(False)
    train = sae.encode(TRAIN.activations).abs() > sae.firing_threshold * TRAIN.activations.norm(dim=1, keepdim=True)
    frequency = train.numpy().mean(0)
    expected = {
        "dead_fraction": (frequency == 0).mean(),
        "almost_dead_fraction": ((frequency > 0) & (frequency < 0.001)).mean(),
        "dense_fraction": (frequency > 0.5).mean(),
        **held_out_measures(sae, TEST),
        **{f"select_{name}": value for name, value in held_out_measures(sae, SELECT).items()},
    }
    assert measured(sae) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr("salve.stages.measure.AT_ONCE", 7 * sae.dictionary_size)
    assert measured(sae) == pytest.approx(expected, rel=1e-9)


def error_of(sae: SAE) -> float:
    """Over the activations' own mean square, by plain sums."""
    rows = SELECT.activations
    return ((sae.decode(sae.encode(rows)) - rows).square().sum() / rows.square().sum()).item()


def scaled(sae: SAE, times: float) -> SAE:
    """One whose reconstructions are so many times as long."""
    with torch.no_grad():
        sae.encoder.mul_(times)
    return sae.eval()


@pytest.mark.parametrize("times", [0.0, 0.9, 3.0, 6.0, 1e9])
def test_an_sae_that_is_worse_than_none_is_refused_and_a_poor_one_is_not(times: float) -> None:
    sae = scaled(make_sae("linear_l1", WIDTH, 2 * WIDTH, torch.Generator().manual_seed(0)).double(), times)
    record, error = measured(sae), error_of(sae)
    assert (error > MOST_ERROR) == (times > 5)
    if error <= MOST_ERROR:
        check_sae(record, SELECT, "pool")
    else:
        with pytest.raises(Diverged) as refused:
            check_sae(record, SELECT, "pool")
        assert f"its error on select images is {error:.2g} times that of an output of" in str(refused.value)
        assert f"(FVE {record['select_fve']:.2g})" in str(refused.value)


def test_a_large_common_mean_does_not_make_a_poor_sae_nonsense() -> None:
    """Reconstructing nothing is far below zero by its FVE where activations hardly vary, and is no divergence."""
    rows = 100 + drawn(50, WIDTH, seed=1)
    far = Captured(rows, torch.zeros(50, dtype=torch.long))
    fve = 1 - float(rows.square().sum() / (rows - rows.mean(0)).square().sum())
    assert fve < -1000
    check_sae({"select_fve": fve}, far, "pool")
    with pytest.raises(Diverged):
        check_sae({"select_fve": 12 * fve}, far, "pool")


def test_an_sae_whose_measure_is_undefined_is_refused() -> None:
    sae = scaled(make_sae("linear_l1", WIDTH, 4, torch.Generator().manual_seed(0)).double(), 1e200)
    record = measured(sae)
    assert record["select_fve"] is None
    with pytest.raises(Diverged, match="FVE undefined"):
        check_sae(record, SELECT, "pool")


@pytest.mark.parametrize("value", [0.0, 0.3, -7e5])
def test_activations_that_are_the_same_for_every_image_are_refused(value: float) -> None:
    labels = torch.zeros(2000, dtype=torch.long)
    same = Captured(torch.full((2000, WIDTH), value) * torch.arange(1, WIDTH + 1), labels)
    with pytest.raises(UserError, match="activations at pool are the same for every image"):
        check_activations(same, "pool")
    with pytest.raises(UserError, match="of the select split, are the same"):
        check_sae({"select_fve": 1.0}, same, "pool")
    square, variance = check_activations(SELECT, "pool")
    assert square == pytest.approx(float(SELECT.activations.square().sum(1).mean()))
    assert variance == pytest.approx(float(SELECT.activations.var(0, unbiased=False).sum()))


def test_what_is_rare_is_seen_on_the_train_split() -> None:
    sae = make_sae("relu_l1", 1, 4).double().requires_grad_(False)
    sae.encoder.copy_(torch.tensor([[1.0], [1.0], [1.0], [-1.0]]))
    sae.bias.copy_(torch.tensor([0.0, -5.0, -0.5, 0.0]))  # all but one image; one; half; none
    rows = torch.cat([torch.zeros(1), torch.full((999,), 0.4), torch.full((1999,), 1.0), torch.tensor([9.0])])
    train = Captured(rows[:, None].double(), torch.zeros(3000, dtype=torch.long))
    few = Captured(train.activations[:2], train.labels[:2])
    found = measure_sae(
        sae.eval(), train, {"test": few}, LinearTail(torch.ones(2, 1).double(), torch.zeros(2).double())
    )
    shares = [found[f"{name}_fraction"] for name in ("dead", "almost_dead", "dense")]
    assert shares == [1 / 4, 1 / 4, 2 / 4]
    assert found["l0"] == 0.5


def test_a_dictionary_of_one_latent_and_a_share_that_is_undefined_make_a_record() -> None:
    sae = example("linear_l1", WIDTH, 1).eval().requires_grad_(False)
    blind = measure_sae(sae, TRAIN, {"test": TEST}, LinearTail(torch.zeros_like(WEIGHT), BIAS))
    assert blind["kl_recovered_from_zero"] is None
    assert blind["accuracy_recovered_from_mean"] is None
    assert all(math.isfinite(value) for name, value in blind.items() if value is not None)
    assert "frequency" not in blind
    json.dumps(blind, allow_nan=False)


# -- what the latents say


class Made:
    """A context and its artifacts, with no network behind them."""

    def __init__(self, root: Path, sae: SAE, truth: bool = True) -> None:
        self.classes = ("a", "b", "c", "empty")
        self.splits = {"train": TRAIN, "select": SELECT, "test": TEST}
        self.store = Store(root)
        self.presence = {name: drawn(len(part.labels), 3, seed=9) > 0 for name, part in self.splits.items()}
        for shown in self.presence.values():
            shown[:, 2] = False
        self.artifacts = {
            kind: self.store.get_or_make(kind, {}, self.writer(kind, sae)) for kind in ("sae", "activations")
        }
        self.truth = truth
        self.data = SimpleNamespace(truth=self.truth_of)
        self.backbone, self.layer = SimpleNamespace(name="resnet18"), "avgpool"

    @staticmethod
    def writer(kind: str, sae: SAE) -> Any:
        def write(folder: Path, _: Path) -> None:
            if kind == "sae":
                save_sae(folder / "sae.safetensors", sae, {"backbone": "resnet18", "site": "avgpool"})
            else:
                write_record(folder / "activations.json", {"width": WIDTH})

        return write

    def truth_of(self, name: str) -> ConceptTruth | None:
        masks = lambda indices, concept: torch.zeros(len(indices), 2, 2, dtype=torch.bool)  # noqa: E731
        return ConceptTruth(("x", "y", "z"), (0, 1, 1, 2), self.presence[name], masks) if self.truth else None

    def activations(self, _: Artifact, name: str) -> Captured:
        return self.splits[name]

    def sae(self, *artifacts: Artifact) -> SAE:
        return StageContext.sae(self, *artifacts)  # type: ignore[arg-type]

    def cut(self, _: Artifact) -> Any:
        return SimpleNamespace(linear=LinearTail(WEIGHT, BIAS), site=SimpleNamespace(kind="vector"))

    def features(self) -> Artifact:
        activations, sae = self.artifacts["activations"], self.artifacts["sae"]
        settings = DiscoverSettings(0.5, "margin", 3)
        return read_features(self, settings, "mean", activations, activations, sae)  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [1 << 22, 40])
def test_features_equal_plain_loops(tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.stages.measure.AT_ONCE", at_once)
    sae = example("relu_l1", WIDTH).eval()
    with torch.no_grad():
        sae.bias[4] = -100.0  # never fires
    around = Made(tmp_path, sae)
    found = around.features()
    latents, labels = sae.encode(TRAIN.activations).detach().numpy(), TRAIN.labels.numpy()
    table = found.table("latents.csv")
    np.testing.assert_allclose(table["frequency"], (latents > 0).mean(0))
    for number, row in enumerate(table.itertuples()):
        z = latents[:, number]
        top = [image for image in np.argsort(-z)[:10] if z[image] > 0]
        assert row.purity_images == len(top)
        if number == 4:
            assert not top
            assert math.isnan(row.purity)
            assert math.isnan(row.entropy)
            continue
        assert row.purity == pytest.approx(np.bincount(labels[top]).max() / len(top))
        assert row.entropy == pytest.approx(scipy_entropy([z[labels == k].mean() for k in range(3)]), abs=1e-9)
    means = load_tensors(found.file("class_means.safetensors"))["class_means"]
    np.testing.assert_allclose(means[:3], [latents[labels == k].mean(0) for k in range(3)], rtol=1e-6)
    assert means[3].isnan().all()
    histogram = load_tensors(found.file("histograms.safetensors"))
    assert histogram["counts"].sum(1).tolist() == (latents > 0).sum(0).tolist()
    relative = latents[:, 0] / np.linalg.norm(TRAIN.activations, axis=1)
    expected, _ = np.histogram(relative[relative > 0], histogram["edges"].numpy())
    assert histogram["counts"][0, 1:-1].tolist() == expected.tolist()
    right = logits_of(TEST.activations).argmax(1) == TEST.labels.numpy()
    classes = found.table("classes.csv")
    assert classes["test_accuracy"].tolist()[:3] == pytest.approx([right[TEST.labels == k].mean() for k in range(3)])
    assert (classes["test_images"].tolist()[3], math.isnan(classes["test_accuracy"][3])) == (0, True)


def test_concepts_are_told_where_the_data_know_them(tmp_path: Path) -> None:
    sae = example("linear_l1", WIDTH).eval()
    around = Made(tmp_path / "with", sae)
    found = around.features().table("concepts.csv").set_index("concept")
    assert found["classes"].tolist() == ["a", "b; c", "empty"]
    assert found["test_images"].tolist() == around.presence["test"].sum(0).tolist()
    train, test = (sae.encode(part.activations).detach() for part in (TRAIN, TEST))
    for k, name in enumerate(("x", "y")):
        shown = around.presence["train"][:, k]
        auroc = [roc_auc_score(shown, train[:, latent]) for latent in range(9)]
        best = int(np.argmax(np.abs(np.array(auroc) - 0.5)))
        sign = -1 if auroc[best] < 0.5 else 1
        assert (found.loc[name, "latent"], found.loc[name, "sign"]) == (best, sign)
        judged = roc_auc_score(around.presence["test"][:, k], sign * test[:, best])
        assert found.loc[name, "auroc"] == pytest.approx(judged)
    assert found.loc["z", ["latent", "sign", "auroc"]].isna().all()  # no image shows it
    without = Made(tmp_path / "without", sae, truth=False).features()
    assert not without.file("concepts.csv").exists()


def test_only_signed_latents_are_turned_round() -> None:
    latents = torch.tensor([[3.0, 0.6], [2.0, 0.4], [1.0, 0.5], [0.0, 0.5]])
    presence = torch.tensor([[False], [False], [True], [True]])
    truth = ConceptTruth(("x",), (0,), presence, lambda indices, concept: torch.zeros(1, 1, 1, dtype=torch.bool))
    signed, unsigned = (concept_table(latents, latents, truth, truth, ("a",), signed) for signed in (True, False))
    assert signed[["latent", "sign", "auroc"]].to_numpy().tolist() == [[0, -1, 1.0]]
    assert unsigned[["latent", "sign", "auroc"]].to_numpy().tolist() == [[1, 1, 0.5]]


def test_a_dictionary_of_one_latent_has_its_features(tmp_path: Path) -> None:
    found = Made(tmp_path, example("linear_l1", WIDTH, 1).eval()).features()
    table = found.table("latents.csv")
    assert len(table) == 1
    assert 0 < table["frequency"][0] <= 1
    assert table["purity_images"].tolist() == [10]
    assert load_tensors(found.file("class_means.safetensors"))["class_means"].shape == (CLASSES, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layer": "layer4"}, "does not fit site layer4"),
        ({"backbone": SimpleNamespace(name="resnet50")}, "does not fit backbone resnet50"),
        ({}, "does not fit width 6"),
    ],
)
def test_a_job_refuses_an_sae_that_was_made_for_something_else(tmp_path: Path, change: Any, said: str) -> None:
    around = Made(tmp_path, example("linear_l1", WIDTH if change else WIDTH + 1))
    for name, value in change.items():
        setattr(around, name, value)
    with pytest.raises(UserError, match=said):
        around.sae(around.artifacts["sae"], around.artifacts["activations"])
