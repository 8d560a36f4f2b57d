"""What ``salve repair`` makes of its arguments, and how it ends."""

from pathlib import Path
from typing import Any

import pytest

from salve.artifacts import write_record
from salve.cli import main
from salve.report.repaired import done, few_objects, rough, taken_out, verdict
from salve.report.terminal import repair_ending
from salve.run.repair import STAGES, home_of, name_of, overrides, run_folder
from salve.types import UserError


def test_settings_get_the_stages_and_a_name_where_nothing_gives_one() -> None:
    assert overrides(["mark=text"]) == [STAGES, "name=repair", "mark=text"]
    assert overrides([]) == [STAGES, "name=repair"]
    assert overrides(["experiment=repair/quickstart"]) == [STAGES, "experiment=repair/quickstart"]
    assert overrides(["+experiment=repair/quickstart"]) == [STAGES, "+experiment=repair/quickstart"]
    assert overrides(["name=mine", "stages=[audit,repair]"]) == ["name=mine", "stages=[audit,repair]"]
    assert overrides(["stages=[audit]"]) == ["name=audit", "stages=[audit]"]
    assert overrides(["-m", "seed=0,1"]) == [STAGES, "name=repair", "-m", "seed=0,1"]


def test_a_run_is_called_after_its_audit_or_repair_where_nothing_else_names_it() -> None:
    assert name_of(["stages=[audit,report]", "seed=1"]) == ["name=audit"]
    assert name_of(["stages=[audit, control, repair]"]) == ["name=repair"]
    for own in (
        "name=mine",
        "experiment=repair/quickstart",
        "+experiment=x",
        "--config-name=my",
        "-cn=my",
        "rerun=here",
    ):
        assert name_of(["stages=[audit,report]", own]) == []
    assert name_of(["stages=[control,report]"]) == []
    assert name_of(["seed=1"]) == []


def test_a_folder_before_all_settings_is_a_run_to_go_on_from(tmp_path: Path) -> None:
    assert run_folder([str(tmp_path), "seed=1"]) == tmp_path
    for arguments in ([], ["seed=1"], ["-m", "seed=0,1"], ["+experiment=x"], ["~callbacks"]):
        assert run_folder(arguments) is None
    with pytest.raises(UserError, match=r"no folder outputs/nowhere; give the folder of a run, or settings"):
        run_folder(["outputs/nowhere"])


def test_results_go_where_the_run_lies(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "runs" / "mine" / "today"
    run.mkdir(parents=True)
    assert home_of(run) is None  # there are no artifacts beside it
    (tmp_path / "outputs" / "artifacts").mkdir()
    assert home_of(run) == tmp_path / "outputs"
    assert home_of(tmp_path) is None


def test_help_says_what_it_needs_and_writes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for option in ("--help", "-h"):
        monkeypatch.setattr("sys.argv", ["salve", "repair", option])
        main()
        shown = capsys.readouterr().out
        for word in (
            "data.groups=",
            "repair.suspects=",
            "repair.max_accuracy_loss=",
            "repaired.safetensors",
            "salve-edit",
        ):
            assert word in shown
        assert max(map(len, shown.splitlines())) <= 120


def test_what_is_no_setting_and_no_folder_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["salve", "repair", "nowhere", "seed=1"])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("salve: salve repair nowhere: there is no folder nowhere")


MEASURED: dict[str, Any] = {
    "method": "leace",
    "attribute": "tag",
    "labels": 25,
    "classes": ["clinic", "reef"],
    "worst_group_before": 0.2,
    "worst_group_recalibrated": 0.4,
    "average_before": 0.9,
    "average_after": 0.8,
    "average_recalibrated": 0.85,
    "worst_group_after": 0.6,
    **{"worst_group_before_low": 0.1, "worst_group_before_high": 0.3},
    **{"worst_group_after_low": 0.5, "worst_group_after_high": 0.7},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "The repair helped: on test images the worst group was right on 20.0 %, on 40.0 %"),
        ({"worst_group_after": 0.4}, "The repair did NOT help"),  # no better than new biases alone
        # An error of 0.07 above 0.4.
        ({"worst_group_after": 0.45}, "Its gain over new biases alone is no more than chance could give"),
        ({"max_accuracy_loss": 0.05}, "That is more than the budget"),
        (
            {"beyond_budget": {"method": "dfr", "select_score": 0.7}, "select_score": [0.5, 0.8]},
            "Beyond the budget, dfr has 70.0 % of the worst group of select images in place of 50.0 %",
        ),
        ({"worst_group_after": 0.1}, "Keep the network as it was."),
        ({"method": "nothing"}, "The network stays as it was"),
        (
            {"method": "nothing", "labels": 0},
            "lowers the probability of clinic and reef for the images that come nearest to it",
        ),
        ({"attribute": ""}, "cannot be told without groups or a mark"),
        (
            {"attribute": "", "worst_group_after": 0.1, "average_after": 0.1},
            "New biases alone do better by both: rather keep those.",
        ),
        ({"groups_without_images": ["ship, tag present"]}, "Of ship, tag present there is no test image"),
    ],
)
def test_the_end_says_whether_the_repair_helped(change: dict[str, Any], said: str) -> None:
    assert said in verdict({**MEASURED, **change}).replace("\u00a0", " ")


def test_without_labels_the_end_does_not_take_the_score_for_a_share_of_a_group() -> None:
    other = {"beyond_budget": {"method": "gate", "select_score": -0.03}, "select_score": [-0.04, 0.9]}
    assert "Beyond the budget" in verdict({**MEASURED, **other})
    assert "Beyond the budget" not in verdict({**MEASURED, **other, "labels": 0})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "Repaired weights"),
        ({"worst_group_after": 0.45}, "Edited weights, which may not help"),
        ({"worst_group_after": 0.4, "labels": 0}, "Edited weights, which did not help"),
        ({"method": "nothing"}, "Weights, unchanged"),
        ({"method": "nothing", "labels": 0}, "Weights, unchanged"),
        ({"attribute": ""}, "Edited weights, for you to judge"),
    ],
)
def test_what_is_written_is_called_what_the_verdict_says_of_it(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_record(tmp_path / "repair.json", {**MEASURED, **change})
    _, weights = repair_ending({"repair": tmp_path})
    assert weights == f"{said}: {tmp_path / 'repaired.safetensors'}"


def test_groups_of_few_test_images_are_named_the_smallest_first() -> None:
    record = {"small_groups": {"a": 9, "b": 1, "c": 4}}
    assert rough(record) == "Groups of few test images, whose accuracy is rough: b (1); c (4); a (9)."
    assert rough(record, 2) == "Groups of few test images, whose accuracy is rough: b (1); c (4); and 1 more."
    assert rough({"small_groups": {}}) == rough({}) == ""


def test_few_objects_that_have_chosen_a_repair_are_told() -> None:
    changed = {"method": "dfr", "latents": [], "alpha": 1.0, "shifts": {}}
    record = {**MEASURED, **changed, "few_objects": {"ship": 12, "bird": 9}}
    said = "The labelled select images of bird show only 9 objects: what is better on these may be worse on others, so "
    assert few_objects(record) == f"{said}label images of more objects."
    assert few_objects({**record, "method": "nothing", "alpha": 0.0}) == few_objects({**MEASURED, **changed}) == ""


def test_suspects_that_a_person_names_are_told_as_those_of_their_classes() -> None:
    classes = {"classes": ["clinic", "reef"]}
    assert taken_out({**classes, "suspects": "clinic + reef"}) == "the suspects of clinic and reef"
    assert taken_out({**classes, "suspects": "tag present"}) == taken_out({"suspects": "tag present"}) == "tag present"


def test_what_a_repair_changes_is_told_in_words() -> None:
    record = {"method": "gate", "latents": [3, 7], "alpha": 0.5, "shifts": {"ship": 0.4, "bird": 0.0, "car": -1.0}}
    biases = "the bias of ship raised by 0.4 logits and the bias of car lowered by 1 logits"
    assert done(record) == f"gate of the latents 3, 7 at α = 0.5, with {biases}"
    assert done({**record, "latents": [3], "shifts": {}}) == "gate of the latent 3 at α = 0.5, with no bias changed"
    assert done({**record, "method": "dfr", "latents": []}) == f"the head trained anew (dfr), with {biases}"
    assert done({**record, "method": "recalibration alone", "latents": [], "alpha": 0.0}) == biases
    assert done({"method": "nothing", "latents": [], "alpha": 0.0, "shifts": {"ship": 0.0}}) == ""


def test_the_end_names_the_files_and_what_undoes_them(tmp_path: Path) -> None:
    write_record(tmp_path / "repair.json", MEASURED)
    assert len(repair_ending({"repair": tmp_path})) == 2  # no edit file, as where nothing helps
    (tmp_path / "edits").mkdir()
    edits = [tmp_path / "edits" / name for name in ("00-leace.json", "01-recalibration.json")]
    for edit in edits:
        edit.touch()
    _, weights, files, undo = repair_ending({"repair": tmp_path})
    assert weights == f"Repaired weights: {tmp_path / 'repaired.safetensors'}"
    assert files == f"Edit files: {edits[0]}, {edits[1]}"
    assert (
        undo == f"Undo: salve-edit undo {edits[0]} {edits[1]} {tmp_path / 'repaired.safetensors'} restored.safetensors"
    )
