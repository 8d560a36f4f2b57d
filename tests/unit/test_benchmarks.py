"""The benchmark of trainings: what it measures, that it trains what it says, and the environments of its peers."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import import_module
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

from salve.types import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LOCAL = ("contender", "train_bare", "train_salve", "machine", "environments", "contenders", "results", "reaching")


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The benchmarks' own modules, which find each other by their folder."""
    for folder in (BENCHMARKS, BENCHMARKS / "peers"):
        monkeypatch.syspath_prepend(folder)
    yield {name: import_module(name) for name in LOCAL}
    for name in LOCAL:
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

    class Orders(contender.Line):  # type: ignore[name-defined]
        def __init__(self, *orders: dict[str, Any]) -> None:
            self.orders, self.steps, self.said = list(orders), [], []

        def receive(self) -> dict[str, Any]:
            return self.orders.pop(0)

        def took(self, steps: int, seconds: float) -> None:
            self.steps.append(steps)

        def say(self, **what: Any) -> None:
            self.said.append(what)

    made = []
    train, look = [{"train": 3}, {"train": 4}, {"measure": True}], {"look": True}
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


def test_an_environment_has_its_own_packages_and_this_one_s_torch(local: dict[str, ModuleType], tmp_path: Path) -> None:
    peer = wheel(tmp_path, "somepeer", requires="torch")
    make = local["environments"].environment
    python = make("somepeer", [str(peer)], folder=tmp_path)
    says = "import somepeer, torch; print(somepeer.HERE, torch.__file__)"
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
