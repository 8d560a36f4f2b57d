"""The plan of docs/scale.md: its operations and bytes against counters and files, its table against the command's."""

import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from salve.artifacts import load_tensors, read_table
from salve.sae import make_sae, save_sae

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "scale.md"


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield import_module("scale")
    for name in ("scale", "machine", "measure"):
        sys.modules.pop(name, None)


@pytest.fixture
def small(scale: ModuleType) -> Any:
    """Three images of four positions, of which two are kept; six more; five SAEs of two steps."""
    sizes = {"images": 3, "held_out": 6, "positions": 4, "kept": 2, "width": 8, "size": 16, "k": 2}
    return scale.Plan(**sizes, forward=100.0, kind="l1", steps=2, batch=5, saes=5, host=0)


def counted(work: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return int(counter.get_total_flops())


def by_part(scale: ModuleType, plan: Any) -> dict[str, Any]:
    return {cost.part: cost for cost in scale.costs(plan)}


def test_operations_are_those_that_a_counter_counts(scale: ModuleType, small: Any) -> None:
    sae, found = make_sae("relu_l1", 8, 16, torch.Generator().manual_seed(0)), by_part(scale, small)
    kept, held_out = torch.randn(3 * 2, 8), torch.randn(6 * 2, 8)
    measured = counted(lambda: sae.encode(kept)) + counted(lambda: sae(held_out))
    assert found["measuring"].host == 5 * measured
    everywhere = torch.randn(3 * 4, 8)
    assert found["reading latents"].host == 5 * counted(lambda: sae.encode(everywhere))
    assert found["reading latents"].device == 5 * 3 * 100
    assert found["capture"].device == 9 * 100
    rows = torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter:
        sae.losses(rows, sae.run(rows), 0.1).sum().backward()
    assert found["training"].device == 5 * 2 * counter.get_total_flops()


def test_bytes_are_those_of_files(scale: ModuleType, small: Any, tmp_path: Path) -> None:
    save_sae(tmp_path / "a.safetensors", make_sae("relu_l1", 8, 16))
    tensors = load_tensors(tmp_path / "a.safetensors")
    found = by_part(scale, small)
    assert found["training"].written == 5 * sum(tensor.nbytes for tensor in tensors.values())
    assert found["capture"].written == torch.empty(9 * 2, 8).nbytes
    assert found["training"].read == 5 * 2 * torch.empty(5, 8).nbytes  # each step's rows, from disk
    in_memory = by_part(scale, replace(small, host=2 * torch.empty(9 * 2, 8).nbytes))
    assert in_memory["training"].read == 5 * torch.empty(9 * 2, 8).nbytes


def test_at_a_vector_the_network_does_not_run_again(scale: ModuleType, small: Any) -> None:
    found = by_part(scale, replace(small, positions=1, kept=1))
    assert found["reading latents"].device == 0
    assert found["reading latents"].read == 5 * torch.empty(3, 8).nbytes


def test_hours(scale: ModuleType) -> None:
    rates = scale.Rates("round", forward=10.0, train=100.0, encode=2.0)
    hour = 3600.0
    assert scale.Cost("training", 800 * hour, 0, 0, 0).hours(rates, 4, 1) == pytest.approx(2)
    assert scale.Cost("capture", 80 * hour, 0, 0, 0).hours(rates, 4, 1) == pytest.approx(2)
    assert scale.Cost("measuring", 0, 48 * hour, 0, 0).hours(rates, 4, 3) == pytest.approx(2)


def test_the_network_takes_the_operations_that_the_plan_says(scale: ModuleType) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model("vit_base_patch16_224")
        image = torch.empty(1, 3, 224, 224)
    assert scale.Plan().forward == pytest.approx(counted(lambda: model(image)), rel=0.01)
    assert scale.Plan().positions == model.pos_embed.shape[1]
    assert scale.Plan().width == model.embed_dim


def test_the_tables_of_the_page_are_the_commands(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"<!-- scale:(.*?) -->\n(.*?)<!-- end -->", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for arguments, shown in blocks:
        monkeypatch.setattr(sys, "argv", ["scale.py", *shlex.split(arguments)])
        scale.main()
        assert shown.strip() == capsys.readouterr().out.strip(), f"python benchmarks/scale.py {arguments}"


def test_hours_of_a_capture_follow_from_its_rate(scale: ModuleType) -> None:
    for row in read_table(ROOT / "docs" / "paper" / "data" / "scale-capture.csv").itertuples():
        assert row.images == scale.Plan().images
        assert row.hours == pytest.approx(row.images * row.seconds_per_image / 3600 / row.cores, rel=1e-3)
