"""On a CUDA GPU: what is done inside the network, edits of all methods, pages, and captures over ranks."""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salve.activations import load_captured
from salve.artifacts import Artifact, Store
from salve.backbones import find_site, graph_of
from salve.backbones.cut import Cut
from salve.editing.methods import METHODS, Change, Fitting, make_method
from salve.processes.ranks import Ranks, gathered
from salve.settings import TrainerSettings
from tests.gpu.conftest import DEVICE, NEEDS_IT, ON, Run
from tests.gpu.test_gpu import classifier, drawn
from tests.integration.commands import ranks_are_forks
from tests.unit.methods import TARGET, Drawn, fitting_at, network
from tests.unit.test_capture import Noise, captured, cut_at_last, no_progress
from tests.unit.test_graph import SIZE as drawn_size

pytestmark = NEEDS_IT

SIZE = 32
#: Sites whose gates this network shows although it is not trained: its blocks begin as identities.
TAILS = ("layer1.0.conv1", "layer4.0.downsample.1")
INSIDE = "layer4.0.conv2"

# -- tails


def hooked(model: nn.Module, readers: Sequence[str], gate: Tensor, images: Tensor) -> Tensor:
    """The logits with the site's channels scaled by forward hooks, without a tail."""
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, given: (given[0] * gate[:, None, None],))
        for path in readers
    ]
    try:
        return model(images)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", TAILS)
@torch.no_grad()
def test_a_tail_gives_the_logits_of_hooks(name: str) -> None:
    model, images = classifier().to(DEVICE), drawn(4, 3, SIZE, SIZE).to(DEVICE)
    graph, site = graph_of(model, SIZE), find_site(model, name, SIZE)
    tail = graph.tail(model, site, images)
    gate = torch.rand(site.width, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found = tail.gated(gate)
    assert found.device.type == ON
    expected = hooked(model, [reader.path for reader in site.readers], gate, images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(tail(tail.activations), model(images), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, model(images), atol=1e-2)


# -- edit methods


#: Those that train, whose steps part as roundings grow, and those that need the weights from before fine-tuning.
LEFT_OUT = ("task_arithmetic", "forget", "class_vector", "mapped_class_vector")


def fitting_on(device: torch.device, layer: str) -> Fitting:
    """As a stage makes it: the network and its images on the device, rows and SAE on the CPU."""
    fitting = fitting_at(network(), layer)
    model = copy.deepcopy(fitting.cut.model).to(device)
    graph = None if layer == "last" else graph_of(model, drawn_size)
    site = fitting.cut.site if graph is None else graph.sites[layer]
    images = Drawn(network())

    def on_device(numbers: Sequence[int] | None) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, labels in images(numbers):
            yield batch.to(device), labels.to(device)

    return replace(fitting, cut=Cut(model, site, fitting.cut.order, graph), images=on_device)


def said(change: Change, model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """What a change does: to weights, or to activations ``[N, 1, M]``; on the CPU."""
    if change.weights is not None:
        return {name: tensor.cpu() for name, tensor in change.weights().items()}
    assert change.activations is not None
    return {"activations": change.activations(rows.to(next(model.parameters()).device)).cpu()}


@pytest.mark.parametrize("layer", ["last", "second"])
@pytest.mark.parametrize("name", [name for name in METHODS if name not in LEFT_OUT])
def test_an_edit_is_the_cpus(name: str, layer: str) -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        fitting = fitting_on(device, layer)
        change = make_method(name).fit(fitting, TARGET).at(1.0)
        found.append(said(change, fitting.cut.model, fitting.rows[:40, None]))
    expected, on_device = found
    assert expected.keys() == on_device.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(on_device[key], tensor, rtol=1e-5, atol=1e-7)


# -- a run inside the network, and its pages


@pytest.fixture(scope="module")
def inside(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Artifact]]:
    folder = tmp_path_factory.mktemp("inside")
    methods = "compare.methods=[gate,leace,rank_one,head_bias]"
    given = (f"layer={INSIDE}", "sae=topk", methods, "compare.images=2", "compare.targets=2", "edit.images=2")
    return folder, run(folder, *given, "stages=[discover,validate,control,compare,audit,report]", "audit.labels=2")


def test_every_stage_runs_inside(inside: tuple[Path, dict[str, Artifact]]) -> None:
    made = inside[1]
    assert {"validate", "control", "compare", "audit"} <= made.keys()
    edits = made["compare"].table("edits.csv")
    assert set(edits["method"]) == {"gate", "leace", "rank_one", "head_bias"}
    assert edits[["before"]].notna().all().all()


def test_pages_are_written(inside: tuple[Path, dict[str, Artifact]]) -> None:
    folder = inside[0] / "run"
    for name in ("index.html", "explorer.html"):
        page = (folder / name).read_text(encoding="utf-8")
        assert page.rstrip().endswith("</html>")
        assert not re.search(r"[>\s]nan[<\s]|cuda:", page)


def test_captured_rows_inside_are_what_hooks_read(inside: tuple[Path, dict[str, Artifact]]) -> None:
    rows = load_captured(inside[1]["activations"].path, "test")
    assert rows.activations[:].isfinite().all()
    assert rows.activations[:].device.type == "cpu"


# -- ranks


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    """Two processes: on a GPU each, or on the CPU."""
    if ON == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("two ranks need two GPUs")
    with pytest.MonkeyPatch.context() as patch:
        if ON == "cpu":  # a process that has used CUDA cannot fork
            ranks_are_forks(patch)
        with gathered(TrainerSettings(ON, 2, "ddp_spawn", "32-true")) as ranks:
            yield ranks


def test_two_ranks_capture_what_one_does(two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salve.activations.capture.SHARD_ROWS", 3)
    made: list[Any] = []
    for name, ranks in (("one", Ranks(ON)), ("two", two)):
        cut = cut_at_last(classifier().to(DEVICE))
        artifact = captured(Store(tmp_path / name), cut, Noise(), ranks, no_progress)
        made.append(load_captured(artifact.path, "train"))
    assert torch.equal(made[0].labels, made[1].labels)
    torch.testing.assert_close(made[0].activations, made[1].activations, rtol=1e-4, atol=1e-5)


def test_a_capture_in_a_group_of_one_is_that_without(tmp_path: Path) -> None:
    made = []
    with gathered(TrainerSettings(ON, 1, "auto", "32-true")) as ranks:
        for name, one in (("alone", Ranks(ON)), ("gathered", ranks)):
            cut = cut_at_last(classifier().to(DEVICE))
            made.append(captured(Store(tmp_path / name), cut, Noise(), one, no_progress))
    assert (made[0].key, made[0].digest) == (made[1].key, made[1].digest)
