"""Layers: what is read of runs at several sites, and what the claims are measured by."""

import math
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from experiments.beyond.layers import EXPERIMENT, SELECTIONS, analyse, chosen, depth_figure, runs_of, table_of
from experiments.claims import load_claims
from experiments.testbeds import TESTBEDS
from salve.backbones import Reader, Site, sites
from salve.run.explain import conf_dir

CLASSES = ["church", "tench"]


def church(cost: float, on_select: float | None = None) -> dict[str, Any]:
    """An edit that takes church from 80 % to 5 % while tench loses so much, on test and on select."""
    select = cost if on_select is None else on_select
    found = {"class": "church", "reached": True, "alpha": 3.0, "after": 0.05, "drift": cost}
    return found | {"selectivity": 0.75 - cost, "select_selectivity": 0.75 - select}


#: No strength takes it there.
FLAT = {"class": "church", "reached": False, "alpha": math.inf, "selectivity": 0.0, "select_selectivity": 0.0}
NETWORK = nn.Sequential(
    *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
    *(nn.Flatten(), nn.Linear(5, 2)),
).eval()  # fmt: skip


class OneRun:
    """A run at a site, with a gate of church, and a rank-one edit of both classes that costs nothing."""

    def __init__(self, layer: str, select: str, gate: dict[str, Any], **metrics: Any) -> None:
        self.layer, self.seed = layer, 0
        self.flat_settings = {"discover.select": select, "compare.images": 20, "capture.positions": 16, "sae.k": 16}
        self.metrics = {"fve": 0.7, "downstream_accuracy": 0.6, "test_accuracy": 0.85, **metrics}
        self.metrics = {"alpha_flip_median": 3.0, "alpha_flip_infinite": 0.1} | self.metrics
        self.kinds = ["class-defining", "diffuse", "dead", "class-defining", "cross-class"]
        rival = [church(0.0) | {"class": name} for name in CLASSES]
        self.edits = [gate | {"method": "gate"}, *(one | {"method": "rank_one"} for one in rival)]

    def artifact(self, kind: str) -> str:
        assert kind == "classifier"
        return kind

    def table(self, kind: str, name: str) -> pd.DataFrame:
        tables = {("features", "latents.csv"): {"kind": self.kinds}, ("compare", "edits.csv"): self.edits}
        return pd.DataFrame(tables[kind, name])


def a_study(*runs: OneRun, testbed: str = "scenes") -> Any:
    context = SimpleNamespace(cut=lambda classifier: SimpleNamespace(model=NETWORK), size=8)
    test = SimpleNamespace(labels=torch.zeros(4))
    return SimpleNamespace(testbed=TESTBEDS[testbed], classes=CLASSES, runs=runs, context=context, test=test)


def the_sites(*names: str) -> dict[str, Site]:
    """The first of these sites is by-passed."""
    return {
        name: Site(name, (Reader(f"{name}.weight"),), 4, positions=(2, 2), bypassed=name == names[0]) for name in names
    }


def test_a_row_says_where_the_site_is_and_what_its_latents_are() -> None:
    known = the_sites("a", "b", "c") | {"d": Site("d", (Reader("d.weight"),), 8, aliases=("last",))}
    runs = [OneRun("b", "margin", church(0.1)), OneRun("last", "effect", church(0.0), alpha_flip_median=None)]
    table = runs_of(a_study(*runs), known)
    inner, last = table[table["method"] == "gate"].to_dict("records")
    assert (inner["site"], inner["depth"], inner["channels"], inner["positions"]) == ("b", pytest.approx(1 / 3), 4, 4)
    assert (last["site"], last["depth"], last["channels"], last["positions"]) == ("d", 1.0, 8, 1)
    assert (inner["select"], last["select"]) == ("margin", "effect")
    # Two of the four latents that are not dead.
    assert inner["defining"] == 0.5
    assert (inner["alpha_flip"], last["alpha_flip"]) == (3.0, math.inf)
    # No latent was chosen for tench.
    assert (inner["alpha"], inner["reached"], inner["drift"]) == (3.0, 0.5, 0.1)
    assert inner["selectivity"] == pytest.approx((0.75 - 0.1) / 2)
    rival = table[(table["method"] == "rank_one") & (table["site"] == "b")].to_dict("records")
    assert [(one["reached"], one["selectivity"]) for one in rival] == [(1.0, 0.75)]


def test_a_dictionary_without_a_live_latent_binds_no_class() -> None:
    run = OneRun("a", "margin", FLAT)
    run.kinds = ["dead"]
    row, _ = runs_of(a_study(run), the_sites("a")).to_dict("records")
    assert (row["defining"], row["depth"], row["reached"]) == (0.0, 0.0, 0.0)


def test_a_class_that_is_at_the_level_without_an_edit_does_not_count() -> None:
    run = OneRun("a", "margin", church(0.1))
    run.edits[2] |= {"reached": False, "selectivity": math.nan, "select_selectivity": math.nan}
    _, rival = runs_of(a_study(run), the_sites("a")).to_dict("records")
    assert (rival["reached"], rival["selectivity"]) == (1.0, 0.75)


def test_what_select_prefers_is_reported_on_test() -> None:
    # By margin the edit looks clean on select and is not on test.
    runs = [
        OneRun("a", "margin", church(0.6, on_select=0.0)),
        OneRun("a", "effect", church(0.0, on_select=0.4)),
        OneRun("b", "margin", FLAT),
        OneRun("b", "effect", church(0.0)),
    ]
    best = chosen(table_of(runs_of(a_study(*runs), the_sites("a", "b"))))
    assert best[["site", "select"]].to_numpy().tolist() == [["a", "margin"], ["b", "effect"]]
    assert best["selectivity"].tolist() == pytest.approx([(0.75 - 0.6) / 2, 0.375])


def test_seeds_are_averaged_and_the_median_strength_may_be_infinite() -> None:
    runs = [OneRun("a", "margin", church(0.0), fve=fve) for fve in (0.6, 0.7, 0.8)]
    runs[1].metrics["alpha_flip_median"] = runs[2].metrics["alpha_flip_median"] = None
    row, _ = table_of(runs_of(a_study(*runs), the_sites("a"))).to_dict("records")
    # Student's 97.5 % quantile for two degrees of freedom, from tables.
    assert (row["seeds"], row["fve"], row["fve_half"]) == (
        3,
        pytest.approx(0.7),
        pytest.approx(4.302653 * 0.1 / 3**0.5),
    )
    assert row["alpha_flip"] == math.inf


def a_sweep(first: Any, last: Any, first_by_effect: Any) -> list[OneRun]:
    """Runs at the two sites of ``NETWORK``: what its second convolution reads, and what its head reads."""
    inner, head = sites(NETWORK, 8)
    by_effect = [OneRun(inner, "effect", first_by_effect), OneRun(head, "effect", last)]
    return [OneRun(inner, "margin", first), OneRun(head, "margin", last), *by_effect]


def test_claims_are_measured() -> None:
    found = analyse([a_study(*a_sweep(FLAT, church(0.2), church(0.4)))])
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() == {name for name in load_claims() if name.startswith("layers.")}
    first, last = (0.75 - 0.4) / 2, (0.75 - 0.2) / 2
    assert values["layers.deeper"] == pytest.approx(1)
    assert math.isnan(values["layers.class_bound"])  # the same at both
    assert values["layers.inner"] == pytest.approx(first - last)
    assert values["layers.effect"] == pytest.approx(first)
    assert found.tables["sites"]["depth"].tolist() == [0] * 4 + [1] * 4
    assert "A rank-one edit of the same readers is the more selective at 2 of the 2 sites" in found.paragraph
    assert "No more than 5 points below that are 1 of 2 sites: " in found.paragraph
    assert "no strength takes half" not in found.paragraph  # church is one of two classes


def test_a_site_where_no_strength_takes_the_classes_is_named() -> None:
    found = analyse([a_study(*a_sweep(FLAT, church(0.2), FLAT))])
    first = next(iter(sites(NETWORK, 8)))
    expected = f"lowest at {first} (0.0). At {first} no strength takes half of the classes there; 0 of these 1 are"
    assert expected in found.paragraph


def test_the_last_site_alone_says_nothing_of_inner_ones() -> None:
    last = list(sites(NETWORK, 8))[-1]
    found = analyse([a_study(OneRun(last, "margin", church(0.0)))])
    assert [one.claim for one in found.measured] == ["layers.deeper", "layers.class_bound"]
    assert all(math.isnan(one.value) for one in found.measured)


def test_the_figure_has_a_line_for_each_testbed_and_selection() -> None:
    known = the_sites("a", "b", "c")
    studies = [
        a_study(*(OneRun(site, select, church(cost)) for site in known for select in SELECTIONS), testbed=testbed)
        for testbed, cost in (("resnet18", 0.0), ("vit", 0.4))
    ]
    table = pd.concat([table_of(runs_of(study, known)) for study in studies])
    axes: Any = depth_figure(table, {"resnet18": "ResNet", "vit": "ViT"}).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[0, 0.5, 1]] * 6
    assert [line.get_ydata()[0] for line in lines] == pytest.approx([37.5, 37.5, 75, 17.5, 17.5, 75])
    assert len({line.get_color() for line in lines}) == 2
    dots = axes.collections[-1].get_facecolors() if len(axes.collections[-1].get_facecolors()) else None
    assert dots is not None
    assert [one[3] for one in dots] == [0, 1, 1]  # empty where the site is by-passed


def test_the_recipe_says_what_the_text_says() -> None:
    recipe = yaml.safe_load((conf_dir() / "experiment" / f"{EXPERIMENT.config}.yaml").read_text(encoding="utf-8"))
    assert recipe["sweep"]["sites"] == 8
    swept = recipe["hydra"]["sweeper"]["params"]
    assert swept["layer"] == "all"
    assert set(swept["discover.select"].split(",")) == set(SELECTIONS)
    assert EXPERIMENT.module == "experiments.beyond.layers"
