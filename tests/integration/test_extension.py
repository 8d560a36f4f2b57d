"""The example package, installed outside of the repository: salve uses each of its parts, and they do what they say."""

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import softshrink

import salve
from salve.results.run import Run
from salve.types import UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "salve_extra"
RECIPE = ["hydra.searchpath=[pkg://salve_extra.conf]", "experiment=gratings"]
FEW = ["data.train_per_class=40", "data.test_per_class=10", "finetune.epochs=4", "sae.steps=100", "trainer=cpu"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder that pip installed it into, from a copy, since building writes beside the sources."""
    source = shutil.copytree(EXAMPLE, tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(source)], check=True, timeout=120)
    assert not list(folder.glob("salve/**/*.py"))
    return folder


def command(installed: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """``salve`` with the package, in a process and a folder of its own."""
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "salve", *arguments]
    return subprocess.run(
        line, cwd=installed.parent, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_a_package_adds_a_part_of_each_kind(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    help_text = command(installed, RECIPE[0], "--help").stdout
    assert all(f" {name}," in help_text for name in ("gratings", "average_row"))

    made = command(installed, *RECIPE, *FEW)
    assert made.returncode == 0, made.stderr
    [folder] = (installed.parent / "outputs" / "runs" / "gratings").iterdir()
    again = command(installed, f"rerun={folder}")
    assert (again.returncode, "name it again on the command line" in again.stderr) == (2, True)

    run = salve.open_run(folder)
    assert (run.settings["name"], run.settings["finetune"]["label_smoothing"]) == ("gratings", 0.05)  # the recipe
    with pytest.raises(UserError, match="import its module first"):
        _ = run.sae

    monkeypatch.syspath_prepend(installed)
    try:
        images, network, shrink = (import_module(f"salve_extra.{name}") for name in ("images", "network", "shrink"))
        check_images_and_network(run, images, network)
        check_sae(run, shrink)
        check_edit(run)
        check_measure(run)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "salve_extra"]:
            del sys.modules[name]


def check_images_and_network(run: Run, images: Any, network: Any) -> None:
    """The captured activations are those of the package's network, of the package's images."""
    data: Any = images.Gratings(batch_size=8, test_per_class=10)
    assert tuple(run.classes) == data.classes
    model = network.make_net(4).eval()
    model.load_state_dict(load_file(run.artifact("classifier").file("model.safetensors")))
    raw = [data.raw("test")[i] for i in range(40)]
    pixels = torch.stack([image for image, _ in raw]).float() / 255
    activations, labels = run.activations("test")
    assert [int(label) for label in labels[:]] == [label for _, label in raw]
    # What a network without a preset of its own reads (docs/extend.md).
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        assert torch.allclose(model[:-1]((pixels - mean) / deviation), activations[:], atol=1e-4)
    # The gratings are what their names say: constant along one side, but for the noise.
    for name, along in (("wide level", 2), ("narrow upright", 1)):
        image = pixels[10 * data.classes.index(name)]
        assert image.mean(dim=along).std() > 3 * image.mean(dim=3 - along).std()


def check_sae(run: Run, shrink: Any) -> None:
    """Latents are a soft threshold, in the unit of raw activations."""
    sae: Any = run.sae
    assert isinstance(sae, shrink.Shrink)
    with safe_open(run.artifact("sae").file("sae.safetensors"), "torch") as file:
        scale = json.loads(file.metadata()["salve"])["facts"]["scale"]
    assert sae.threshold == pytest.approx(0.1 * scale)
    activations, _ = run.activations("test")
    latents = sae.encode(activations[:])
    assert torch.allclose(latents, softshrink(activations[:] @ sae.encoder.T + sae.bias, sae.threshold), atol=1e-5)
    assert 0 < (latents == 0).float().mean() < 1
    assert run.metrics["l0"] == pytest.approx(float((latents != 0).sum(dim=1).float().mean()), rel=1e-3)
    assert run.metrics["fve"] > 0.5


def check_edit(run: Run) -> None:
    """At each strength, accuracies are those of a head whose row moves to the mean of the others."""
    head = load_file(run.artifact("classifier").file("model.safetensors"))
    weight, bias = head["3.weight"].double(), head["3.bias"].double()
    activations, labels = run.activations("test")
    rows, classes = activations[:].double(), run.classes
    curves = run.table("control", "curves.csv")
    curves = curves[curves["split"] == "test"]
    assert len(curves) == 4 * 5
    for k, name in enumerate(classes):
        others = [j for j in range(len(classes)) if j != k]
        for row in curves[curves["target"] == name].to_dict("records"):
            alpha, logits = row["alpha"], rows @ weight.T + bias
            logits[:, k] += alpha * (logits[:, others].mean(dim=1) - logits[:, k])
            right = logits[labels[:] == k].argmax(dim=1) == k
            assert row["accuracy"] == pytest.approx(float(right.double().mean())), (name, alpha)
    summary = run.table("control", "summary.csv").set_index("target")
    assert (summary["accuracy_after"] < summary["accuracy_before"]).all()  # a mean of others never leads
    assert len(run.edits) == len(classes)


def check_measure(run: Run) -> None:
    """The measure is the mean difference of two latents' frequencies, over twice their mean."""
    frequency = run.table("features", "latents.csv")["frequency"].to_numpy()
    wanted = np.abs(frequency[:, None] - frequency).mean() / (2 * frequency.mean())
    assert run.metrics["own_gini"] == pytest.approx(wanted)
    assert 0 < wanted < 1
