"""A real run, and a sweep of it, read back as docs/python.md shows it."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import salve
from salve.artifacts import Artifact, read_record
from salve.editing import load_edit_file
from salve.sae import load_sae

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_a_real_run_is_read_as_it_was_left(whole_run: tuple[Path, dict[str, Artifact]]) -> None:
    folder, artifacts = whole_run
    run = salve.open_run(folder / "run")
    assert run.state == "finished"
    assert run.metrics == read_record(folder / "run" / "metrics.json")
    assert run.settings["sae"]["dictionary_size"] == 24
    assert run.artifacts == {kind: artifact.path.resolve() for kind, artifact in artifacts.items()}
    for kind, artifact in artifacts.items():
        assert run.digest(kind) == run.artifact(kind).digest == artifact.digest
    pd.testing.assert_frame_equal(run.table("control", "curves.csv"), artifacts["control"].table("curves.csv"))
    means = run.tensors("features", "class_means.safetensors")["class_means"]
    assert torch.equal(means, artifacts["features"].tensors("class_means.safetensors")["class_means"])
    assert torch.equal(run.sae.decoder, load_sae(artifacts["sae"].file("sae.safetensors")).decoder)
    activations, labels = run.activations("test")
    assert (len(activations), means.shape) == (len(labels), (len(run.classes), 24))
    assert run.edits
    assert all(load_edit_file(path).weights for path in run.edits)


def test_the_page_reads_a_run_and_a_sweep(
    whole_run: tuple[Path, dict[str, Artifact]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = whole_run
    runs, sweep = tmp_path / "outputs" / "runs", tmp_path / "outputs" / "sweeps" / "lambda"
    for above, name in ((runs, "quickstart"), (sweep, "one")):
        above.mkdir(parents=True)
        (above / name).symlink_to(folder / "run")
    (sweep / "sweep.json").write_text('{"runs": {"one": {"swept": {}}, "two": {"swept": {"sae.sparsity": 2.0}}}}')
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"salve": salve}
    for code in BLOCKS:
        if "outputs/" in code:
            exec(code, names)
    assert names["latents"].shape[1] == 24
    assert (names["run"].key, names["run"].state) == ("two", "not begun")
