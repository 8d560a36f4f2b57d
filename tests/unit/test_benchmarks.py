"""The benchmark of trainings: what it measures, that it trains what it says, and the environments of its peers."""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import r2_score
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from salve.sae import Member, make_sae
from salve.sae.ensemble import Stack
from salve.types import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LOCAL = ("contender", "train_bare", "train_salve", "machine", "environments", "contenders", "results", "reaching")
#: The parts of the GPU check that are tested here, and the module that races trainings.
GPU = ("gpu", "gpu.budget", "gpu.carry", "gpu.check", "gpu.facts", "gpu.report", "gpu.suite", "gpu.work", "training")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The benchmarks' own modules, which find each other by their folder."""
    for folder in (BENCHMARKS, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(folder)
    yield {name: import_module(name) for name in LOCAL + GPU}
    for name in LOCAL + GPU:
        del sys.modules[name]


def cell(local: dict[str, ModuleType], **changed: Any) -> Any:
    """One that trains in no time."""
    settings = {"file": "", "width": 8, "dictionary_size": 16, "kind": "l1", "batch": 64, "steps": 7, "sparsity": 0.5}
    settings |= {"k": 3, "rate": 0.01, "seed": 0, "device": "cpu", "precision": "fp32", "matmul": "highest"}
    return local["contender"].Cell(**settings | changed)


@pytest.mark.parametrize("kind", ["l1", "topk"])
def test_fve_l0_and_loss_as_scikit_learn_and_a_loop_have_them(local: dict[str, ModuleType], kind: str) -> None:
    rows = 3 + torch.randn(2500, 8)  # more than a chunk, and a large mean
    latents = torch.randn(2500, 16).relu()
    weight = 0.3 * torch.randn(16, 8)  # columns of any norm
    place = {tuple(row.tolist()): number for number, row in enumerate(rows)}

    def encode(chunk: torch.Tensor) -> torch.Tensor:
        return latents[[place[tuple(row.tolist())] for row in chunk]]

    found = local["contender"].measure(encode, lambda z: 3 + z @ weight, rows, cell(local, kind=kind))
    rebuilt = 3 + latents @ weight
    assert found["fve"] == pytest.approx(r2_score(rows, rebuilt, multioutput="variance_weighted"))
    assert found["l0"] == pytest.approx(sum(sum(z > 0 for z in row) for row in latents.tolist()) / len(rows))
    # The latents of the same SAE with unit-norm columns; λ is 0.5 for L1.
    scaled = latents * torch.tensor([sum(x * x for x in column) ** 0.5 for column in weight.tolist()])
    price = 0.5 * float(scaled.sum()) / len(rows) if kind == "l1" else 0.0
    assert found["loss"] == pytest.approx(float((rows - rebuilt).square().sum()) / len(rows) + price, rel=1e-5)


def test_batches_are_every_row_once_an_epoch_in_another_order_each(local: dict[str, ModuleType]) -> None:
    batches = local["contender"].shuffled(torch.arange(10.0)[:, None], 5, seed=0)
    first, second = torch.cat(list(islice(batches, 2))), torch.cat(list(islice(batches, 2)))
    assert sorted(first.flatten().tolist()) == sorted(second.flatten().tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize("kind", ["l1", "topk"])
def test_the_trainer_makes_exactly_the_steps_that_were_ordered(local: dict[str, ModuleType], kind: str) -> None:
    """One batch is all rows, so that their order is of no matter: a bare loop must come to the same weights.

    The bare loop is also looked at on its way, which must not show.
    """
    contender, salve = local["contender"], local["train_salve"]
    rows = contender.Rows(torch.randn(64, 8), torch.randn(5, 8))

    class Orders(contender.Line):
        def __init__(self, *orders: dict[str, Any]) -> None:
            self.orders = list(orders)
            self.steps: list[int] = []
            self.said: list[dict[str, Any]] = []

        def receive(self) -> dict[str, Any]:
            return self.orders.pop(0)

        def took(self, steps: int, seconds: float) -> None:
            self.steps.append(steps)

        def say(self, **what: Any) -> None:
            self.said.append(what)

    made = []
    train: list[dict[str, Any]] = [{"train": 3}, {"train": 4}, {"measure": True}]
    look = {"look": True}
    for kind_of, orders in ((salve.Trained, train), (salve.Looped, [look, train[0], look, train[1], look, train[2]])):
        line, one = Orders(*orders), kind_of(cell(local, kind=kind), rows)
        line.look = one.look
        one.run(line)
        assert line.steps == [3, 4]
        assert not line.orders
        made.append(one.sae)
    for mine, other in zip(made[0].parameters(), made[1].parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    untrained, _ = salve.made(cell(local, kind=kind))
    assert not torch.allclose(untrained.encoder, made[0].encoder)
    assert len(line.said) == 3
    assert line.said[-1] == one.look()
    assert line.said[0] != line.said[-1]


def test_a_library_imports_what_its_training_never_calls(
    local: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nosuchlogger", sys)  # is taken away again afterwards
    local["contender"].leave_out("nosuchlogger")
    names: dict[str, Any] = {}
    exec("import nosuchlogger\nfrom nosuchlogger import Run\nclass Mine(Run): pass", names)
    assert isinstance(names["Mine"](), names["Run"])
    assert find_spec("nosuchlogger") is not None  # as transformers and accelerate ask
    assert not hasattr(names["nosuchlogger"], "__version__")


@pytest.mark.slow
def test_a_contender_answers_its_orders(local: dict[str, ModuleType], tmp_path: Path) -> None:
    file = tmp_path / "rows.safetensors"
    save_file({"train": torch.randn(256, 8), "held_out": torch.randn(20, 8)}, file)
    orders = [{"cell": vars(cell(local, file=str(file)))}, {"train": 5}, {"train": 2}, {"measure": True}]
    said = subprocess.run(
        [sys.executable, str(BENCHMARKS / "peers" / "train_bare.py")],
        input="".join(json.dumps(order) + "\n" for order in orders),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    mark = local["contender"].MARK
    ready, begun, *slices, measured = (json.loads(line.removeprefix(mark)) for line in said.splitlines())
    assert ready == {"torch": torch.__version__, "threads": 1}
    assert begun == {}
    assert [took["steps"] for took in slices] == [5, 2]
    assert all(took["seconds"] > 0 for took in slices)
    assert set(measured) == {"fve", "l0", "loss", "memory"}


def test_flops_are_those_that_torch_counts(local: dict[str, ModuleType]) -> None:
    encoder, decoder = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
    rows = torch.randn(32, 8)
    with FlopCounterMode(display=False) as counter:
        (rows - decoder(encoder(rows).relu())).square().sum().backward()
    flops = local["machine"].flops_per_sample
    assert flops(8, 16, "l1", 3) * len(rows) == counter.get_total_flops()
    # With all latents firing, TopK saves nothing but what is dense either way.
    assert flops(8, 16, "topk", 16) == flops(8, 16, "l1", 3)


def test_bytes_of_a_step_are_those_counted_by_hand(local: dict[str, ModuleType]) -> None:
    count = local["machine"].bytes_per_step
    matrix, parameters = 2 * 3, 2 * 2 * 3 + 3
    adam = parameters * (4 + 4 + 4 + 4 + 4 + 4 + 4)  # reads the parameter, its gradient and two moments; writes three
    gradients, normed, read = 4 * parameters, 3 * 4 * matrix, 3 * 4 * matrix
    rows, latents = 3 * 4 * 5 * 2, 5 * 3  # a batch of 5
    assert count(2, 3, 5, "l1", "fp32") == adam + gradients + normed + read + rows + 5 * 4 * latents
    assert count(2, 3, 5, "l1", "bf16") == adam + gradients + normed + read + rows + 5 * 2 * latents
    assert count(2, 3, 5, "topk", "fp32") == adam + gradients + normed + read + rows + 2 * 4 * latents


def test_flops_of_an_ensemble_are_those_of_its_members(local: dict[str, ModuleType]) -> None:
    stack = Stack({number: Member(make_sae("relu_l1", 8, 16), 0.5, number) for number in range(3)})
    with FlopCounterMode(display=False) as counter:
        stack.losses(torch.randn(3, 32, 8), 0).sum().backward()
    assert 3 * 32 * local["machine"].flops_per_sample(8, 16, "l1", 0) == counter.get_total_flops()


def test_a_race_ends_after_the_round_in_which_its_time_is_up(local: dict[str, ModuleType]) -> None:
    """The clock is past its end from the beginning: one round is run all the same, and nobody trains on."""
    contenders, orders = local["contenders"], list[dict[str, Any]]()

    class Counted(contenders.Child):
        def order(self, **what: Any) -> dict[str, Any]:
            orders.append(what)
            if "train" in what:
                return {"steps": what["train"], "seconds": 0.5}
            return {"fve": 0.5, "l0": 3.0, "loss": 1.0, "memory": 10} if "measure" in what else {}

    child = Counted(contenders.BARE, "fp32", facts={"torch": "", "threads": 1})
    [result] = local["training"].race([child], cell(local, steps=100), 5, 10, until=0.0)
    assert [what["train"] for what in orders if "train" in what] == [local["training"].WARM_UP, 10]
    assert result.rates == [10 * 64 / 0.5] == [result.rate]


def test_a_part_has_its_own_time_and_what_others_left(local: dict[str, ModuleType]) -> None:
    budget = local["gpu.budget"].Budget(100, {"first": 40, "second": 30, "third": 20})
    assert budget.limit("first", 0) == 50  # 10 to spare
    assert budget.limit("second", 25) == 55  # the first took 25
    assert budget.limit("second", 60) == 20  # the first was late
    assert budget.limit("third", 97) == 0  # too little to begin with
    planned = local["gpu.budget"].PLANNED
    assert sum(planned.values()) + local["gpu.budget"].RESERVE < 8 * 60


def test_only_what_is_missing_is_taken_from_carried_wheels(
    local: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry, wheels, target = local["gpu.carry"], tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    for name in ("torch", "carriedone"):  # the first is installed
        wheel(wheels, name)
    half = wheel(wheels, "carriedtwo")
    with zipfile.ZipFile(half, "a") as archive:  # one of its modules is there already
        archive.writestr("rich/__init__.py", "")
    assert [(one.name, one.version) for one in carry.unpack_missing(wheels, target)] == [
        ("carriedone", "1.0"),
        ("carriedtwo", "1.0"),
    ]
    assert sorted(path.name for path in target.glob("*.py")) == ["carriedone.py", "carriedtwo.py"]
    assert not (target / "rich").exists()
    monkeypatch.syspath_prepend(target)
    assert Path(import_module("carriedone").HERE).parent == target
    del sys.modules["carriedone"]
    assert carry.unpack_missing(wheels, tmp_path / "again") == []
    [torch_there] = [it for it in local["gpu.facts"].packages(target) if it["name"] == "torch"]
    assert torch_there == {"name": "torch", "version": torch.__version__.partition("+")[0], "from": "this Python"}


def test_a_checkout_has_a_version_though_it_is_not_installed(
    local: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "salve"\nversion = "1.2.3"\n')
    local["gpu.carry"].declare(BENCHMARKS.parent, tmp_path / "here")  # is installed where tests run
    assert not (tmp_path / "here").exists()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    local["gpu.carry"].declare(tmp_path, tmp_path / "site")
    assert metadata.version("salve") == "1.2.3"


def test_wheels_are_collected_if_they_are_pure_python(
    local: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry, stored = local["gpu.carry"], tmp_path / "stored"
    stored.mkdir()
    wheel(stored, "somepure")
    compiled = wheel(stored, "somecompiled")
    tag = "cp312-cp312-manylinux_2_17_x86_64"
    compiled.rename(compiled.with_name(compiled.name.replace("py3-none-any", tag)))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(stored), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    lacking = carry.collect(tmp_path / "carried", requirements=["somepure", "somecompiled"])
    assert [path.name for path in (tmp_path / "carried").iterdir()] == ["somepure-1.0-py3-none-any.whl"]
    [why] = lacking
    assert why.startswith("somecompiled was left out")
    monkeypatch.setattr(carry, "MOST", 10)
    with pytest.raises(SystemExit, match="MiB"):
        carry.collect(tmp_path / "carried", requirements=[])


def test_a_part_that_hangs_is_stopped_and_keeps_what_it_measured(
    local: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, record = tmp_path / "part.py", tmp_path / "record.jsonl"
    one = local["gpu.report"].Line("card", "title", "a way", "rows/s", [3.0, 1.0, 2.0], 4.0, 5.0, 6.0)
    local["gpu.report"].Record(record).add(one)
    script.write_text(
        "import sys, time\n"
        "print('begun', flush=True)\n"
        "open(sys.argv[-2], 'a').write('{\"line\": {\"par')\n"  # cut while it was written
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script)])
    given = argparse.Namespace(device="cpu", quick=True)
    log = local["gpu.check"].Log(tmp_path / "log")
    assert local["gpu.check"].start_part(given, "card", record, 2.0, log) == "stopped at its limit"
    assert (tmp_path / "log").read_text() == "[card] begun\n"
    lines, notes = local["gpu.report"].Record(record).read()
    assert (lines, notes) == ([one], {})
    assert lines[0].rate == 2.0


def test_a_gpu_check_writes_what_each_part_found(
    local: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, out = tmp_path / "part.py", tmp_path / "out"
    line = {
        "part": "card",
        "group": "Copies",
        "name": "a way",
        "unit": "rows/s",
        "rates": [3.0, 1.0, 2.0],
        "flops": 5e8,
    }
    peaks = {"fp32": 2e9, "bf16": 4e9, "bandwidth": 1e9}
    script.write_text(
        "import sys\n"
        "name, record = sys.argv[-3:-1]\n"
        f"said = [{json.dumps({'line': line})!r}, {json.dumps({'note': {'peaks': peaks}})!r}]\n"
        "open(record, 'w').write('\\n'.join(said) if name == 'card' else '')\n"
        "sys.exit(0 if name == 'card' else 3)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script)])
    given = argparse.Namespace(out=out, device="cpu", quick=True, minutes=8, parts=["card", "training"])
    assert local["gpu.check"].check(given, tmp_path / "site", time.monotonic()) == 1
    found = json.loads((out / "gpu_check.json").read_text())
    assert [(part["name"], part["ended"]) for part in found["parts"]] == [
        ("card", "done"),
        ("training", "failed (status 3)"),
    ]
    assert found["peaks"] == peaks
    assert [(one["rate"], one["peak_share"], one["memory"]) for one in found["lines"]] == [(2.0, 0.25, None)]
    page, log = (out / "gpu_check.md").read_text(), (out / "gpu_check.log").read_text()
    assert "| a way | 2 rows/s | 1 – 3 | 3 | – | 25.0% |" in page
    assert "| training | failed (status 3) |" in page
    assert "--- training: failed (status 3)" in log
    assert sorted(path.name for path in out.iterdir()) == ["gpu_check.json", "gpu_check.log", "gpu_check.md"]


def test_shares_and_ratios_of_the_gpu_check(local: dict[str, ModuleType]) -> None:
    report = local["gpu.report"]
    peaks = report.Peaks(fp32=1e12, bf16=4e12, bandwidth=2e9)
    bare = report.Line("p", "g", "bare", "rows/s", [100.0], flops=1e9, moved=1e6, reference=True)
    ours = report.Line("p", "g", "ours", "rows/s", [150.0, 250.0, 200.0], memory=3e9, flops=1e9, precision="bf16")
    gone = report.Line("p", "g", "gone", "rows/s", [], note="out of memory")
    group = [bare, ours, gone]
    shown = dict(zip(report.COLUMNS, report.cells(ours, group, peaks), strict=True))
    assert shown["rate"] == "200 rows/s"
    assert shown["slowest – fastest"] == "150 – 250"
    assert (shown["ratio"], shown["of bf16 peak"], shown["of its precision's peak"]) == ("2.00 ×", "5.0%", "5.0%")
    assert (shown["of bandwidth"], shown["GB"]) == ("–", "3.00")
    of_bare = dict(zip(report.COLUMNS, report.cells(bare, group, peaks), strict=True))
    assert (of_bare["of bf16 peak"], of_bare["of its precision's peak"]) == ("2.5%", "10.0%")
    assert of_bare["of bandwidth"] == "5.0%"
    assert report.cells(gone, group, peaks)[-1] == "out of memory"
    assert json.loads(json.dumps(report.finite({"a": [float("nan"), 1.0]}), allow_nan=False)) == {"a": [None, 1.0]}


@pytest.mark.parametrize(("name", "bf16"), [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("X", None)])
def test_rates_by_the_data_sheet(local: dict[str, ModuleType], name: str, bf16: float | None) -> None:
    found = local["gpu.facts"].nominal_of(name)
    assert (found and found.bf16) == bf16


def test_the_gpu_check_counts_its_tests(
    local: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, report = local["gpu.suite"], local["gpu.report"]
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    record = report.Record(tmp_path / "record.jsonl")
    work = local["gpu.work"].Work("tests", "cpu", True, 0.0, record, tmp_path / "scratch")
    work.scratch.mkdir()
    suite.run_tests(work)
    assert record.read()[1] == {"outcome": "there is no tests/gpu"}
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (tmp_path / "tests" / "gpu" / "test_it.py").write_text(
        "import os, pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('one', ['a b', 'c'])\n"
        "def test_passes(one): assert os.environ['SALVE_GPU_TESTS_ON'] == 'cpu'\n"
        "def test_fails(): assert False\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
    )
    with pytest.raises(SystemExit) as ended:
        suite.run_tests(work)
    assert ended.value.code == 1
    notes = record.read()[1]
    assert notes == {"outcome": "2 passed, 1 failed, 1 skipped", "failed": ["tests/gpu/test_it.py::test_fails"]}


def test_without_a_gpu_the_check_says_so_and_ends_with_2(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--out", str(tmp_path / "out")],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stdout.startswith("PyTorch finds no GPU here:")
    assert not (tmp_path / "out").exists()


def test_the_limit_is_time_for_arithmetic_and_time_for_adam(local: dict[str, ModuleType]) -> None:
    machine = local["machine"].Machine(fp32=1e9, bf16=4e9, bandwidth=2e9)
    parameters = 8 * 16 + 16 + 16 * 8
    seconds = 32 * 1280 / 4e9 + 28 * parameters / 2e9  # of a batch of 32
    assert local["machine"].most_samples(machine, "bf16", 1280, 8, 16, 32) == pytest.approx(32 / seconds)


def test_time_to_an_equal_loss(local: dict[str, ModuleType]) -> None:
    results, reaching = local["results"], local["reaching"]

    def of(name: str, rate: float, *losses: float) -> Any:
        looks = [results.Look(10 * number, 0.0, 0.0, loss) for number, loss in enumerate(losses, start=1)]
        return results.Result("8x16", "topk", 5, name, "fp32", rate=rate, looks=looks)

    slow, quick = of("sae-lens", 100.0, 9.0, 6.0, 5.0, 4.0), of("overcomplete", 500.0, 9.0, 7.0, 5.0, 5.0)
    ours = of("salve", 1000.0, 9.0, 8.0, 4.0, 3.0)
    peer, look = reaching.goal([ours, slow, quick])
    assert (peer, look.steps, look.loss) == (slow, 20, 6.0)  # not ours, and not the peer that is better later
    assert reaching.steps_to(ours.looks, 6.0) == 25  # halfway from 8 to 4
    assert reaching.steps_to(ours.looks, 9.5) == 10
    assert reaching.steps_to(ours.looks, 3.0) == 40
    assert reaching.steps_to(ours.looks, 2.9) != reaching.steps_to(ours.looks, 2.9)  # not a number
    assert reaching.seconds_to(ours, 6.0) == pytest.approx(25 * 5 / 1000)
    assert reaching.goal([ours]) is None


def wheel(folder: Path, name: str, requires: str = "") -> Path:
    """A package of one line."""
    file = folder / f"{name}-1.0-py3-none-any.whl"
    info, requires = f"{name}-1.0.dist-info", f"Requires-Dist: {requires}\n" if requires else ""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", "HERE = __file__\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return file


@pytest.mark.slow
def test_an_environment_has_its_own_packages_and_this_one_s_torch(local: dict[str, ModuleType], tmp_path: Path) -> None:
    peer = wheel(tmp_path, "somepeer", requires="torch")
    make = local["environments"].environment
    python = make("somepeer", [str(peer)], folder=tmp_path)
    # Where it would come from: its import takes seconds.
    says = "import somepeer, importlib.util as u; print(somepeer.HERE, u.find_spec('torch').origin)"
    said = subprocess.run([str(python), "-c", says], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    own, shared = said.split()
    assert Path(own).is_relative_to(tmp_path / "somepeer")
    assert shared == torch.__file__
    made = (tmp_path / "somepeer" / "done.json").stat().st_mtime_ns
    assert make("somepeer", [str(peer)], folder=tmp_path) == python  # found, not made again
    assert (tmp_path / "somepeer" / "done.json").stat().st_mtime_ns == made


def test_an_environment_that_cannot_be_made_is_said_and_not_taken_for_made(
    local: dict[str, ModuleType], tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="environment for nobody"):
            local["environments"].environment("nobody", [str(tmp_path / "no.whl")], folder=tmp_path)
