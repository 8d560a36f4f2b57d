"""What ``salve.open_run`` and ``salve.open_sweep`` read, and what they say where there is nothing to read."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from filelock import FileLock

import salve
from salve.artifacts import _seal, save_tensors, write_record, write_table
from salve.integrity import sealed
from salve.sae import make_sae, save_sae
from salve.types import UserError

SETTINGS: dict[str, Any] = {
    **{"name": "one", "output_dir": "out", "seed": 3, "data": {"_target_": "salve.data.ConceptsData", "root": None}},
    **{"sae": {"variant": "linear_l1", "sparsity": 2.0, "seed": 1}, "edit": {"alpha": [0, 1]}},
}
CURVES = pd.DataFrame({"target": ["01", "b"], "alpha": [0.0, 1.0], "accuracy": [0.5, 0.25]})


def unfinished(folder: Path, settings: dict[str, Any] = SETTINGS) -> Path:
    """A run's folder before anything was made."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def finished(folder: Path, settings: dict[str, Any] = SETTINGS, **metrics: float) -> Path:
    """A run's folder with three artifacts beside it."""
    unfinished(folder, settings)
    store = folder.parent / "artifacts"
    kinds = {"classifier": "c", "sae": "s", "control": "e"}
    if not store.exists():
        for kind, key in kinds.items():
            (store / kind / key / "edits").mkdir(parents=True)
        write_record(store / "classifier" / "c" / "classifier.json", {"classes": ["b", "01"]})
        save_sae(store / "sae" / "s" / "sae.safetensors", make_sae("linear_l1", 3, 2, torch.Generator().manual_seed(0)))
        write_table(store / "control" / "e" / "curves.csv", CURVES)
        save_tensors(store / "control" / "e" / "gates.safetensors", {"gate": torch.arange(3.0)})
        for name in ("b.json", "b.safetensors", "a.json"):
            (store / "control" / "e" / "edits" / name).touch()
        for path in store.glob("*/*"):
            _seal(path, {})
    write_record(folder / "metrics.json", metrics)
    made = {kind: {"key": key, "digest": key, "path": f"../artifacts/{kind}/{key}"} for kind, key in kinds.items()}
    write_record(folder / "manifest.json", sealed({"artifacts": made, "files": {}}))
    return folder


def test_a_finished_run_has_all_that_it_left(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", fve=0.5)
    run = salve.open_run(str(folder))
    assert (run.state, run.reason, run.finished, run.key) == ("finished", "", True, "run")
    assert run.settings == SETTINGS
    assert run.flat_settings["sae.sparsity"] == 2.0
    assert run.flat_settings["data"] == "concepts"
    assert run.metrics == {"fve": 0.5}
    assert run.swept == {}
    assert run.artifacts["sae"] == tmp_path / "artifacts" / "sae" / "s"
    assert run.files("control") == [
        "curves.csv",
        "edits/a.json",
        "edits/b.json",
        "edits/b.safetensors",
        "gates.safetensors",
    ]
    assert run.classes == ["b", "01"]
    pd.testing.assert_frame_equal(run.table("control", "curves.csv"), CURVES)
    assert run.tensors("control", "gates.safetensors")["gate"].tolist() == [0, 1, 2]
    assert run.record("classifier", "classifier.json") == {"classes": ["b", "01"]}
    assert [path.name for path in run.edits] == ["a.json", "b.json"]
    wanted = make_sae("linear_l1", 3, 2, torch.Generator().manual_seed(0))
    assert torch.equal(run.sae.decoder, wanted.decoder)
    assert not run.sae.decoder.requires_grad


def test_what_is_done_to_a_table_does_not_come_back(tmp_path: Path) -> None:
    run = salve.open_run(finished(tmp_path / "run"))
    table = run.table("control", "curves.csv")
    table.loc[0, "accuracy"] = 9
    pd.testing.assert_frame_equal(run.table("control", "curves.csv"), CURVES)


def test_torch_comes_with_the_first_tensor(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", fve=0.5)
    code = (
        "import sys, salve; run = salve.open_run(sys.argv[1]); run.metrics, run.settings, run.classes; "
        "assert not {'torch', 'pandas'} & set(sys.modules); run.table('control', 'curves.csv'); "
        "assert 'torch' not in sys.modules; sys.modules['torch'] = None; run.sae"  # its import takes seconds
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: import of torch halted; None in sys.modules"


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (
            lambda run: run.table("validate", "top.csv"),
            "made no artifact 'validate'; it made: classifier, control, sae",
        ),
        (lambda run: run.table("control", "curve.csv"), "holds no curve.csv; it holds: curves.csv, edits/a.json"),
        (lambda run: run.table("control", "../../../run/metrics.json"), "holds no ../../../run/metrics.json"),
        (lambda run: run.activations("val"), "'val' is no split; choose from train, select, test"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(tmp_path: Path, ask: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        ask(salve.open_run(finished(tmp_path / "run")))
    assert said in str(error.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        salve.open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no folder of a run: it holds neither manifest\.json nor config\.yaml"):
        salve.open_run(tmp_path)
    write_record(tmp_path / "sweep.json", {"runs": {}})
    with pytest.raises(UserError, match="open it with open_sweep"):
        salve.open_run(tmp_path)


def test_a_run_that_is_not_finished_has_settings_and_no_results(tmp_path: Path) -> None:
    folder = unfinished(tmp_path / "run")
    assert salve.open_run(folder).state == "not begun"
    write_record(folder / "failure.json", {"reason": "The disk is full."})
    run = salve.open_run(folder)
    assert (run.state, run.reason) == ("failed", "The disk is full.")
    assert run.settings["seed"] == 3
    for ask in (
        lambda: run.metrics,
        lambda: run.artifacts,
        lambda: run.sae,
        lambda: run.table("control", "curves.csv"),
    ):
        with pytest.raises(
            UserError, match=r"it is failed \(The disk is full\.\); the command that started it finishes"
        ):
            ask()
    write_record(folder / "running.json", {"pid": 1})
    assert salve.open_run(folder).state == "interrupted"
    (tmp_path / ".locks").mkdir()
    with FileLock(tmp_path / ".locks" / "run.lock"):
        assert salve.open_run(folder).state == "running"


def test_a_damaged_artifact_is_refused_before_it_is_read(tmp_path: Path) -> None:
    run = salve.open_run(finished(tmp_path / "run"))
    (run.artifacts["control"] / "gates.safetensors").write_bytes(b"else")
    with pytest.raises(UserError, match=r"is damaged: gates\.safetensors is not what was written"):
        run.table("control", "curves.csv")
    assert run.classes == ["b", "01"]  # of another artifact


def test_a_record_that_cannot_be_read_is_no_result(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    (folder / "config.yaml").write_text("data: [", encoding="utf-8")
    run = salve.open_run(folder)
    assert run.state == "failed"
    assert "cannot be read" in run.reason
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        _ = run.settings


def test_a_run_that_was_moved_is_told_where_its_artifacts_are(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    (tmp_path / "else" / "where").mkdir(parents=True)
    moved = Path(shutil.move(folder, tmp_path / "else" / "where" / "run"))
    with pytest.raises(UserError, match="is not there; if the run was moved, say where its artifacts are"):
        _ = salve.open_run(moved).sae
    assert salve.open_run(moved, artifacts=tmp_path / "artifacts").classes == ["b", "01"]


def test_a_link_out_of_an_artifact_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("word\nxyzzy\n")
    folder = finished(tmp_path / "run")
    control = tmp_path / "artifacts" / "control" / "e"
    (control / "link.csv").symlink_to(tmp_path / "secret.csv")
    (control / "DONE.json").unlink()
    _seal(control, {})
    with pytest.raises(UserError, match=r"holds no link\.csv"):
        salve.open_run(folder).table("control", "link.csv")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three planned runs, of which the second was never begun."""
    planned = {}
    for key, sparsity in (("b", 5.0), ("c", 9.0), ("a", 1.0)):
        planned[key] = {"swept": {"sae.sparsity": sparsity}}
        if key != "c":
            finished(tmp_path / key, SETTINGS | {"sae": {**SETTINGS["sae"], "sparsity": sparsity}}, fve=sparsity / 10)
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "lambda", "runs": planned}), encoding="utf-8")
    return tmp_path


def test_a_sweep_is_its_runs_in_order(sweep: Path) -> None:
    found = salve.open_sweep(sweep)
    assert [run.key for run in found] == ["b", "c", "a"]
    assert (len(found), found[0].key, found["a"].swept, found.name) == (3, "b", {"sae.sparsity": 1.0}, sweep.name)
    assert [run.key for run in found.finished] == ["b", "a"]
    assert [(run.key, run.state) for run in found.unfinished] == [("c", "not begun")]
    assert found.table[["run", "sae.sparsity", "fve"]].to_numpy().tolist() == [["a", 1.0, 0.1], ["b", 5.0, 0.5]]
    assert found["b"].metrics == {"fve": 0.5}
    assert salve.open_run(sweep / "b").swept == {"sae.sparsity": 5.0}
    with pytest.raises(UserError, match="planned no run z"):
        _ = found["z"]


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no sweep\.json; give one that `salve -m` has written"):
        salve.open_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"runs": {"../x": {"swept": {}}}}')
    with pytest.raises(UserError, match="cannot be read as the plan of a sweep"):
        salve.open_sweep(tmp_path)
