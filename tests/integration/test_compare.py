"""Edit methods compared: what the table says is what the edited networks do, and nothing is made twice."""

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from salve.artifacts import Artifact, read_record
from salve.backbones import graph_of
from salve.data import ConceptsData, Preprocess
from salve.editing import apply_edit_file, load_edit_file, undo_edit_file
from salve.editing.gating import gate
from salve.sae import load_sae, make_sae
from salve.stages.targets import balanced
from salve.sweep.compare import command_of, statement
from salve.sweep.compare import main as compare_command
from salve.types import UserError
from tests.integration.commands import Command
from tests.integration.conftest import FEW, NARROW, SMALL, Start
from tests.integration.test_pipeline import images_and_labels, plain_model

METHODS = ("compare.methods=[gate,push,bias,one,mute,drawn]", "compare.variants.push.method=steering",
           "compare.variants.bias.method=head_bias", "compare.variants={one: {method: rank_one}}",
           "compare.variants.drawn={method: gate, sae: {decoder: random}}")  # fmt: skip
COMPARE = ["stages=[compare]", "compare.images=4", *METHODS]


def edits(artifacts: dict[str, Artifact]) -> pd.DataFrame:
    return artifacts["compare"].table("edits.csv").set_index(["method", "class"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where tests share a classifier and an SAE."""
    return f"output_dir={tmp_path_factory.mktemp('compare') / 'store'}"


def accuracies(logits: Tensor, labels: Tensor) -> list[float]:
    right = logits.argmax(dim=1) == labels
    return [float(right[labels == k].double().mean()) for k in range(10)]


def scenes(train: int) -> ConceptsData:
    data = ConceptsData(20, image_size=32, train_per_class=train, select_per_class=4, test_per_class=4)
    data.bind(Preprocess(32, None))
    return data


def lead(model: Any, data: ConceptsData, own: int) -> float:
    """By how much a class leads in the mean over its train images."""
    batches = [(images[labels == own], labels) for images, labels in data.loader("train")]
    with torch.no_grad():
        logits = model(torch.cat([images for images, _ in batches]))
    others = logits.index_fill(1, torch.tensor([own]), -torch.inf).amax(dim=1)
    return max(float((logits[:, own] - others).mean()), 0.1 * float(logits.std()))


def drawn_at_random(artifacts: dict[str, Artifact], rows: pd.DataFrame, images: Tensor, labels: Tensor) -> None:
    """A variant's SAE is trained, all but its decoder, and its edits are the gate's along the drawn columns."""
    own, features = (
        next(path for path in artifacts[kind].path.parent.iterdir() if path.name != artifacts[kind].key)
        for kind in ("sae", "features")
    )
    record, sae = read_record(own / "sae.json"), load_sae(own / "sae.safetensors")
    assert record["decoder"] == "random"
    seeded = torch.Generator().manual_seed(0)
    start = make_sae(record["variant"], sae.width, sae.dictionary_size, seeded)
    torch.testing.assert_close(sae.decoder, start.decoder)
    assert not torch.allclose(sae.encoder, start.encoder)
    selected = pd.read_csv(features / "selected.csv").set_index("class")
    model, classes = plain_model(artifacts), artifacts["classifier"].record("classifier.json")["classes"]
    for name, row in rows.iterrows():
        column = sae.decoder.detach()[:, int(selected.loc[str(name), "latent"])]
        closed = {"fc.weight": model.state_dict()["fc.weight"] * gate(column, row["alpha"])}
        with torch.no_grad():
            found = accuracies(functional_call(model, closed, (images,)), labels)
        assert row["after"] == pytest.approx(found[classes.index(name)])


def test_the_table_says_what_networks_with_a_lower_bias_do(tmp_path: Path, start: Start, store: str) -> None:
    artifacts = start(tmp_path, store, *COMPARE)
    table, model = edits(artifacts), plain_model(artifacts)
    classes = artifacts["classifier"].record("classifier.json")["classes"]
    assert set(table.index.get_level_values("method")) == {"gate", "push", "bias", "one", "mute", "drawn"}
    assert "select_selectivity" not in table
    images, labels = images_and_labels()
    assert len(labels) == len(balanced(labels, 4))  # the sample is all there is
    with torch.no_grad():
        before = accuracies(model(images), labels)
    assert not table.loc["mute", "permanent"].any()
    taken = table[table["reached"]]
    assert len(taken) >= 6
    assert len(taken.loc["bias"])
    for (_, name), row in table.iterrows():
        assert row["before"] == pytest.approx(before[classes.index(name)])
    for name, row in taken.loc["bias"].iterrows():
        own = classes.index(name)
        state = dict(model.state_dict())
        # The only weight that the edit changes is one bias, so that the strength can be read from the accuracies.
        assert (row["tensors"], row["parameters"], row["permanent"]) == (1, 1, True)
        assert (row["images"], row["labels"]) == (8, 8)  # all of the class
        lowered = state["fc.bias"].clone()
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            lowered[own] = state["fc.bias"][own] - middle
            with torch.no_grad():
                gone = (
                    accuracies(functional_call(model, {**state, "fc.bias": lowered}, (images,)), labels)[own]
                    <= row["after"]
                )
            low, high = (low, middle) if gone else (middle, high)
        lowered[own] = state["fc.bias"][own] - high
        with torch.no_grad():
            found = accuracies(functional_call(model, {**state, "fc.bias": lowered}, (images,)), labels)
        assert found[own] == pytest.approx(row["after"])
        assert row["drop"] == pytest.approx(before[own] - found[own])
    used = table.groupby("method")[["images", "labels"]].agg(set)
    # A rank-one edit reads the second moment of all images, and which are of the class; an SAE read all with labels.
    assert used.loc["one"].to_list() == [{80}, {8}]
    assert used.loc["gate"].to_list() == used.loc["push"].to_list() == [{80}, {80}]
    drawn_at_random(artifacts, taken.loc["drawn"], images, labels)
    # Another SAE repeats only what needs one.
    again = start(tmp_path, store, *COMPARE, "sae.seed=1")
    keys, others = (run["compare"].record("methods.json") for run in (artifacts, again))
    assert [name for name in keys if keys[name] == others[name]] == ["bias", "one"]
    same = start(tmp_path, store, "stages=[compare,report]", *COMPARE[1:])
    page = (tmp_path / "run" / "index.html").read_text()
    assert "Edit methods at a matched effect" in page
    assert all(f"<td>{method}" in page for method in ("gate", "push", "bias", "one", "mute", "drawn"))
    assert "compare-edits.csv" in page
    assert same["compare"].reused
    assert same["compare"].digest == artifacts["compare"].digest


def test_at_an_inner_site_the_table_says_what_scaled_weights_do(tmp_path: Path, start: Start) -> None:
    layer = "layer4.0.conv2"
    trained = ("finetune.epochs=12", "data.train_per_class=24", "discover.select=effect")
    methods = "compare.methods=[gate,bias]"
    chosen_too = "compare.on_select=true"
    artifacts = start(tmp_path, *COMPARE, methods, chosen_too, f"layer={layer}", "capture.positions=4", *trained)
    model = plain_model(artifacts)
    classes = artifacts["classifier"].record("classifier.json")["classes"]
    site = graph_of(model, 32).sites[layer]
    images, labels = images_and_labels()
    decoder = load_sae(artifacts["sae"].file("sae.safetensors")).decoder.detach()
    selected = artifacts["features"].table("selected.csv").set_index("class")
    table = edits(artifacts)
    taken = table[table["reached"]]
    assert len(taken.loc["bias"])
    data = ConceptsData(20, image_size=32, train_per_class=8, select_per_class=4, test_per_class=4)
    data.bind(Preprocess(32, None))
    on_select = [torch.cat(parts) for parts in zip(*data.loader("select"), strict=True)]
    with torch.no_grad():
        before, before_on_select = accuracies(model(images), labels), accuracies(model(on_select[0]), on_select[1])
    for method, name in [(method, name) for method, name in taken.index if method in ("gate", "bias")]:
        row, own, state = taken.loc[(method, name)], classes.index(name), dict(model.state_dict())
        if method == "gate":
            closed = gate(decoder[:, int(selected.loc[name, "latent"])], row["alpha"])
            for reader in site.readers:
                state[reader.weight] = reader.scaled(state[reader.weight], closed)
        else:
            state["fc.bias"] = state["fc.bias"].clone()
            state["fc.bias"][own] -= row["alpha"] * lead(model, scenes(24), own)
        with torch.no_grad():
            found = accuracies(functional_call(model, state, (images,)), labels)
        others = [abs(a - b) for k, (a, b) in enumerate(zip(found, before, strict=True)) if k != own]
        assert row["after"] == pytest.approx(found[own])
        assert row["drift"] == pytest.approx(sum(others) / 9)
        with torch.no_grad():
            chosen = accuracies(functional_call(model, state, (on_select[0],)), on_select[1])
        moved = [abs(a - b) for k, (a, b) in enumerate(zip(chosen, before_on_select, strict=True)) if k != own]
        expected = before_on_select[own] - chosen[own] - sum(moved) / 9
        assert row["select_selectivity"] == pytest.approx(expected)


def test_every_setting_of_a_comparison_or_a_method_is_in_its_key(tmp_path: Path, start: Start, store: str) -> None:
    one = (store, "compare.methods=[bias]", "compare.variants.bias={method: head_bias}", "compare.images=4")
    first = start(tmp_path, "stages=[compare]", *one)["compare"]
    keys = [first.key]
    for other in ("compare.images=3", "compare.on_select=true", "compare.targets=[storm]", "compare.relearn=[1]",
                  "compare.methods=[bias,head_row]", "compare.variants.bias.method=head_row"):  # fmt: skip
        keys.append(start(tmp_path, "stages=[compare]", *one, other)["compare"].key)
    for edit in (["edit=default"], ["edit=steering"], ["edit=steering", "edit.args.direction=class_mean"]):
        keys.append(
            start(tmp_path, "stages=[control]", "edit.evaluate=0", *edit, "edit.modes=[suppress]")["control"].key
        )
    assert len(set(keys)) == len(keys) == 10
    # An edit of the head is the same wherever the network is cut, and is not made again for another site.
    elsewhere = (*one, "layer=layer4.0.conv2", "capture.positions=4", "sae.seed=1")
    again = start(tmp_path, "stages=[compare]", *elsewhere)["compare"]
    assert again.record("methods.json") == first.record("methods.json")


def test_the_bound_is_a_network_trained_without_the_class(tmp_path: Path, start: Start, store: str) -> None:
    bias = ("compare.methods=[bias]", "compare.variants.bias={method: head_bias}", "compare.targets=1")
    artifacts = start(tmp_path, store, "stages=[compare]", "compare.images=4", *bias, "compare.retrained=true")
    record = artifacts["classifier"].record("classifier.json")
    table, model, (images, labels) = edits(artifacts), plain_model(artifacts), images_and_labels()
    without = start(tmp_path, store, "stages=[finetune]", f"finetune.without=[{record['classes'][0]}]")
    assert without["classifier"].reused  # the comparison has trained it, with the same settings
    with torch.no_grad():
        logits = [plain_model(one)(images) for one in (artifacts, without)]
    (before, *_), (after, *others) = (accuracies(one, labels) for one in logits)
    bound, edited = table.loc["retrained"].iloc[0], table.loc["bias"].iloc[0]
    assert (bound["before"], bound["after"]) == pytest.approx((before, after))
    assert (bound["images"], bound["labels"], bound["permanent"]) == (72, 72, True)
    assert (bound["gap"], bound["gap_kl"], bound["agreement"]) == pytest.approx((0, 0, 1))
    assert without["classifier"].key in artifacts["compare"].record("uses.json")["classifier"]
    if edited["reached"]:
        lowered = dict(model.state_dict())
        lowered["fc.bias"] = lowered["fc.bias"].clone()
        lowered["fc.bias"][0] -= edited["alpha"] * lead(model, scenes(8), 0)
        with torch.no_grad():
            there = functional_call(model, lowered, (images,))
        left, *kept = accuracies(there, labels)
        assert edited["gap_own"] == pytest.approx(abs(left - after))
        assert edited["gap_others"] == pytest.approx(abs(sum(kept) - sum(others)) / 9)
        assert edited["agreement"] == pytest.approx(float((there.argmax(1) == logits[1].argmax(1)).double().mean()))


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("compare.methods=[]", "compare.methods is empty"),
        ("compare.methods=[gat]", r"compare\.methods=gat is no edit method; did you mean gate\?"),
        ("compare.variants={random_gate: {method: gate, strength: 2}}", "has no setting strength; it has direction"),
        ("compare.variants.random_gate={method: null}", r"compare\.variants\.random_gate=None is no edit method"),
        (
            "compare.variants={random_decoder: {method: head_row}}",
            r"random_decoder\.sae is for methods that use",
        ),
        ("compare.variants.random_latent.sae={decoder: x}", r"random_latent\.sae\.decoder has x"),
        ("compare.variants.random_latent.sae={size: 2}", r"random_latent\.sae has no setting size; it"),
        ("compare.targets=[church]", "compare.targets names church; the classes are harbour, "),
        ("compare.targets=0", "compare.targets=0 must be names of classes, a number of them, or null"),
        ("compare={methods: [gate, retrained], retrained: true}", "names retrained, which is the row of"),
        ("compare.relearn=[10,0]", r"compare\.relearn=\[10, 0\] names 0 steps"),
        ("compare.images=0", "compare.images=0 must be above 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence_before_any_work(tmp_path: Path, start: Start, setting: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        start(tmp_path, "stages=[compare]", setting)
    assert not list((tmp_path / "artifacts").glob("*/*"))


def in_a_fork(folder: Path, command: Sequence[str]) -> int:
    """What ``run_child`` does, without the seconds of a fresh interpreter."""
    assert command[:3] == [sys.executable, "-m", "salve.cli"]
    return Command("salve.cli", list(command[3:]), folder, {}).wait()


def test_the_command_writes_a_page_and_prints_a_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    small = [*SMALL, *FEW, *NARROW, f"output_dir={tmp_path}", "sae.seed=0,1", "compare.images=4", *METHODS]
    monkeypatch.setattr("salve.sweep.compare.run_child", partial(in_a_fork, tmp_path))
    assert compare_command([setting for setting in small if "validate" not in setting]) == 0
    said = capfd.readouterr().out
    folder = tmp_path / "sweeps" / "rivals" / "compare"
    table = pd.read_csv(folder / "tables" / "methods.csv").set_index("method")
    every = pd.read_csv(folder / "tables" / "edits.csv")
    assert list(table.index) == ["gate", "push", "bias", "one", "mute", "drawn"]
    assert len(every) == 2 * 6 * 10
    for method, row in table.iterrows():
        by_seed = every[(every["method"] == method) & every["selectivity"].notna()].groupby("seed")["selectivity"]
        assert row["selectivity"] == pytest.approx(by_seed.mean().mean())
        assert str(method) in said
    assert table.loc["bias", "selectivity_half"] == pytest.approx(0)
    assert (folder / "figures" / "methods.svg").is_file()
    assert "gate" in (folder / "index.html").read_text()
    assert compare_command(["sae.seed=x", f"output_dir={tmp_path}"]) == 2


def test_where_no_class_can_be_judged_the_statement_says_so() -> None:
    rows = {"backbone": "net", "site": ["last", "last", "inner"], "method": ["gate", "bias", "gate"], "seeds": 1}
    measured = {"selectivity": [math.nan, math.nan, 0.5], "ahead": math.nan, "ahead_half": math.nan, "permanent": True}
    said = statement(pd.DataFrame({**rows, **measured}))
    assert said.startswith("At last: nothing to compare, since the network is right on too few images of each class. ")
    assert said.endswith("At inner, over 1 SAE: gate is the most selective (50.0 points).")


def test_settings_of_the_command_become_a_sweep() -> None:
    typed, folder, name = command_of(
        ["experiment=imagenette/resnet18", "output_dir=there", "layer=last,fc"], quick=True
    )
    assert typed[:2] == ["-m", "experiment=[imagenette/resnet18,beyond/rivals]"]
    assert {
        "sweep.name=rivals-quick",
        "sae.seed=0,1",
        "compare.targets=3",
        "data.limit_per_class=100",
        "layer=last,fc",
        "output_dir=there",
    } <= set(typed)
    assert (folder, name) == (Path("there"), "rivals-quick")
    typed, folder, name = command_of(["sweep.name=mine", "sae.seed=3"], quick=True)
    assert (folder, name) == (Path("outputs"), "mine")
    assert typed.count("sae.seed=3") == 1
    assert "sae.seed=0,1" not in typed
    scenes, photos, own = (
        command_of(given, quick=True)[0] for given in ([], ["data=folder"], ["data._target_=my.Data"])
    )
    assert ("compare.retrained=true" in scenes, "data.limit_per_class=100" in scenes) == (True, False)
    assert ("compare.retrained=true" in photos, "data.limit_per_class=100" in photos) == (False, True)
    assert not [setting for setting in own if setting.startswith("data.") and setting != "data._target_=my.Data"]


@pytest.mark.parametrize("method", ["steering", "rank_one", "head_bias"])
def test_any_method_edits_is_saved_and_is_undone(tmp_path: Path, start: Start, store: str, method: str) -> None:
    artifacts = start(tmp_path, store, f"edit={method}", "stages=[control,diagnose]", "edit.evaluate=3")
    assert "diagnose" not in artifacts  # critical strengths are of the gate
    control, model = artifacts["control"], plain_model(artifacts)
    original, (images, labels) = dict(model.state_dict()), images_and_labels()
    summary = control.table("summary.csv")
    assert len(summary) == 10
    for row in summary.itertuples():
        edit_file = load_edit_file(control.file(row.edit_file))
        edited = apply_edit_file(edit_file, original)
        changed = [name for name in original if not torch.equal(edited[name], original[name])]
        assert changed == (["fc.weight"] if method == "rank_one" else ["fc.bias"])
        undone = undo_edit_file(edit_file, edited)
        assert all(torch.equal(undone[name], original[name]) for name in original)
        with torch.no_grad():
            found = accuracies(functional_call(model, edited, (images,)), labels)
        own = artifacts["classifier"].record("classifier.json")["classes"].index(row.target)
        assert found[own] == pytest.approx(row.accuracy_after)
    evaluation = control.table("evaluation.csv")
    assert len(evaluation) == 30
    assert evaluation["accuracy_edited"].tolist() == pytest.approx(evaluation["accuracy_cached"].tolist())


def test_an_edit_that_needs_the_sae_leaves_no_edit_file(tmp_path: Path, start: Start, store: str) -> None:
    artifacts = start(tmp_path, store, "edit=mute", "stages=[control,report]")
    assert artifacts["control"].table("summary.csv")["edit_file"].eq("").all()
    assert not list(artifacts["control"].file("edits").iterdir())
    page = (tmp_path / "run" / "index.html").read_text()
    assert "mute" in page


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["edit.method=steering"], r"edit\.method=steering can only suppress; set edit\.modes=\[suppress\]"),
        (["edit.args={direction: random}"], r"The gate's settings are edit\.scale and edit\.channels"),
        (["edit=steering", "edit.args={to: x}"], "edit.method=steering has no setting to; it has direction"),
        (["edit=steering", "edit.method=steer"], "edit.method=steer is no edit method; did you mean steering?"),
    ],
)
def test_a_wrong_method_is_one_sentence_before_any_work(
    tmp_path: Path, start: Start, settings: list[str], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        start(tmp_path, "stages=[control]", *settings)
    assert not list((tmp_path / "artifacts").glob("*/*"))
