"""What the paper's experiments share: claims, testbeds, places, and the folder that is whole or not there."""

import argparse
import json
import math
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure

from experiments import experiment as experiments_module
from experiments import reproduce as reproduce_module
from experiments import runs as runs_module
from experiments.catalogue import EXPERIMENTS
from experiments.claims import FILE, Claim, Measured, judged, load_claims, together
from experiments.experiment import FINDINGS, Experiment, Findings, Picture, carry_out, main, paper_folder, said
from experiments.page import NotRun, claims_markdown, claims_table, write_page
from experiments.runs import PUBLISHED, SAERun, command, make, separation
from experiments.salve2025.baselines import VERDICTS
from experiments.testbeds import TESTBEDS, Setup, add_setup, quoted, setup_of
from salve.artifacts import _seal, read_record, read_table, write_record
from salve.editing.verdict import LIMITS
from salve.integrity import sealed
from salve.run.explain import conf_dir
from salve.types import UserError

# -- claims

HIGH = Claim("suppression.high", "It is high.", "a share", partly=0.5, at_least=0.9)
LOW = Claim("suppression.low", "It is low.", "a share", partly=0.3, at_most=0.1)
SHARP = Claim("suppression.sharp", "It is low, or not.", "a share", partly=0.1, at_most=0.1)


@pytest.mark.parametrize(
    ("claim", "value", "verdict"),
    [
        (HIGH, 1.0, "holds"),
        (HIGH, 0.9, "holds"),
        (HIGH, 0.8999, "holds partly"),
        (HIGH, 0.5, "holds partly"),
        (HIGH, 0.4999, "does not hold"),
        (LOW, -1.0, "holds"),
        (LOW, 0.1, "holds"),
        (LOW, 0.1001, "holds partly"),
        (LOW, 0.3, "holds partly"),
        (LOW, 0.3001, "does not hold"),
        (SHARP, 0.1, "holds"),
        (SHARP, 0.1001, "does not hold"),
        (HIGH, math.inf, "holds"),
        (LOW, math.inf, "does not hold"),
        (HIGH, math.nan, "not measured"),
        (LOW, math.nan, "not measured"),
    ],
)
def test_a_verdict_at_the_limits(claim: Claim, value: float, verdict: str) -> None:
    assert claim.verdict(value) == verdict


@pytest.mark.parametrize(
    "fields",
    [
        {"partly": 0.5},
        {"partly": 0.5, "at_least": 0.9, "at_most": 0.1},
        {"partly": 0.95, "at_least": 0.9},
        {"partly": 0.05, "at_most": 0.1},
    ],
    ids=["no limit", "two limits", "partly above at_least", "partly below at_most"],
)
def test_a_claim_that_contradicts_itself_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"experiment\.name"):
        Claim("experiment.name", "claim", "measure", **fields)


def test_verdicts_of_several_testbeds_together() -> None:
    assert together([]) == "not measured"
    assert together(["not measured", "not measured"]) == "not measured"
    assert together(["holds", "not measured", "holds"]) == "holds"
    assert together(["does not hold", "does not hold"]) == "does not hold"
    assert together(["holds", "does not hold"]) == "holds partly"
    assert together(["holds partly", "does not hold"]) == "holds partly"


def test_the_claims_load_and_each_has_its_experiment() -> None:
    claims = load_claims()
    assert claims
    assert {claim.experiment for claim in claims.values()} <= EXPERIMENTS.keys()
    for name, claim in claims.items():
        assert name == claim.id
        assert claim.claim.endswith(".")
        assert claim.measure.strip()
    # YAML keeps the last of two entries with one name, silently.
    tree = yaml.compose(FILE.read_text(encoding="utf-8"))
    for node in (tree, *(value for _, value in tree.value)):
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys))


def test_judged_keeps_the_order_of_claims_and_those_not_measured() -> None:
    claims = {claim.id: claim for claim in (HIGH, LOW)}
    rows = judged(
        claims, [Measured("suppression.low", "vit", 0.2, "a"), Measured("suppression.low", "resnet18", 0, "b")]
    )
    assert [(row.claim.id, row.verdict) for row in rows] == [(HIGH.id, "not measured"), (LOW.id, "holds partly")]
    assert rows[1].verdict_on("vit") == "holds partly"
    assert rows[1].verdict_on("resnet18") == "holds"
    with pytest.raises(KeyError, match=r"suppression\.none"):
        judged(claims, [Measured("suppression.none", "vit", 0.2, "a")])
    with pytest.raises(ValueError, match="measured twice on vit"):
        judged(claims, [Measured("suppression.low", "vit", 0.2, "a"), Measured("suppression.low", "vit", 0.3, "a")])


# -- texts


def test_a_text_writes_numbers_as_the_reports_do(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "{title}, {saes} SAEs: {a:.1%}, {a:.0p}, {b:+.1p}, {c:.2n}, {c:.2f}, {rows[x]:.1p}, {none:.1p}; {level}"
    monkeypatch.setattr(experiments_module, "_texts", lambda: {"one": {"found": text}})
    study: Any = SimpleNamespace(
        **{"testbed": TESTBEDS["scenes"], "runs": [0, 1], "classes": ["a"], "test": SimpleNamespace(labels=[0])}
    )
    fields = {"a": 0.4567, "b": -0.0123, "c": math.inf, "rows": pd.Series({"x": 0.5}), "none": math.nan}
    assert said("one.found", study, **fields) == (
        "small ResNet, drawn scenes, 2 SAEs: 45.7\u00a0%, 46, −1.2, ∞, inf, 50.0, –; 5 %"
    )


def test_every_text_is_used() -> None:
    folder = Path(experiments_module.__file__).parent
    code = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    texts = yaml.safe_load(experiments_module.TEXTS.read_text(encoding="utf-8"))
    claims = {f"{experiment}.{name}" for experiment, each in texts.pop("measured").items() for name in each}
    assert claims <= load_claims().keys()
    names = {f"{experiment}.{name}" for experiment, each in texts.items() for name in each}
    verdicts = {f"baselines.{name}" for name in VERDICTS}
    assert verdicts <= names
    assert [name for name in names - verdicts if f'"{name}"' not in code and f"'{name}'" not in code] == []


# -- testbeds and places


def test_every_testbed_and_experiment_has_its_recipe_and_a_quick_way() -> None:
    for name, testbed in TESTBEDS.items():
        assert name == testbed.name
        assert testbed.quick
        assert not testbed.config or (conf_dir() / "experiment" / f"{testbed.config}.yaml").is_file()
        assert bool(testbed.data) == bool(testbed.weights)
    for name, experiment in EXPERIMENTS.items():
        assert name == experiment.name
        assert {*experiment.testbeds, *experiment.beside} <= TESTBEDS.keys()
        assert experiment.quick
        assert (conf_dir() / "experiment" / f"{experiment.config}.yaml").is_file()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder or file in the environment."""
    for testbed in TESTBEDS.values():
        for name in (testbed.data, testbed.weights):
            monkeypatch.delenv(f"SALVE_{name.upper()}", raising=False)


def setup(*arguments: str) -> Setup:
    parser = argparse.ArgumentParser()
    add_setup(parser)
    return setup_of(parser.parse_intermixed_args(arguments))


@pytest.mark.usefixtures("bare")
def test_a_setup_is_what_options_say_and_else_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup() == Setup(Path("outputs"), {}, {})
    monkeypatch.setenv("SALVE_IMAGENETTE", "/env/imagenette")
    monkeypatch.setenv("SALVE_CIFAR100", "/env/cifar")
    monkeypatch.setenv("SALVE_RESNET18", "/env/resnet18.pt")
    monkeypatch.setenv("SALVE_VIT_B_16", "")
    monkeypatch.setenv("HOME", "/home/me")
    found = setup(
        "--imagenette", "here", "--weights", "vit=a=b.pt", "--weights", "cifar100=~/c.pt", "--quick", "x=1", "y=2"
    )
    assert found.folders == {"imagenette": "here", "cifar100": "/env/cifar"}
    # $SALVE_CIFAR100 is the folder of images, never a file of weights.
    assert found.weights == {"resnet18": "/env/resnet18.pt", "vit": "a=b.pt", "cifar100": "/home/me/c.pt"}
    assert found.settings == ("x=1", "y=2")
    assert found.quick
    assert not found.download


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--weights", "resnet19=f"], "resnet18, vit, vit_b_16, cifar100"),
        (["--weights", "resnet18"], "NAME=FILE"),
        (["trainer"], "trainer is no setting"),
    ],
)
def test_a_wrong_setup_is_answered_with_what_would_be_right(arguments: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        setup(*arguments)


def test_what_a_setup_lacks(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.touch()
    images, nowhere = {"imagenette": str(tmp_path)}, {"imagenette": str(tmp_path / "no")}
    testbed, scenes = TESTBEDS["resnet18"], TESTBEDS["scenes"]
    assert "give --imagenette FOLDER, or --download" in Setup(tmp_path, {}, {}).lacks(testbed)
    assert f"there is no folder {tmp_path / 'no'}" in Setup(tmp_path, nowhere, {}).lacks(testbed)
    assert "give --weights resnet18=FILE" in Setup(tmp_path, images, {"vit": str(file)}).lacks(testbed)
    assert "there is no file nothing.pt" in Setup(tmp_path, images, {"resnet18": "nothing.pt"}).lacks(testbed)
    assert Setup(tmp_path, images, {"resnet18": str(file)}).lacks(testbed) == ""
    # A download makes up for what is missing, but not for a file that was named.
    assert Setup(tmp_path, nowhere, {}, download=True).lacks(testbed) == ""
    assert "there is no file nothing.pt" in Setup(tmp_path, {}, {"resnet18": "nothing.pt"}, download=True).lacks(
        testbed
    )
    assert Setup(tmp_path, {}, {}).lacks(scenes) == ""


@pytest.mark.parametrize(
    "text",
    ["plain/pa-th_1.pt", "with space", "a, b (1) [2] {3}", "it's", "back\\slash'", "null", "a=b", "naïve: x", "#1"],
)
def test_any_path_arrives_through_hydra(text: str) -> None:
    parsed = OverridesParser.create().parse_override(f"data.root={quoted(text)}")
    assert not parsed.is_sweep_override()
    assert parsed.value() == text or (text == "null" and parsed.value() is None)


def test_the_command_of_runs(tmp_path: Path) -> None:
    here = Setup(Path("out dir"), {"cifar100": "c"}, {"cifar100": "w.pt"}, download=True, quick=True, settings=("a=1",))
    assert command("salve2025/x", TESTBEDS["cifar100"], here, ("sae.seed=0",)) == [
        "-m",
        "experiment=[cifar100/resnet18,salve2025/x]",
        "sweep.name=salve2025-x-cifar100-quick",
        "output_dir='out dir'",
        *TESTBEDS["cifar100"].quick,
        "data.root=c",
        "backbone.weights=w.pt",
        "data.download=true",
        "sae.seed=0",
        "a=1",  # the last word is the user's
    ]
    slow = replace(here, quick=False, download=False, output_dir=tmp_path)
    assert command("salve2025/x", TESTBEDS["scenes"], slow, ()) == [
        "-m",
        "experiment=[salve2025/x]",
        "sweep.name=salve2025-x-scenes",
        f"output_dir={tmp_path}",
        "a=1",
    ]


def test_quick_settings_and_those_of_each_sweep(tmp_path: Path) -> None:
    one = replace(ONE, sweeps=(("sae=topk",), ("sae=gated",)), quick_sweeps=(("sae=topk", "sae.k=2"),))
    here = Setup(tmp_path, {}, {})
    assert one.sweeps_for(here, TESTBEDS["scenes"]) == [("sae=topk",), ("sae=gated",)]
    assert one.sweeps_for(replace(here, quick=True), TESTBEDS["scenes"]) == [("sae.epochs=1", "sae=topk", "sae.k=2")]
    assert ONE.sweeps_for(here, TESTBEDS["scenes"]) == [()]


def test_every_sweep_is_made_and_one_that_fails_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        called.append(arguments)
        return 1 if "a=3" in arguments else 0

    monkeypatch.setattr(runs_module, "run_child", run)
    here = Setup(tmp_path, {}, {})
    plan = tmp_path / "sweeps" / "beyond-x-scenes" / "sweep.json"
    plan.parent.mkdir(parents=True)
    plan.touch()
    typed = make("beyond/x", TESTBEDS["scenes"], here, [("a=1",), ("a=2",)])
    assert [arguments[-1] for arguments in called] == ["a=1", "a=2"]
    assert [one.split()[-1] for one in typed] == ["a=1", "a=2"]
    assert not plan.exists()  # what an earlier plan asked for is not waited for
    with pytest.raises(UserError, match=r"ended with status 1 .* a=3$"):
        make("beyond/x", TESTBEDS["scenes"], here, [("a=3",), ("a=4",)])
    assert called[-1][-1] == "a=3"


# -- an experiment


def test_testbeds_beside_are_for_comparison_only(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.touch()
    one = Experiment("x", "X", analysed, testbeds=("cifar100",), beside=("resnet18", "scenes"))
    poor = Setup(tmp_path, {}, {})
    rich = Setup(tmp_path, {"cifar100": str(tmp_path)}, {"cifar100": str(file)})

    def names(on: list[str] | None, at: Setup) -> list[list[str]]:
        return [[testbed.name for testbed in part] for part in one.testbeds_here(on, at)]

    assert names(None, poor) == [[], ["cifar100", "resnet18"]]
    assert names(None, rich) == [["cifar100", "scenes"], ["resnet18"]]
    assert names(["scenes", "resnet18", "scenes"], poor) == [["scenes"], ["resnet18"]]


def analysed(studies: Any) -> Findings:
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1])
    testbed = studies[0].testbed.name
    return Findings(
        "One <b>paragraph</b>.\n\nAnother.",
        {"picture": Picture(figure, "A & B")},
        {"numbers": pd.DataFrame({"x": [1, 2]})},
        [Measured("suppression.separates", testbed, 0.95, "9 | 10 <i>\nof them")],
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that are not made but noted; what would be read from them is little."""
    notes: list[str] = []

    def make(config: str, testbed: Any, at: Setup, sweeps: Any) -> list[str]:
        notes.append(testbed.name)
        return [f"salve -m <{testbed.name}>"]

    @contextmanager
    def opened(config: str, testbed: Any, at: Setup) -> Iterator[Any]:
        data = SimpleNamespace(labels=lambda split: torch.zeros(3 if split == "train" else 2))
        yield SimpleNamespace(testbed=testbed, context=SimpleNamespace(data=data), classes=["a"], runs=[0, 1])

    monkeypatch.setattr(experiments_module, "make", make)
    monkeypatch.setattr(experiments_module, "opened", opened)
    return notes


ONE = Experiment("suppression", "One", analysed, ("sae.epochs=1",), ("scenes",))


def test_findings_are_written_once(tmp_path: Path, made: list[str]) -> None:
    here = Setup(tmp_path, {}, {})
    testbeds = [TESTBEDS["scenes"]]
    assert carry_out(ONE, testbeds, here)
    folder = paper_folder(here) / "suppression"
    assert {path.name for path in folder.iterdir()} == {
        *(f"picture.{kind}" for kind in ("pdf", "svg", "png")),
        *("numbers.csv", FINDINGS),
    }
    record = read_record(folder / FINDINGS)
    assert record["testbeds"][0]["images"] == {"train": 3, "select": 2, "test": 2}
    assert record["commands"] == ["salve -m <scenes>"]
    assert record["measured"][0]["value"] == 0.95
    assert read_table(folder / "numbers.csv")["x"].tolist() == [1, 2]
    assert not carry_out(ONE, testbeds, here)
    assert made == ["scenes"]
    # Other settings are other findings.
    assert carry_out(ONE, testbeds, replace(here, settings=("sae.epochs=2",)))
    assert carry_out(replace(ONE, quick=("sae.epochs=3",)), testbeds, replace(here, quick=True))
    assert (tmp_path / "paper-quick" / "suppression" / FINDINGS).is_file()
    assert len(made) == 3


def test_what_fails_leaves_nothing_half_written(tmp_path: Path, made: list[str]) -> None:
    here, testbeds = Setup(tmp_path, {}, {}), [TESTBEDS["scenes"]]

    def failing(studies: Any) -> Findings:
        raise RuntimeError("analysis")

    def unknown(studies: Any) -> Findings:
        return replace(analysed(studies), measured=[Measured("suppression.nothing", "scenes", 0, "")])

    def unwritable(studies: Any) -> Findings:
        return replace(analysed(studies), tables={"no/such/folder": pd.DataFrame()})

    for analyse, error in ((failing, RuntimeError), (unknown, KeyError), (unwritable, OSError)):
        with pytest.raises(error):
            carry_out(replace(ONE, analyse=analyse), testbeds, here)
        assert not list(tmp_path.rglob("*suppression*"))
    assert carry_out(ONE, testbeds, here)
    before = read_record(paper_folder(here) / "suppression" / FINDINGS)
    with pytest.raises(RuntimeError):
        carry_out(replace(ONE, analyse=failing), testbeds, replace(here, settings=("a=1",)))
    assert read_record(paper_folder(here) / "suppression" / FINDINGS) == before  # what was there stays


@pytest.mark.usefixtures("bare")
def test_the_entry_point_of_an_experiment(tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output-dir", str(tmp_path)]
    assert main(ONE, [*out, "sae.epochs=2"]) == 0
    assert capsys.readouterr().out == f"One: {tmp_path}/paper/suppression\n"
    assert main(ONE, [*out, "sae.epochs=2"]) == 0
    assert capsys.readouterr().out.endswith("(was there)\n")
    assert main(ONE, [*out, "--on", "resnet18"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "suppression: suppression cannot be run on ResNet-18, Imagenette: imagenette's images are not"
    )
    assert said.count("\n") == 1
    with pytest.raises(SystemExit) as left:
        main(ONE, ["--on", "nothing"])
    assert left.value.code == 2
    assert "'scenes'" in capsys.readouterr().err
    # Beside it only what can be run is run.
    assert main(replace(ONE, beside=("resnet18", "scenes")), [*out]) == 0
    assert made == ["scenes", "scenes"]


# -- the page


TWO = {"classes": 2, "seeds": 1}


def findings(folder: Path, name: str, **changes: Any) -> None:
    """A folder of findings, as an experiment writes it."""
    record = {
        "title": f"Title of {name} & more", "digest": "", "quick": False, "seconds": 60.0, "commands": ["salve <1>"],
        "testbeds": [{"name": "scenes", "title": "scenes", "images": {"train": 1, "select": 2, "test": 3}} | TWO],
        "machine": {"device": "a <machine>", "cores": 2, "torch": "2"}, "paragraph": "First <b>.\n\nSecond.",
        "pictures": [{"name": "p", "caption": '"quoted" & <i>', "size": [10, 10]}], "tables": ["t"],
        "measured": [{"claim": "suppression.separates", "testbed": "scenes", "value": 0.6,
                      "text": "6 | 10\nof <them>"}],
    } | changes  # fmt: skip
    (folder / name).mkdir(parents=True)
    (folder / name / FINDINGS).write_text(json.dumps(record), encoding="utf-8")


def test_a_page_of_some_experiments_escapes_what_it_shows(tmp_path: Path) -> None:
    findings(tmp_path, "suppression")
    other = Experiment("atlas", "Atlas", analysed, testbeds=("scenes",))
    missing = [NotRun("Atlas", "ViT", "no <weights>")]
    page = write_page(tmp_path, [other, ONE], missing).read_text(encoding="utf-8")
    assert "Title of suppression &amp; more" in page
    assert "<p>First &lt;b&gt;.</p>\n<p>Second.</p>" in page
    assert "a &lt;machine&gt;" in page
    assert 'alt="&#34;quoted&#34; &amp; &lt;i&gt;"' in page
    assert "no &lt;weights&gt;" in page
    assert 'id="atlas"' not in page
    assert 'class="holds-partly"' in page  # 0.6 of 0.9
    assert "scenes: 1 train, 2 select, 3 test images, 2 classes" in page
    assert PUBLISHED not in page  # nothing was found in that sense
    table = read_table(tmp_path / "claims.csv")
    assert table["id"].tolist() == ["suppression.separates"]
    assert table["verdict"].tolist() == ["holds partly"]
    lines = (tmp_path / "claims.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + len(load_claims())  # also those that were not measured
    (line,) = (line for line in lines if "6 \\| 10" in line)
    assert "| 6 \\| 10 of \\<them> | **◐ partly** | `suppression` |" in line
    assert lines[-1].count(" | ") == lines[0].count(" | ") == 3
    assert "– not measured" in lines[-1]


def test_the_published_sense_is_a_column_that_decides_nothing(tmp_path: Path) -> None:
    measured = [
        {"claim": "suppression.separates", "testbed": testbed, "value": 0.6, "text": "6", "published": text}
        for testbed, text in (("scenes", "9 <of> 10"), ("vit", "8 of 10"))
    ]
    measured.append({"claim": "suppression.church", "testbed": "vit", "value": 0.0, "text": "0 %"})
    one = {"images": {"train": 1}, "classes": 2, "seeds": 1}
    findings(
        tmp_path, "suppression", measured=measured, testbeds=[{"name": n, "title": n, **one} for n in ("scenes", "vit")]
    )
    page = write_page(tmp_path, [ONE], []).read_text(encoding="utf-8")
    assert page.count(f"<th>{PUBLISHED}</th>") == 1
    both = "small ResNet, drawn scenes: 9 &lt;of&gt; 10; ViT-S/14, Imagenette: 8 of 10"
    assert f'<td class="dim">{both}</td>' in page
    assert "gains make up for losses" in page
    table = read_table(tmp_path / "claims.csv").set_index(["id", "testbed"])
    assert table.loc[("suppression.separates", "vit"), "in_the_published_sense"] == "8 of 10"
    assert set(table.loc["suppression.separates", "verdict"]) == {"holds partly"}  # 0.6, not 0.9
    lines = (tmp_path / "claims.md").read_text(encoding="utf-8").splitlines()
    heads = lines[0].strip("| ").split(" | ")
    cells = {line.strip("| ").split(" | ")[0]: line.strip("| ").split(" | ") for line in lines[2:]}
    claims = load_claims()
    at = heads.index(PUBLISHED)
    assert cells[claims["suppression.separates"].claim][at].endswith("ViT-S/14, Imagenette: 8 of 10")
    assert cells[claims["suppression.church"].claim][at] == "–"
    assert {len(row) for row in cells.values()} == {len(heads)}


def test_the_words_of_the_claims_are_the_limits_of_the_verdict() -> None:
    """They stand in YAML, where they cannot be taken from where the limits are."""
    level, mean, loss = (f"{100 * limit:g}" for limit in asdict(LIMITS).values())
    sense = load_claims()["suppression.separates"].measure
    assert f"at {level} % or less" in sense
    assert f"below {mean} points" in sense
    assert f"no other class loses more than {loss})" in sense
    assert load_claims()["suppression.church"].at_most == LIMITS.accuracy
    for name in ("seeds.separates", "sparsity.plateau", "cifar100.separates"):
        assert "separate, as in suppression" in load_claims()[name].measure
    words = f"less than {mean} points in the mean of absolute values, and no other class loses more than {loss}"
    assert words in said("separating.strictly")


@pytest.mark.parametrize(
    "recipe",
    [
        *("salve2025/suppression", "salve2025/seeds", "salve2025/sparsity", "salve2025/cifar100"),
        *("beyond/sae_variants", "beyond/composition", "beyond/robustness"),
    ],
)
def test_whoever_reads_every_classs_curve_has_it_written(recipe: str) -> None:
    read = yaml.safe_load((conf_dir() / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    assert read["edit"]["by_class"] is True


# -- what is read of a run


def a_run(tmp_path: Path, classes: list[str]) -> SAERun:
    """A finished run that left what lies in a folder as its artifact ``control``."""
    artifacts = tmp_path / "artifacts"
    (artifacts / "classifier" / "c").mkdir(parents=True)
    write_record(artifacts / "classifier" / "c" / "classifier.json", {"classes": classes})
    shutil.copytree(tmp_path, artifacts / "control" / "d", ignore=shutil.ignore_patterns("artifacts", "run"))
    for folder in artifacts.glob("*/*"):
        _seal(folder, {})
    run = tmp_path / "run"
    run.mkdir()
    settings = {"data": {"_target_": "salve.data.ConceptsData"}, "sae": {"seed": 0}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    write_record(run / "metrics.json", {})
    made = {
        kind: {"key": key, "path": f"../artifacts/{kind}/{key}"}
        for kind, key in (("classifier", "c"), ("control", "d"))
    }
    write_record(run / "manifest.json", sealed({"artifacts": made, "files": {}}))
    return SAERun(run)


def test_curves_are_read_by_split(tmp_path: Path) -> None:
    rows = [
        {"split": split, "mode": mode, "target": "b", "alpha": alpha, "class": name, "accuracy": accuracy}
        for split, first in (("select", 0.0), ("test", 10.0))
        for mode, second in (("suppress", 0.0), ("enhance", 5.0))
        for alpha in (2.0, 0.0)  # in no order
        for name, accuracy in (("b", first + second + alpha), ("a", first + 1), ("c", math.nan))
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "curves.parquet", index=False)
    run = a_run(tmp_path, ["a", "b", "c"])
    alphas, accuracy = run.curves("test", "enhance", "b")
    assert alphas.tolist() == [0, 2]
    assert accuracy[:, :2].tolist() == [[11, 15], [11, 17]]
    assert np.isnan(accuracy[:, 2]).all()
    assert run.curves("select", "suppress", "b")[1][:, 1].tolist() == [0, 2]


def test_a_run_without_every_classs_curve_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make its run again with edit\.by_class=true"):
        a_run(tmp_path, ["a"]).curves("test", "suppress", "a")


def test_a_class_without_a_latent_does_not_separate(tmp_path: Path) -> None:
    kept = {
        "target": ["b", "c"],
        "alpha_used": [2.0, 5.0],
        "separates": [True, False],
        "separates_published": [True, True],
    }
    pd.DataFrame(kept).to_csv(tmp_path / "summary.csv", index=False)
    (tmp_path / "verdict.json").write_text('{"separates": 1, "separates_low": 0, "separates_high": 2}')
    run = a_run(tmp_path, ["a", "b", "c"])
    assert run.verdicts["separates"].tolist() == [False, True, False]
    assert run.verdicts["separates_published"].tolist() == [False, True, True]
    assert math.isnan(run.verdicts.loc["a", "alpha_used"])
    assert separation([run], 3) == (
        1 / 3,
        "1.0 of 3 classes (1 to 1 over 1 SAE; 95 % over test images: 0.0 to 2.0)",
        "2.0 of 3 classes",
        "1 to 1 over 1 SAE; 95 % over test images: 0.0 to 2.0",
    )


def test_a_page_of_nothing(tmp_path: Path) -> None:
    page = write_page(tmp_path, [ONE], [NotRun("One", "ViT", "no weights")]).read_text(encoding="utf-8")
    assert "no machine yet" in page
    assert page.count("– not measured") == len(load_claims())
    assert "One, on ViT: no weights." in page
    assert claims_table([], {}).empty
    assert claims_markdown([], []).count("\n") == 2


def test_old_findings_do_not_break_the_page(tmp_path: Path) -> None:
    """They may know claims and testbeds that there are no more."""
    old = {"claim": "suppression.forgotten", "testbed": "scenes", "value": 1.0, "text": "old"}
    gone = {"claim": "suppression.separates", "testbed": "gone", "value": 1.0, "text": "gone"}
    testbeds = [{"name": "gone", "title": "Gone", "images": {"train": 1, "val": 1}, "classes": 2, "seeds": 1}]
    findings(tmp_path, "suppression", measured=[old, gone], testbeds=testbeds)
    page = write_page(tmp_path, [ONE], []).read_text(encoding="utf-8")
    assert "Gone: 1 train, 1 val images, 2 classes" in page
    assert page.count("– not measured") == len(load_claims())


# -- all of them


Call = list[str]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Call]:
    """The experiments' processes, which fail where the file ``fails`` is there; what they write is little."""
    found: list[Call] = []

    def run(arguments: Call) -> int:
        found.append(arguments)
        return 1 if (tmp_path / "fails").exists() else 0

    monkeypatch.setattr(reproduce_module, "run_child", run)
    monkeypatch.setattr("experiments.catalogue.EXPERIMENTS", {"suppression": replace(ONE, testbeds=("scenes", "vit"))})
    return found


@pytest.mark.usefixtures("bare", "calls")
def test_reproduce_that_is_told_to_end_writes_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce_module, "run_child", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        reproduce_module.main(["--output-dir", str(tmp_path)])
    assert left.value.code == 143
    assert capsys.readouterr().err == "reproduce: stopped; the same command goes on with what is not done.\n"
    assert not list(tmp_path.rglob("index.html"))


@pytest.mark.usefixtures("bare")
def test_reproduce_runs_what_can_be_run_and_says_what_cannot(
    tmp_path: Path, calls: list[Call], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--output-dir", str(tmp_path)]
    assert reproduce_module.main([*out, "--weights", "vit=f", "sae.epochs=2"]) == 0
    (call,) = calls
    expected = ["--on", "scenes", *out, "--weights", "vit=f", "--", "sae.epochs=2"]
    assert call == [sys.executable, "-m", "experiments.salve2025.suppression", *expected]
    said = capsys.readouterr().out
    assert "not run: One on ViT-S/14, Imagenette: imagenette's images are not here" in said
    assert "imagenette&#39;s images are not here" in (tmp_path / "paper" / "index.html").read_text(encoding="utf-8")
    (tmp_path / "fails").touch()
    assert reproduce_module.main([*out, "--quick", "--only", "suppression", "suppression"]) == 1
    assert calls[1][-2:] == ["--quick", "--"]
    assert len(calls) == 2
    assert "it failed, see its output" in (tmp_path / "paper-quick" / "index.html").read_text(encoding="utf-8")
    assert reproduce_module.main([*out, "--on", "vit"]) == 0  # nothing could be run, and nothing failed
    assert len(calls) == 2


@pytest.mark.usefixtures("bare")
def test_reproduce_hands_its_setup_on_as_it_is(tmp_path: Path, calls: list[Call], made: list[str]) -> None:
    given = ["--output-dir", str(tmp_path), "--imagenette", str(tmp_path), "--cifar100", "c d", "--download", "--quick"]
    weights = ["--weights", f"vit={__file__}", "--weights", "cifar100=x=y"]
    assert reproduce_module.main([*given, *weights, "a=[1,2]", "b='x y'"]) == 0
    handed = calls[0][3:]
    assert setup(*handed[handed.index("--output-dir") :]) == setup(*given, *weights, "a=[1,2]", "b='x y'")
    assert handed[: handed.index("--output-dir")] == ["--on", "scenes", "vit"]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--only", "suppression", "sae.k=2", "--on", "scenes", "sae.k=3", "trainer=cpu"],
        ["sae.k=2", "--only", "suppression", "--on=scenes", "--quick", "sae.k=3", "--", "trainer=cpu"],
    ],
)
def test_settings_may_stand_anywhere_and_stay_in_order(
    arguments: list[str], tmp_path: Path, calls: list[Call], made: list[str]
) -> None:
    assert reproduce_module.main(["--output-dir", str(tmp_path), *arguments]) == 0
    assert [call[3:5] for call in calls] == [["--on", "scenes"]]
    assert calls[0][-4:] == ["--", "sae.k=2", "sae.k=3", "trainer=cpu"]


@pytest.mark.usefixtures("bare", "calls")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--only", "nothing"], "suppression"), (["--on", "nothing"], "scenes"), (["--nothing"], "--nothing")],
)
def test_reproduce_refuses_what_it_does_not_know(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        reproduce_module.main(arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.usefixtures("bare", "calls")
def test_reproduce_refuses_a_wrong_setup_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce_module.main(["--weights", "x=y"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("reproduce: --weights x=y is no NAME=FILE")
    assert said.count("\n") == 1
