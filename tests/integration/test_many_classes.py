"""Many classes: what is written and kept is linear in them; and a network with more outputs than audited classes."""

import csv
import weakref
from collections import Counter
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import salve.stages.measured
from salve.artifacts import Artifact
from salve.editing.cli import main as salve_edit
from tests.drawing import draw_nothing
from tests.integration.conftest import Start

CHANNELS = (8, 16, 24, 32)
TABLES = ("features", "validate", "control", "diagnose")
#: Linear, but for the digits of numbers and for how many images a network confuses.
TWICE = 2.2


@pytest.fixture(scope="module")
def standin() -> ModuleType:
    """The benchmark's classes of coloured patches, and its network that tells them apart."""
    file = Path(__file__).parents[2] / "benchmarks" / "classes.py"
    spec = util.spec_from_file_location("classes", file)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays_alive(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tables of strengths by classes stage control holds whenever it asks for the next one."""
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    measure = salve.stages.measured.accuracies_of

    def counted(*args: Any) -> Tensor:
        array = measure(*args).numpy().copy()
        made.append(weakref.ref(array))
        alive.append(sum(ref() is not None for ref in made))
        return torch.from_numpy(array)

    monkeypatch.setattr(salve.stages.measured, "accuracies_of", counted)
    return alive


def test_files_and_rows_are_linear_in_classes(
    standin: ModuleType, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, rows = [Counter[str](), Counter[str]()], [Counter[str](), Counter[str]()]
    for found, lines, classes in zip(sizes, rows, (10, 20), strict=True):
        folder = tmp_path / str(classes)
        standin.write_images(folder / "images", classes)
        standin.write_weights(folder / "weights.safetensors", classes, CHANNELS)
        settings = standin.settings_of(folder / "images", folder / "weights.safetensors", CHANNELS)
        more = [
            "validate.pictures=4",
            f"edit.alpha=[{','.join(map(str, range(63)))}]",
            "stages=[validate,control,diagnose]",
        ]
        alive = arrays_alive(monkeypatch)
        artifacts = start(folder, *settings, *more)
        # Of each edit those of two splits; those of the edit before go when they are replaced.
        assert len(alive) == 4 * classes
        assert max(alive) <= 4
        for kind in TABLES:
            for path in artifacts[kind].path.rglob("*"):
                if path.suffix in (".csv", ".safetensors", ".json") and path.parent.name != "edits":
                    found[f"{kind}/{path.name}"] += path.stat().st_size
                if path.parent.name == "edits":
                    found["edits"] += path.stat().st_size
                if path.suffix == ".csv":
                    lines[f"{kind}/{path.name}"] += len(pd.read_csv(path))
        assert len(artifacts["validate"].table("localisation.csv")) == classes
        pictures = artifacts["validate"].tensors("saliency.safetensors")
        assert len(pictures["images"]) == len(pictures["maps"]) == 4
        assert len(artifacts["validate"].table("maximisation.csv")) == 4
    assert rows[0]["control/curves.csv"] == 10 * 2 * 2 * 63
    for few, many in ((rows[0], rows[1]), (sizes[0], sizes[1])):
        assert set(few) == set(many)
        assert {name: many[name] / few[name] for name in few if many[name] > TWICE * few[name]} == {}


# -- a network of 30 outputs, audited on three of them

OUTPUTS, PER_CLASS = 30, 12
UNITS = {"cow": 17, "ant": 4, "bee": 29}
CLASSES = ("ant", "bee", "cow")  # as the folders are sorted
#: In folder ant lie images that show what this unit stands for, which is none of the audited classes.
STRANGER, STRANGE = 9, 3
SPLITS = {"train": 0, "val": 1, "test": 2}


class Audit:
    """Images on disk, the network's file, and what plain torch makes of them."""

    def __init__(self, standin: ModuleType, root: Path) -> None:
        self.root, self.weights = root / "images", root / "net.safetensors"
        standin.write_weights(self.weights, OUTPUTS, CHANNELS, PER_CLASS)
        self.units = torch.tensor([UNITS[name] for name in CLASSES])
        for split, seed in SPLITS.items():
            pixels = standin.pixels_of(OUTPUTS, PER_CLASS, seed).reshape(OUTPUTS, PER_CLASS, 32, 32, 3)
            for name, unit in UNITS.items():
                (self.root / split / name).mkdir(parents=True)
                for i in range(PER_CLASS):
                    strange = name == "ant" and i < STRANGE
                    image = Image.fromarray(pixels[STRANGER if strange else unit, i])
                    image.save(self.root / split / name / f"{i:02d}.png")
        self.settings = [
            *("data=folder", f"data.root={self.root}", "data.num_workers=0", "data.batch_size=16"),
            *("backbone=resnet_small", f"backbone.weights={self.weights}", "backbone.preprocess.size=32"),
            f"backbone.args.channels=[{','.join(map(str, CHANNELS))}]",
        ]

    def images(self, split: str) -> tuple[Tensor, Tensor]:
        """Normalised images and their labels, in the order of the folders."""
        files = sorted((self.root / split).glob("*/*.png"))
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files]).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        labels = torch.tensor([CLASSES.index(file.parent.name) for file in files])
        return (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1), labels

    @torch.no_grad()
    def predictions(self, state: dict[str, Tensor], split: str) -> tuple[Tensor, Tensor]:
        """Predicted units of the whole network, and labels."""
        images, labels = self.images(split)
        return self.network(state)(images).argmax(dim=1), labels

    def network(self, state: dict[str, Tensor]) -> torch.nn.Module:
        """Plain timm, as many outputs as the weights have."""
        model = timm.create_model("resnet10t", num_classes=OUTPUTS, channels=CHANNELS, output_stride=8).eval()
        model.load_state_dict(state)
        return model

    def accuracy(self, state: dict[str, Tensor], split: str) -> list[float]:
        """Share of each class's images that its unit wins, of all units."""
        predicted, labels = self.predictions(state, split)
        right = predicted == self.units[labels]
        return [float(right[labels == k].double().mean()) for k in range(len(CLASSES))]


@pytest.fixture(scope="module")
def audit(standin: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return Audit(standin, tmp_path_factory.mktemp("audit"))


BY_MAPPING = f"data.outputs={{{','.join(f'{name}: {unit}' for name, unit in UNITS.items())}}}"
MORE = ("edit.evaluate=3", "edit.by_class=true", "sae.sparsity=0.5")


@pytest.fixture(scope="module")
def audited(audit: Audit, start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Artifact]]:
    """A run of all stages with the weights as they are; read only."""
    folder = tmp_path_factory.mktemp("audited")
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        return folder, start(folder, *audit.settings, BY_MAPPING, *MORE, "finetune.mode=auto")


Audited = tuple[Path, dict[str, Artifact]]


def test_its_head_is_kept_and_accuracy_is_over_all_its_outputs(audit: Audit, audited: Audited) -> None:
    _, artifacts = audited
    original = load_file(audit.weights)
    kept = load_file(artifacts["classifier"].file("model.safetensors"))
    assert kept["fc.weight"].shape == (OUTPUTS, CHANNELS[-1])
    assert all(torch.equal(kept[name], tensor) for name, tensor in original.items())
    table = artifacts["features"].table("classes.csv")
    assert tuple(table["class"]) == CLASSES
    wanted = audit.accuracy(original, "test")
    assert table["test_accuracy"].tolist() == pytest.approx(wanted)
    assert wanted[0] <= 1 - STRANGE / PER_CLASS  # images of the stranger are wrong, not left out
    assert min(wanted[1:]) > 0.5


def test_other_outputs_are_a_column_of_the_confusion(audit: Audit, audited: Audited) -> None:
    _, artifacts = audited
    control = artifacts["control"]
    summary = control.table("summary.csv").set_index("target")
    original = load_file(audit.weights)
    table = control.table("confusion.csv")
    assert set(table["target"]) == {"", *CLASSES}
    names = {UNITS[name]: name for name in CLASSES}
    for target in ("", *CLASSES):
        state = original
        if target:
            out = control.path / "edited.safetensors"
            edit_file = control.file(str(summary.loc[target, "edit_file"]))
            assert salve_edit(["apply", str(edit_file), str(audit.weights), str(out)]) == 0
            state = load_file(out)
            out.unlink()
            assert state["fc.weight"].shape == (OUTPUTS, CHANNELS[-1])
            assert not torch.equal(state["fc.weight"], original["fc.weight"])
            after = audit.accuracy(state, "test")
            assert summary.loc[target, "accuracy_after"] == pytest.approx(after[CLASSES.index(target)])
        predicted, labels = audit.predictions(state, "test")
        said = [names.get(unit, "other output") for unit in predicted.tolist()]
        counted = Counter(zip([CLASSES[k] for k in labels.tolist()], said, strict=True))
        found = table[table["target"] == target]
        assert dict(zip(zip(found["true"], found["predicted"], strict=True), found["images"], strict=True)) == counted
        if not target:
            assert counted["ant", "other output"] >= STRANGE - 1
    evaluated = control.table("evaluation.csv")
    assert evaluated["accuracy_edited"].tolist() == pytest.approx(evaluated["accuracy_cached"].tolist())


def test_every_class_at_every_strength_is_what_the_curves_sum_up(audited: Audited) -> None:
    _, artifacts = audited
    whole = pd.read_parquet(artifacts["control"].file("curves.parquet"))
    curves = artifacts["control"].table("curves.csv")
    assert len(whole) == len(curves) * len(CLASSES)
    keys = ["split", "mode", "target", "alpha"]
    own = whole[whole["class"] == whole["target"]].set_index(keys)["accuracy"]
    others = whole[whole["class"] != whole["target"]].groupby(keys)["accuracy"]
    rows = curves.astype({"alpha": float}).set_index(keys)
    pd.testing.assert_series_equal(own.sort_index(), rows["accuracy"].sort_index(), rtol=1e-5)
    for name, expected in (("mean", "others_accuracy"), ("min", "others_lowest"), ("max", "others_highest")):
        found = others.agg(name).sort_index()
        pd.testing.assert_series_equal(found, rows[expected].sort_index(), rtol=1e-5, check_names=False)


def test_any_other_output_is_a_rival_of_an_image(audit: Audit, audited: Audited) -> None:
    _, artifacts = audited
    state = load_file(audit.weights)
    network = audit.network(state)
    network.fc = torch.nn.Identity()
    images, labels = audit.images("test")
    with torch.no_grad():
        activations = network(images).double()
    weight, bias = state["fc.weight"].double(), state["fc.bias"].double()
    decoder = load_file(artifacts["sae"].file("sae.safetensors"))["decoder"].double()
    table = artifacts["diagnose"].table("images.csv").set_index("image")
    grid = torch.linspace(0, 60, 6001, dtype=torch.float64)
    differs = 0

    def first_lost(rows: Tensor, unit: int, gated: Tensor) -> float:
        lost = (gated @ weight[rows].T + bias[rows]).argmax(dim=1) != (rows == unit).nonzero()[0, 0]
        return float(grid[lost.nonzero()[0, 0]]) if bool(lost.any()) else float("inf")

    for i, row in table.iterrows():
        unit = int(audit.units[labels[int(i)]])
        gates = (1 - grid[:, None] * decoder[:, int(row["latent"])].abs()).clamp_min(0)
        gated = gates * activations[int(i)]
        wanted = first_lost(torch.arange(OUTPUTS), unit, gated)
        if wanted < float("inf"):
            assert wanted - 0.0101 <= row["flip_exact"] <= wanted + 1e-4
        else:
            assert row["flip_exact"] >= 60
        differs += first_lost(audit.units, unit, gated) > wanted
    assert differs >= STRANGE  # with the audited outputs alone as rivals it would be another number


def test_the_runs_folder_has_each_edit_once(audited: Audited) -> None:
    folder, artifacts = audited
    there = {path.name: path.read_bytes() for path in artifacts["control"].file("edits").iterdir()}
    assert len(there) == len(CLASSES) + 1  # and the originals that they share
    assert {path.name: path.read_bytes() for path in (folder / "run" / "edits").iterdir()} == there
    listed = (folder / "run" / "index.html").read_text().count('href="edits/')
    assert listed == len(CLASSES)


@pytest.mark.usefixtures("no_figures")
def test_a_file_says_the_same_as_a_mapping(audit: Audit, audited: Audited, start: Start, tmp_path: Path) -> None:
    folder, artifacts = audited
    with (tmp_path / "outputs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["folder", "output"], *UNITS.items(), ["newt", 3]])
    again = start(folder, *audit.settings, f"data.outputs={tmp_path}/outputs.csv", *MORE, "finetune.mode=none")
    assert all(again[kind].reused and again[kind].digest == artifact.digest for kind, artifact in artifacts.items())


@pytest.mark.parametrize(("mode", "epochs", "rate"), [("probe", 2, 0.001), ("full", 30, 0.01)])
def test_training_maps_labels_to_their_outputs(
    audit: Audit, start: Start, tmp_path: Path, mode: str, epochs: int, rate: float
) -> None:
    artifacts = start(
        tmp_path,
        *audit.settings,
        BY_MAPPING,
        f"finetune.mode={mode}",
        f"finetune.epochs={epochs}",
        f"finetune.learning_rate={rate}",
        "stages=[finetune]",
    )
    state = load_file(artifacts["classifier"].file("model.safetensors"))
    original = load_file(audit.weights)
    assert state["fc.weight"].shape == (OUTPUTS, CHANNELS[-1])
    assert not torch.equal(state["fc.weight"], original["fc.weight"])
    history = artifacts["classifier"].table("history.csv")
    accuracy = audit.accuracy(state, "val")  # folders train, val and test: val selects
    best = history[history["split"] == "select"]["accuracy"].max()
    assert best == pytest.approx(sum(accuracy) / len(CLASSES))
    assert min(accuracy[1:]) > 0.5
