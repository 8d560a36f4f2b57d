"""Stage ``diagnose`` and the effects behind ``discover.select=effect``, at the last site and before it."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from salve.artifacts import Artifact, write_record, write_table
from salve.backbones import head_site, site_activations
from salve.backbones.cut import Cut
from salve.edit_settings import EditSettings
from salve.editing import gate
from salve.sae import make_sae
from salve.sae.io import save_sae
from salve.stages import diagnose
from salve.stages.context import StageContext
from salve.stages.diagnose import summarise
from salve.stages.effects import class_attributions
from salve.stages.targets import balanced
from tests.unit.test_tryout import built

LAYER, CLASSES = "layer4.0.conv2", 10
GRID = [0.0, 0.5, 1.0, 2.0, 5.0, 20.0]
LATENTS = [3, 1, 4, 1, 5, None, 2, 6, 5, 3]
Inputs = tuple[StageContext, Artifact, Artifact, Artifact, Artifact]


def artifact(kind: str, folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    return Artifact(kind, kind, folder, kind, reused=True)


def made(tmp_path: Path, layer: str) -> Inputs:
    """A random network with a head that is right on most test images, and what the stages before would make of it."""
    _, context = built(tmp_path, "data.test_per_class=3", "data.train_per_class=3", "data.batch_size=7")
    context = replace(context, layer=layer)
    torch.manual_seed(0)
    model = context.build()[0].eval()
    classifier, activations = (artifact(kind, tmp_path / kind) for kind in ("classifier", "activations"))
    images, labels = map(torch.cat, zip(*context.data.loader("test"), strict=True))
    labels[:4] += 1
    with torch.no_grad():
        model.get_parameter("layer4.0.bn2.weight").fill_(1)  # timm starts it at 0, so that the block does nothing
        features = site_activations(model, head_site(model), images)
        wanted = torch.nn.functional.one_hot(labels, CLASSES).float()
        model.get_parameter("fc.weight").copy_(torch.linalg.lstsq(features, wanted).solution.T)
        model.get_parameter("fc.bias").zero_()
    save_file(model.state_dict(), classifier.file("model.safetensors"))
    cut = context.cut(classifier)
    write_record(activations.file("activations.json"), {"site": layer, "width": cut.site.width, "nonnegative": True})
    for split in ("train", "test"):
        rows = [(cut.read(images)[:, 0], labels) for images, labels in context.data.loader(split)]
        tensors = {"activations": torch.cat([one for one, _ in rows]), "labels": torch.cat([one for _, one in rows])}
        save_file(tensors, activations.file(f"{split}-00000.safetensors"))
    sae, read = (artifact(kind, tmp_path / kind) for kind in ("sae", "features"))
    save_sae(
        sae.file("sae.safetensors"),
        make_sae("linear_l1", cut.site.width, 8, torch.Generator().manual_seed(1)),
        {"backbone": context.backbone.name, "site": layer},
    )
    selected = {"class": context.classes, "latent": LATENTS, "sign": 1, "kind": "diffuse"}
    write_table(read.file("selected.csv"), pd.DataFrame(selected).astype({"latent": "Int64"}))
    write_table(read.file("latents.csv"), pd.DataFrame({"latent": range(8)}))
    return context, classifier, activations, sae, read


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return made(tmp_path_factory.mktemp("deep"), LAYER)


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return made(tmp_path_factory.mktemp("last"), "last")


def settings(images: int = 2) -> EditSettings:
    return EditSettings(GRID, ["suppress"], "unit", "all", images=images)


@torch.no_grad()
def logits_of_edited(cut: Cut, image: Tensor, column: Tensor, alpha: float) -> Tensor:
    """Of the network itself, with scaled weights."""
    state = cut.model.state_dict()
    scaled = {reader.weight: reader.scaled(state[reader.weight], gate(column, alpha)) for reader in cut.site.readers}
    return torch.func.functional_call(cut.model, scaled, (image[None],))[0]


def test_before_the_last_site_a_class_is_lost_at_the_strength_and_not_just_below(deep: Inputs) -> None:
    context, classifier, activations, sae, features = deep
    found = diagnose(context, settings(), classifier, activations, sae, features)
    images, summary = found.table("images.csv"), found.table("summary.csv")
    named = [name for name, latent in zip(context.classes, LATENTS, strict=True) if latent is not None]
    assert list(summary["class"]) == named
    assert list(images["class"]) == [name for name in named for _ in range(2)]
    assert set(summary["found_by"]) == {"grid"}
    cut, decoder = context.cut(classifier), context.sae(sae, activations).decoder
    labels, dataset = context.data.labels("test"), context.data.dataset("test")
    seen = {0: 0, 1: 0, math.inf: 0}
    for row in images.itertuples():
        image, label = dataset[row.image]
        assert (context.classes[label], LATENTS[label]) == (row[2], row.latent)
        column = decoder[:, row.latent]

        def holds(alpha: float, image: Tensor = image, label: int = label, column: Tensor = column) -> bool:
            logits = logits_of_edited(cut, image, column, alpha)
            return bool(logits[label] > torch.cat([logits[:label], logits[label + 1 :]]).max())

        flip = row.flip_crossing
        assert row.correct == holds(0) == (flip > 0)
        before = [alpha for alpha in GRID if alpha < row.flip_grid] if flip > 0 else []
        assert all(holds(alpha) for alpha in before)
        if 0 < flip < math.inf:
            assert not holds(flip * (1 + 1e-4))
            assert holds(flip * 0.989)
            assert before[-1] < flip <= row.flip_grid
        seen[flip if flip in (0, math.inf) else 1] += 1
    # Whether some image is never lost is left to the random numbers; test_crossing.py has such images.
    assert min(seen[0], seen[1]) > 0
    assert {int(number) for number in images["image"]} < set(balanced(labels, 2))
    one = images[images["correct"]].groupby("class")["flip_crossing"].quantile(0.5, interpolation="lower")
    medians = summary.set_index("class")["alpha_flip_median"].dropna()
    pd.testing.assert_series_equal(medians.sort_index(), one.sort_index(), check_names=False)


def test_the_number_of_images_is_part_of_the_key_where_it_counts(deep: Inputs, last: Inputs) -> None:
    def key(given: Inputs, images: int) -> str:
        context, *others = given
        return diagnose(context, settings(images), *others).key

    assert key(deep, 1) != key(deep, 2)
    assert key(last, 1) == key(last, 2)


def test_at_the_last_site_all_images_have_exact_strengths(last: Inputs) -> None:
    context, *others = last
    found = diagnose(context, settings(), *others)
    images, summary = found.table("images.csv"), found.table("summary.csv")
    named = [k for k, latent in enumerate(LATENTS) if latent is not None]
    assert images["image"].tolist() == [k + CLASSES * turn for k in named for turn in range(3)]
    assert list(images.columns) == [
        *("image", "class", "latent", "correct", "logit_linear", "logit_exact", "flip_linear", "flip_exact"),
        "flip_grid",
    ]
    assert list(summary.columns)[-2:] == ["linear_exact_agreement", "grid_agreement"]


def test_the_summary_of_crossings_counts_a_linear_approximation_within_its_tolerance() -> None:
    rows = {
        "correct": [True, True, True, True, False],
        "flip_linear": [1.0, 1.015, 2.0, math.inf, 0.0],
        "flip_crossing": [1.0, 1.0, 1.0, math.inf, 0.0],
        "logit_crossing": [2.0, math.inf, 3.0, math.inf, 0.0],
        "latent": 3,
    }
    found = summarise("a", pd.DataFrame(rows), GRID)
    assert (found["images"], found["correct"], found["found_by"]) == (5, 4, "grid")
    assert (found["linear_agreement"], found["alpha_flip_infinite"], found["alpha_logit_infinite"]) == (0.75, 0.25, 0.5)
    assert (found["alpha_flip_median"], found["alpha_logit_median"]) == (1.0, 3.0)


def test_a_sample_has_as_many_images_of_each_class_and_is_always_the_same() -> None:
    labels = torch.arange(95) % 10
    chosen = balanced(labels, 4)
    assert chosen == sorted(set(chosen))
    assert labels[chosen].bincount().tolist() == [4] * 10
    assert balanced(labels, 4) == chosen
    assert set(balanced(labels, 3)) < set(chosen)
    assert balanced(labels, 100) == list(range(95))
    # Whatever the other classes are.
    others = torch.where(labels == 7, labels, 0)
    assert [n for n in balanced(others, 4) if labels[n] == 7] == [n for n in chosen if labels[n] == 7]
    assert [n for n in chosen if labels[n] == 7] != list(range(7, 47, 10))  # not simply the first ones
    assert balanced(torch.tensor([3, 3]), 1) in ([0], [1])


@pytest.mark.parametrize("layer", ["deep", "last"])
def test_attributions_of_classes_are_slopes_of_their_own_logits(request: pytest.FixtureRequest, layer: str) -> None:
    """Finite differences in the network with scaled weights, channel by channel, over the same images."""
    context, classifier, activations, *_ = request.getfixturevalue(layer)
    found = class_attributions(context, classifier, activations)
    cut = context.cut(classifier)
    assert found.shape == (CLASSES, cut.site.width)
    cut.model.double()
    dataset, step = context.data.dataset("train"), 1e-6
    for k in range(0, CLASSES, 4):
        own = [image.double() for image, label in (dataset[n] for n in range(30)) if label == k]
        for j in found[k].abs().topk(3).indices.tolist():
            column = torch.zeros(cut.site.width, dtype=torch.float64)
            column[j] = 1
            falls = [
                logits_of_edited(cut, one, -column, 0)[k] - logits_of_edited(cut, one, column, step)[k] for one in own
            ]
            slope = float(torch.stack(falls).mean() / step)
            assert abs(slope) > 1e-2
            assert float(found[k, j]) == pytest.approx(slope, rel=1e-3)


def test_effects_are_of_a_sample_of_train_images(deep: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.stages.effects.SAMPLED", 1)
    context, classifier, activations, *_ = deep
    read: list[int] = []
    plain = context.data.loader

    def loader(split: str, indices: list[int]) -> object:
        assert split == "train"
        read.extend(indices)
        return plain("train", indices=indices)

    monkeypatch.setattr(context.data, "loader", loader)
    found = class_attributions(context, classifier, activations)
    assert found.isfinite().all()
    once = len(read)
    assert once > 0
    # They are the same for every SAE of the site, and not computed again for another one.
    assert torch.equal(class_attributions(context, classifier, activations), found)
    assert len(read) == once
    assert read == balanced(context.data.labels("train"), 1)
