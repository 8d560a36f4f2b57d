"""Localisation: maps of a network whose channels are the colours of the objects, so that all scores are known."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from experiments.beyond.localisation import EXPERIMENT, analyse, measures
from experiments.beyond.localisation.measures import LATENT, bootstrap, looks_of, objects_of, summary_of
from experiments.claims import load_claims
from experiments.testbeds import TESTBEDS, Setup
from salve.backbones import find_site
from salve.backbones.cut import Cut
from salve.data.base import ConceptTruth
from salve.data.boxes import Boxes
from salve.data.transforms import Preprocess
from salve.sae import make_sae
from salve.saliency import grad_fam, map_correlation, randomised
from salve.types import UserError

CLASSES, SIZE = ["red", "green"], 32
#: Where the object of each image is: never in the middle.
PLACES = [(2, 2, 10, 8), (20, 3, 30, 12), (3, 18, 12, 30), (19, 20, 29, 30)]
LABELS = torch.tensor([0, 1, 0, 1])


def a_network() -> nn.Sequential:
    """Four channels, of which the first two are the colours of the classes, and the last is silent."""
    conv, head = nn.Conv2d(3, 4, 1, bias=False), nn.Linear(4, 2)
    conv.weight.data = torch.tensor([[5.0, -5, 0], [-5, 5, 0], [0, 0, 1], [-1, -1, -1]])[..., None, None]
    head.weight.data, head.bias.data = torch.tensor([[20.0, -20, 0, 0], [-20, 20, 0, 0]]), torch.zeros(2)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def drawn(split: str) -> list[tuple[Tensor, int]]:
    """Grey images with a patch in the class's colour."""
    images = []
    for (x0, y0, x1, y1), label in zip(PLACES, LABELS.tolist(), strict=True):
        image = torch.full((3, SIZE, SIZE), 0.1)
        image[label, y0:y1, x0:x1] = 1.0
        images.append((image, label))
    return images


def masks(indices: Sequence[int], concept: int) -> Tensor:
    found = torch.zeros(len(indices), SIZE, SIZE, dtype=torch.bool)
    for mask, i in zip(found, indices, strict=True):
        x0, y0, x1, y1 = PLACES[i]
        mask[y0:y1, x0:x1] = True
    return found


@pytest.fixture(scope="module")
def study() -> Any:
    model = a_network()
    sae = make_sae("linear_l1", 4, 3, torch.Generator().manual_seed(0))
    sae.encoder.data, sae.decoder.data = torch.eye(4)[[0, 1, 3]], torch.eye(4)[:, [0, 1, 3]]
    boxes = Boxes(
        {i: torch.tensor([place]).double() for i, place in enumerate(PLACES)}, dict.fromkeys(range(4), (SIZE, SIZE))
    )
    data = SimpleNamespace(
        boxes=lambda split: boxes, truth=lambda split: None, labels=lambda split: LABELS, dataset=drawn, batch_size=3,
        preprocess=Preprocess(SIZE, None),
    )  # fmt: skip
    cut = Cut(model, find_site(model, "last", SIZE), torch.arange(2))
    context = SimpleNamespace(data=data, device=torch.device("cpu"), size=SIZE, cut=lambda classifier: cut)
    # The only other latent that fires is silent on all images.
    latents = pd.DataFrame({"latent": [0, 1, 2], "kind": ["class-defining", "dead", "diffuse"], "sign": 1})
    run = SimpleNamespace(
        sae=sae, flat_settings={"sae.pool": "mean"}, artifact=lambda kind: kind, table=lambda *_: latents,
        selected=pd.DataFrame({"latent": [0.0, 1.0], "sign": [1.0, 1.0]}, index=CLASSES),
    )  # fmt: skip
    return SimpleNamespace(
        testbed=TESTBEDS["scenes"], classes=CLASSES, runs=[run], context=context, test=SimpleNamespace(labels=LABELS)
    )


def test_findings_about_maps_that_lie_on_their_objects(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "RANDOM", 1)
    monkeypatch.setattr(measures, "FEW", 1)
    monkeypatch.setattr(measures, "STEPS", 2)
    found = analyse([study])
    mean = found.tables["summary"].pivot_table("mean", "measure", "method")
    for name in measures.MEASURES:
        assert mean.loc[name, LATENT] == mean.loc[name, "grad_cam"] == 1
        assert mean.loc[name, "gaussian"] < 0.6
    assert mean.loc["pointing", "random"] == mean.loc["mass", "random"] == mean.loc["box", "random"] == 0
    area = np.mean([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in PLACES]) / SIZE**2
    assert mean.loc["rank", "random"] == pytest.approx(area)  # a blank map ranks by chance
    assert mean.loc["insertion", LATENT] > mean.loc["insertion", "gaussian"]
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() == {name for name in load_claims() if name.startswith("localisation.")}
    assert values["localisation.grad_cam"] == 0
    assert values["localisation.random"] == 1
    assert "beats a Gaussian in the middle of the image by every score" in found.paragraph
    images = found.tables["images"]
    assert images.groupby("method")["insertion"].count().tolist() == [2] * 4  # one of each class
    assert list(found.pictures) == ["localisation"]
    random = found.tables["randomisation"]
    assert random.groupby("method").size().to_dict() == {LATENT: 6, "grad_cam": 5}
    # The last row: the network has forgotten all, and the SAE reads it as before.
    before, after = list[Tensor](), list[Tensor]()
    for i, (image, label) in enumerate(drawn("test")[:2]):
        for model, maps in ((a_network(), before), (randomised(a_network()), after)):
            maps.append(grad_fam(model, "last", study.runs[0].sae, image[None], [label])[0])
        assert i == label
    wanted = map_correlation(torch.cat(before), torch.cat(after)).nanmean().item()
    assert random.iloc[-1]["correlation"] == pytest.approx(wanted, nan_ok=True)


def test_masks_take_the_place_of_boxes(study: Any) -> None:
    truth = ConceptTruth(
        ("a", "b"), (1, 0), torch.tensor([[True, True], [True, False], [True, False], [False, True]]), masks
    )
    data = SimpleNamespace(**{**vars(study.context.data), "boxes": lambda split: None, "truth": lambda split: truth})
    scenes: Any = SimpleNamespace(
        **{**vars(study), "context": SimpleNamespace(**{**vars(study.context), "data": data})}
    )
    found = objects_of(scenes, "test")
    assert (found.indices, found.labels) == ([0, 1], [0, 1])  # the others do not show what defines their class
    assert [box.tolist() for box in found.boxes] == [[list(map(float, place))] for place in PLACES[:2]]
    data.truth = lambda split: None
    with pytest.raises(UserError, match=r"have neither boxes nor masks; give data\.boxes=FILE"):
        objects_of(scenes, "test")


def test_a_class_without_a_latent_is_left_out(study: Any) -> None:
    run: Any = SimpleNamespace(
        **{**vars(study.runs[0]), "selected": pd.DataFrame({"latent": [np.nan, 1.0], "sign": 1}, CLASSES)}
    )
    looks = looks_of(study, run, study.context.cut("classifier"))
    assert looks.latents.keys() == {1}
    assert measures._known(objects_of(study, "test"), looks).indices == [1, 3]


def test_intervals_are_of_images_and_differences_are_paired() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, 80)
    mean, low, high = bootstrap(np.append(values, np.nan))
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * 0.2 / 80**0.5, rel=0.25)
    rows = [{"latent": value, "grad_cam": value + 0.1, "random": 0, "gaussian": 1} for value in values]
    images = pd.DataFrame(rows).rename_axis("image").reset_index().melt("image", var_name="method", value_name="box")
    names = ("pointing", "mass", "rank", "insertion", "deletion")
    images = images.assign(testbed="scenes", **dict.fromkeys(names, images["box"]))
    found = summary_of(images).set_index(["measure", "method"])
    ahead = found.loc[("box", "grad_cam"), ["ahead", "ahead_low", "ahead_high"]]
    assert ahead.tolist() == pytest.approx([-0.1] * 3)
    assert found.loc[("deletion", "grad_cam"), "ahead"] == pytest.approx(0.1)  # less is better


def test_photographs_need_boxes(tmp_path: Path) -> None:
    (tmp_path / "w").touch()
    here = Setup(tmp_path, {"imagenette": str(tmp_path)}, {"resnet18": str(tmp_path / "w")})
    assert EXPERIMENT.lacks(here, TESTBEDS["resnet18"]) == "give data.boxes=FILE"
    assert EXPERIMENT.lacks(here, TESTBEDS["scenes"]) == ""
    boxed = Setup(tmp_path, here.folders, here.weights, settings=("data.boxes=x",))
    assert EXPERIMENT.lacks(boxed, TESTBEDS["resnet18"]) == ""
    assert EXPERIMENT.module == "experiments.beyond.localisation"
