"""Audit and repair: the written weights do what the tables say, and edit files undo them."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from salve.artifacts import Artifact, read_record
from salve.data import ConceptsData, Preprocess
from salve.editing import load_edit_file, undo_edit_files
from salve.editing.cli import main as edit_command
from salve.report.repaired import WEIGHTS, outcome
from salve.types import UserError
from tests.integration.conftest import FEW, NARROW, SMALL, Salve, Start
from tests.integration.test_pipeline import plain_model

SETTINGS = (
    *("data.spurious_correlation=1", "data.defining_rate=0", "data.train_per_class=24", "finetune.epochs=3"),
    *("audit.labels=4", "audit.suspects=2", "audit.top_images=2", "validate.pictures=3"),
    *("repair.methods=[ablation,gate,leace,latent_eraser,dfr]", "repair.sizes=[1,2]", "repair.strengths=[0.5,1]"),
    "repair.rivals=[inlp,mute,reconstruction,pruning,jtt,group_dro,bound]",
    "repair.max_accuracy_loss=0.5",
)


@pytest.fixture(scope="module")
def repaired(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Artifact]]:
    folder = tmp_path_factory.mktemp("repair")
    with pytest.MonkeyPatch.context() as patch:
        # In a network that has hardly learned, nothing does.
        patch.setattr("salve.stages.judging.gains_by_groups", lambda *_: True)
        return folder, start(folder, "stages=[audit,repair,report]", *SETTINGS)


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    """Test images without the tag and with it, and their labels."""
    data = ConceptsData(20, image_size=32, train_per_class=24, select_per_class=4, test_per_class=4, defining_rate=0,
                        spurious_correlation=1)  # fmt: skip
    transform = Preprocess(32, None).eval_transform()
    both = data.pairs("test")
    without, with_tag = (
        torch.stack([transform(side[i][0]) for i in range(40)]) for side in (both.without, both.with_mark)
    )
    return without, with_tag, data.labels("test")


def test_the_tables_say_what_the_written_weights_do(repaired: tuple[Path, dict[str, Artifact]]) -> None:
    folder, artifacts = repaired
    found, model = artifacts["repair"], plain_model(artifacts)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    without, with_tag, labels = pairs()
    groups = found.table("groups.csv").set_index(["class", "value"])
    record, metrics = found.record("repair.json"), read_record(folder / "run" / "metrics.json")
    classes = artifacts["classifier"].record("classifier.json")["classes"]
    state = load_file(found.file("repaired.safetensors"))
    shares = ConceptsData(20, train_per_class=24, image_size=32, defining_rate=0, spurious_correlation=1)
    shown = shares.groups("train").of_image
    for name, weights in (("before", original), ("after", state)):
        model.load_state_dict(weights)
        with torch.no_grad():
            predicted = [model(images).argmax(dim=1) for images in (without, with_tag)]
        accuracies, average = [], 0.0
        for k, of_class in enumerate(classes):
            for v, value in enumerate(("absent", "present")):
                accuracy = float((predicted[v] == labels)[labels == k].double().mean())
                assert groups.loc[(of_class, value), name] == pytest.approx(accuracy)
                accuracies.append(accuracy)
                average += accuracy * float(((shares.labels("train") == k) & (shown == v)).double().mean())
        assert metrics[f"worst_group_{name}"] == pytest.approx(min(accuracies))
        assert metrics[f"average_{name}"] == pytest.approx(average)
        flips = float((predicted[0] != predicted[1]).double().mean())
        assert metrics[f"counterfactual_flips_{name}"] == pytest.approx(flips)
        for measure in ("worst_group", "average", "counterfactual_flips"):
            low, high = (record[f"{measure}_{name}_{end}"] for end in ("low", "high"))
            assert low <= record[f"{measure}_{name}"] <= high
    changed = found.table("changed.csv")
    model.load_state_dict(original)
    with torch.no_grad():
        before = torch.cat([model(images).argmax(dim=1) for images in (without, with_tag)])
    model.load_state_dict(state)
    with torch.no_grad():
        after = torch.cat([model(images).argmax(dim=1) for images in (without, with_tag)])
    assert len(changed) == int((before != after).sum())
    assert changed["file"].isna().all()  # the scenes are no files
    assert (record["left_out"], record["groups_without_images"]) == ([], [])
    images = found.table("images.csv")
    assert images.groupby("split").size().to_dict() == {"select": 40, "test": 40}
    assert images.loc[images["labelled"], "split"].unique().tolist() == ["select"]
    tried = found.table("candidates.csv")
    own = {"ablation", "gate", "leace", "latent_eraser", "dfr"}
    rivals = {"inlp", "mute", "reconstruction", "pruning", "jtt", "group_dro", "bound"}
    neither = {"nothing", "recalibration alone"}
    assert set(tried["method"]) == {*neither, *own, *rivals}
    (chosen,) = tried.loc[tried["chosen"], "method"]
    assert chosen in {*neither, *own}
    assert set(tried.loc[~tried["permanent"], "method"]) == {"mute", "reconstruction"}
    compared = found.table("rivals.csv").set_index("method")
    assert set(compared.index) == own | rivals
    if chosen in own:  # the same edit and biases as in the weights that were written
        for measure in ("worst_group", "average", "counterfactual_flips"):
            assert compared.loc[chosen, measure] == pytest.approx(record[f"{measure}_after"], abs=0.03)


def test_edit_files_undo_the_repair_to_the_same_bits(repaired: tuple[Path, dict[str, Artifact]]) -> None:
    _, artifacts = repaired
    assert undone_files(artifacts["repair"], plain_model(artifacts).state_dict()) >= 1


def undone_files(repair: Artifact, original: dict[str, Tensor]) -> int:
    """How many edit files a repair has, which undo it."""
    files = [load_edit_file(path) for path in sorted((repair.path / "edits").glob("*.json"))]
    undone = undo_edit_files(files, load_file(repair.file("repaired.safetensors")))
    assert all(torch.equal(undone[name], tensor) for name, tensor in original.items())
    return len(files)


def test_suspects_are_ranked_with_and_without_labels(repaired: tuple[Path, dict[str, Artifact]], start: Start) -> None:
    folder, artifacts = repaired
    found = artifacts["audit"].table("suspects.csv")
    classes = artifacts["classifier"].record("classifier.json")["classes"]
    assert len(found) == 2 * 10
    for name, own in found.groupby("class", sort=False):
        assert own["value"].nunique() == 1, name
        assert own["score"].is_monotonic_decreasing
    assert (found["score"] >= 0).all()
    assert found.loc[found["off_object"].notna(), "off_object"].between(0, 1).all()
    page = (folder / "run" / "index.html").read_text()
    assert "Audit: what pushes images towards a class" in page
    assert "biases alone" in page
    explorer = (folder / "run" / "explorer.html").read_text()
    for latent, of_class in found.loc[found["score"] > 0, ["latent", "class"]].itertuples(index=False):
        assert f'{{"latent":{latent},"class":{classes.index(of_class)},' in explorer
    named = ("repair.suspects={clinic: [1, 3]}", "repair.methods=[ablation]", "repair.sizes=[2]")
    unlabelled = start(folder, "stages=[audit,repair]", *SETTINGS, "audit.labels=0", *named)
    assert "separation" not in unlabelled["audit"].table("suspects.csv")
    assert unlabelled["repair"].record("repair.json")["latents"] == [1, 3]
    assert undone_files(unlabelled["repair"], plain_model(artifacts).state_dict()) == 2  # the edit, and the biases
    with pytest.raises(UserError, match="chooses suspects by itself only where the audit has labels"):
        start(folder, "stages=[audit,repair]", *SETTINGS, "audit.labels=0")
    assert unlabelled["audit"].key != artifacts["audit"].key
    assert unlabelled["repair"].key != artifacts["repair"].key


def test_one_labelled_image_of_each_group_is_enough_to_go_on(
    repaired: tuple[Path, dict[str, Artifact]], start: Start
) -> None:
    folder, _ = repaired
    few = start(
        folder, "stages=[audit,repair]", *SETTINGS, "audit.labels=1", "repair.methods=[dfr]", "repair.rivals=[]"
    )
    tried = few["repair"].table("candidates.csv")
    assert set(tried["method"]) == {"dfr", "nothing", "recalibration alone"}
    assert tried.set_index("method").loc["dfr", "select_score"] == 0  # no half is left to judge the other by


def undo_command(said: str) -> list[str]:
    """The arguments of ``salve-edit`` that the end of a repair names."""
    (line,) = (line for line in said.splitlines() if line.startswith("Undo: salve-edit "))
    return shlex.split(line.removeprefix("Undo: salve-edit "))


def test_an_audit_alone_shows_its_suspects_and_what_to_doubt_in_a_run_of_its_name(
    repaired: tuple[Path, dict[str, Artifact]],
    salve: Salve,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = repaired
    arguments = [f"output_dir={folder / 'store'}", *SMALL, *FEW, *NARROW, *SETTINGS]
    assert salve("stages=[audit]", *arguments, "audit.suspects=3") == 0
    assert not (folder / "store" / "runs" / "quickstart").exists()
    (run,) = (folder / "store" / "runs" / "audit").glob("*")
    said = " ".join(capsys.readouterr().out.split())
    assert "Suspects: latents that push images towards a class" in said
    assert "select images whose tag is known, at most 4 of each group: how well the latent tells the tag" in said
    told = (run / "salve.log").read_text()  # four labels a group, and a network of three epochs
    assert "Caution: In 20 of 20 groups, suspects and repairs are chosen on fewer than 10 labelled select" in told
    assert told.index("Caution: In 20 of 20") < told.index("Caution: The network is right on")
    # The repair that goes on from it is none of its runs.
    assert salve("repair", str(run), "audit.suspects=2") == 0
    (repair,) = (folder / "store" / "runs" / "repair").glob("*")
    assert "<h1>salve: repair</h1>" in (repair / "index.html").read_text()
    shutil.rmtree(repair)


def test_the_command_ends_with_four_rows_and_with_what_undoes_it(
    repaired: tuple[Path, dict[str, Artifact]],
    salve: Salve,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, artifacts = repaired
    monkeypatch.chdir(tmp_path)
    home, few = f"output_dir={folder / 'store'}", [*SMALL, *FEW, *NARROW, *SETTINGS]
    for way in ("settings", "run", "run, with less"):
        if way == "settings":
            arguments = [home, *few]
        else:
            (own,) = (folder / "store" / "runs" / "repair").glob("*")
            arguments = [str(own), "audit.labels=2"] if way == "run, with less" else [str(own)]
        assert salve("repair", *arguments) == 0
        said = capsys.readouterr().out
        rows = [line.split()[0] for line in said.splitlines() if line.strip().endswith("%")]
        assert rows[-4:] == ["before", "biases", "edit", "repaired"]
        if way == "run, with less":
            assert "The network stays as it was" in said
            assert "Undo:" not in said
            continue
        record, weights = artifacts["repair"].record("repair.json"), artifacts["repair"].file("repaired.safetensors")
        assert f"{WEIGHTS[outcome(record)]}: {weights}" in said  # found, not made again
        assert edit_command(undo_command(said)) == 0
        restored = load_file(tmp_path / "restored.safetensors")
        assert all(torch.equal(restored[name], one) for name, one in plain_model(artifacts).state_dict().items())
        original = artifacts["classifier"].file("model.safetensors")
        assert (tmp_path / "restored.safetensors").read_bytes() == original.read_bytes()  # also the same header
        (tmp_path / "restored.safetensors").unlink()
        if way == "run":  # which lies beside the run that it went on from
            (other,) = set((folder / "store" / "runs" / "repair").glob("*")) - {own}
            assert (other / "index.html").is_file()
            shutil.rmtree(other)
