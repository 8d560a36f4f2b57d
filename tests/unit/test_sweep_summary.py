"""A sweep's table, pictures and list of what is missing, from made-up runs on disk."""

import csv
import itertools
import json
import math
import re
import shutil
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import yaml
from filelock import FileLock
from matplotlib.figure import Figure
from rich.console import Console

from salve.artifacts import write_record, write_table
from salve.integrity import sealed
from salve.report.metrics import run_metrics
from salve.report.names import short_names, with_values
from salve.results.run import data_name
from salve.sweep import SweepSummary, print_summary, summarise_sweep
from salve.sweep.cli import main
from salve.sweep.figures import ALPHA_FLIP, SELECTIVITY, against_knob, averaged, fve_against_l0, pareto_front
from salve.types import UserError

LAMBDAS, SIZES, SEEDS = (0.1, 1.0, 10.0), (64, 256), (0, 1, 2)


def config(**changes: Any) -> dict[str, Any]:
    """Settings as a run's config.yaml has them; ``sae__sparsity=2.0`` changes one."""
    settings: dict[str, Any] = {
        "name": "quickstart",
        "stages": ["discover", "control"],
        "layer": "last",
        "seed": 0,
        "output_dir": "elsewhere",
        "data": {"_target_": "salve.data.ConceptsData", "batch_size": 32, "num_workers": 0},
        "backbone": {"library": "timm", "name": "resnet10t", "weights": "random", "args": {}},
        "sae": {"variant": "linear_l1", "dictionary_size": 64, "sparsity": 5.0, "k": None, "seed": 0, "ensemble": 1},
        "edit": {"alpha": [0, 1, 2], "scale": "unit"},
        "trainer": {"accelerator": "cpu"},
        "logger": {"kind": "csv"},
        "sweep": {"name": "lambda", "runs": []},
    }
    for name, value in changes.items():
        *path, last = name.split("__")
        part = settings
        for step in path:
            part = part[step]
        part[last] = value
    return settings


class Sweep:
    """A sweep's folder, written as runs leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, dict[str, Any]()
        folder.mkdir(parents=True)

    def plan(self, **swept: Any) -> str:
        key = f"{len(self.runs):012x}"
        self.runs[key] = {"swept": {name.replace("__", "."): value for name, value in swept.items()}}
        write_record(self.folder / "sweep.json", {"name": self.folder.name, "runs": self.runs})
        return key

    def finish(self, metrics: Mapping[str, Any], also: Mapping[str, Any] | None = None, **swept: Any) -> str:
        key = self.plan(**swept)
        run = self.folder / key
        run.mkdir()
        settings = config(**{**swept, **(also or {})})
        (run / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        write_record(run / "metrics.json", metrics)
        write_record(run / "manifest.json", sealed({"artifacts": {}, "files": {}}))
        return key


def measured(sparsity: float, size: int, seed: int) -> dict[str, Any]:
    """Numbers that depend on all three, none by chance."""
    return {
        "test_accuracy": 0.8,
        "select_accuracy": 0.9,
        "fve": 0.1,
        "select_fve": 0.9 - 0.02 * sparsity + 0.0001 * size + 0.01 * seed,
        "l0": 3.0,
        "select_l0": size / (1 + sparsity) + seed,
        "separating": 6,
        "separating_low": 4,
        "separating_high": 9,
        "select_separating": 7,
        "classes": 10,
        "selectivity": 0.93 - 0.02 * sparsity,
        "select_selectivity": 0.5 + 0.02 * sparsity + 0.01 * seed**2,
        "alpha_flip_median": None if sparsity < 1 and size == 64 else 2.0 + sparsity + seed,
        "alpha_flip_infinite": 0.7 if sparsity < 1 and size == 64 else 0.1,
    }


@pytest.fixture
def grid(tmp_path: Path) -> Sweep:
    """λ × dictionary size × seed; the SAE's seed follows the run's."""
    sweep = Sweep(tmp_path / "grid")
    for sparsity, size, seed in itertools.product(LAMBDAS, SIZES, SEEDS):
        swept = {"sae__sparsity": sparsity, "sae__dictionary_size": size, "seed": seed}
        sweep.finish(measured(sparsity, size, seed), {"sae__seed": seed}, **swept)
    return sweep


def shown(summary: SweepSummary, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        print_summary(summary, console)
    return console.export_text()


# -- the page


@pytest.mark.usefixtures("no_figures")
def test_every_run_is_a_point_that_says_its_settings_and_leads_to_its_page(grid: Sweep) -> None:
    first, second, *_ = grid.runs
    (grid.folder / first / "index.html").write_text("its page")
    grid.finish(measured(1.0, 64, 9), {"sae__seed": 9}, sae__sparsity=1.0, layer="<b>x")
    page = ElementTree.fromstring(html_of(summarise_sweep(grid.folder).page))
    spaced = "{http://www.w3.org/2000/svg}"
    points = [node for node in page.iter() if node.tag.removeprefix(spaced) in ("a", "g") and node.get("aria-label")]
    assert len(points) == 2 * len(grid.runs)  # two charts
    said = {str(node.get("aria-label")).split(":")[0]: node.get("href") for node in points}
    assert said.pop("layer last, dictionary_size 64, sparsity 0.1, seed 0") == f"{first}/index.html"
    assert set(said.values()) == {None}
    assert "layer <b>x, dictionary_size 64, sparsity 1, seed 0" in said
    rows = [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in page.iter("tr")][1:]
    by_run = {row[0].split()[1]: row[1:] for row in rows}
    assert set(by_run) == set(grid.runs)
    known = measured(*grid.runs[second]["swept"].values())
    assert by_run[second][:4] == ["last", "64", "0.1", "1"]
    assert by_run[second][5] == f"{100 * known['select_fve']:.1f} %"


def html_of(path: Path) -> str:
    """A page as XML: its only elements without an end are ``meta``."""
    text = path.read_text(encoding="utf-8").replace("<!doctype html>", "")
    return re.sub(r"<meta[^>]*>", "", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))


# -- the table


@pytest.mark.usefixtures("no_figures")
def test_the_table_has_a_row_per_run_and_its_settings_and_measures(grid: Sweep) -> None:
    summary = summarise_sweep(grid.folder)
    with summary.csv.open(encoding="utf-8", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert set(rows) == set(grid.runs)
    for key, entry in grid.runs.items():
        sparsity, size, seed = entry["swept"].values()
        row = rows[key]
        assert (float(row["sae.sparsity"]), int(row["sae.dictionary_size"])) == (sparsity, size)
        assert (int(row["seed"]), int(row["sae.seed"])) == (seed, seed)
        assert (row["backbone.name"], row["layer"], row["data"]) == ("resnet10t", "last", "concepts")
        assert row["sae.variant"] == "linear_l1"
        assert row["sae.k"] == ""
        for name, value in measured(sparsity, size, seed).items():
            assert row[name] == "" if value is None else float(row[name]) == pytest.approx(value, abs=1e-15)
    # Settings that are the same in all runs, and not of the core, stay out.
    assert not {"edit.scale", "stages", "output_dir", "backbone.weights"} & set(summary.table)


def test_what_varies_is_a_column_lists_included_and_what_says_how_it_ran_is_not(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    sweep.finish({"fve": 0.5}, {"trainer__accelerator": "gpu", "data__num_workers": 4}, edit__alpha=[0, 1])
    sweep.finish({"fve": 0.6}, edit__alpha=[0, 2])
    summary = summarise_sweep(sweep.folder)
    assert summary.table["edit.alpha"].tolist() == ["[0,1]", "[0,2]"]
    assert summary.varying == ("edit.alpha",)
    assert not {"trainer.accelerator", "data.num_workers"} & set(summary.table)


def test_a_setting_of_the_trainer_that_changes_results_is_a_column(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    for value, accelerator in ((0.5, "cpu"), (2.0, "gpu")):
        sweep.finish({"fve": 0.5}, {"trainer__accelerator": accelerator}, trainer__gradient_clip_val=value)
    summary = summarise_sweep(sweep.folder)
    assert summary.table["trainer.gradient_clip_val"].tolist() == [0.5, 2.0]
    assert summary.varying == ("trainer.gradient_clip_val",)


def test_a_swept_group_shows_as_its_main_setting_and_not_as_all_that_comes_with_it(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    for name, library in (("resnet10t", "timm"), ("vit_b_16", "torchvision")):
        for layer in ("last", "layer3"):
            also = {"backbone__name": name, "backbone__library": library, "layer": layer}
            key = sweep.finish({"fve": 0.5}, also)
            sweep.runs[key]["swept"] = {"backbone": name, "layer": layer}
    write_record(sweep.folder / "sweep.json", {"name": "s", "runs": sweep.runs})
    summary = summarise_sweep(sweep.folder)
    assert summary.varying == ("backbone.name", "layer")
    assert "backbone.library" in summary.table


def test_it_says_what_is_missing_and_why(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    sweep.finish(measured(1.0, 64, 0), sae__sparsity=1.0)
    failed, running, killed, unreadable, fresh = (sweep.plan(sae__sparsity=x) for x in (2.0, 3.0, 4.0, 5.0, 6.0))
    for key in (failed, running, killed, unreadable):
        (sweep.folder / key).mkdir()
    write_record(sweep.folder / failed / "failure.json", {"reason": "The disk is full.", "kind": "OSError"})
    for key in (running, killed):
        write_record(sweep.folder / key / "running.json", {"pid": 1, "host": "node"})
    (sweep.folder / ".locks").mkdir()
    (sweep.folder / ".locks" / f"{killed}.lock").touch()
    files = {"config.yaml": "0" * 64}
    write_record(sweep.folder / unreadable / "manifest.json", sealed({"artifacts": {}, "files": files}))
    with FileLock(sweep.folder / ".locks" / f"{running}.lock"):
        summary = summarise_sweep(sweep.folder)
    states = {run.key: run.state for run in summary.sweep}
    assert [states[key] for key in (failed, running, killed, fresh)] == [
        "failed",
        "running",
        "interrupted",
        "not begun",
    ]
    assert states[unreadable] == "failed"
    assert len(summary.table) == 1
    text = shown(summary, 100)
    assert "1 of 6 planned runs finished; 2 failed; 1 running; 1 interrupted; 1 not begun." in text
    assert f"failed  {failed}  sparsity=2: The disk is full." in text
    assert "config.yaml" in next(line for line in text.splitlines() if unreadable in line)
    # The lock was only looked at: its run can still be started.
    FileLock(sweep.folder / ".locks" / f"{running}.lock").acquire(timeout=0).lock.release()


def test_nothing_finished_is_a_summary_too(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    sweep.plan(sae__sparsity=1.0)
    summary = summarise_sweep(sweep.folder)
    assert (len(summary.table), summary.figures) == (0, ())
    assert set(summary.left_out) == {"fve-l0", "selectivity-sparsity", "alpha-flip-sparsity"}
    assert "0 of 1 planned run finished; 1 not begun." in shown(summary, 80)


def test_a_moved_folder_reads_the_same(grid: Sweep, tmp_path: Path) -> None:
    before = summarise_sweep(grid.folder)
    files = {
        p.name: p.read_bytes() for p in [before.csv, *before.figures, *(p.with_suffix(".svg") for p in before.figures)]
    }
    moved = tmp_path / "else" / "where"
    shutil.copytree(grid.folder, moved, ignore=shutil.ignore_patterns("figures", "sweep.csv"))
    shutil.rmtree(grid.folder)
    after = summarise_sweep(moved)
    assert {path.name for path in after.figures} == {path.name for path in before.figures}
    assert len(files) == 1 + 2 * 3
    for name, content in files.items():
        assert next(moved.rglob(name)).read_bytes() == content


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_fits_and_leaves_no_run_out(grid: Sweep, width: int) -> None:
    text = shown(summarise_sweep(grid.folder), width)
    table = text.split("18 of 18")[0].splitlines()
    assert max(map(len, table)) <= width
    rows = [line.split() for line in table if "7/10" in line]
    assert len(rows) == 18
    # Size, λ, seed; the SAE's seed, which follows the run's, is not repeated.
    expected = [[str(d), f"{x:g}", str(s)] for d in SIZES for x in LAMBDAS for s in SEEDS]
    assert [row[1:4] for row in rows] == expected
    assert rows[0][4:] == ["90.0", "90.4", "58.2", "7/10", "+50.2"]
    assert "All of select images" in text
    # What select prefers is the largest λ and seed; test, where it is the worst, says so of it alone.
    best = next(key for key, entry in grid.runs.items() if list(entry["swept"].values()) == [10.0, 64, 2])
    said = " ".join(text.split()).replace("\u00a0", " ")
    assert f"Run {best} has the highest selectivity there." in said
    assert "On test images, which chose nothing: accuracy 80.0 %, FVE 10.0 %, L0 3, separates 6/10 (4–9)" in said
    assert said.count("+73.0") == 1
    assert "+91.0" not in said


def test_three_hundred_runs_take_seconds(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    for i, size in itertools.product(range(30), (32, 64)):
        for seed in range(5):
            key = f"{len(sweep.runs):012x}"
            sweep.runs[key] = {"swept": {"sae.sparsity": 0.1 * 1.3**i, "sae.dictionary_size": size, "seed": seed}}
            run = sweep.folder / key
            run.mkdir()
            settings = config(sae__sparsity=0.1 * 1.3**i, sae__dictionary_size=size, seed=seed)
            (run / "config.yaml").write_text(json.dumps(settings))
            write_record(run / "metrics.json", measured(0.1 * 1.3**i, size, seed))
            write_record(run / "manifest.json", sealed({"artifacts": {}, "files": {}}))
    write_record(sweep.folder / "sweep.json", {"name": "s", "runs": sweep.runs})
    start = time.process_time()
    assert len(summarise_sweep(sweep.folder).table) == 300
    assert time.process_time() - start < 10


# -- the pictures


def drawn(figure: Figure | str) -> dict[str, list[tuple[float, float]]]:
    """By label in the legend, the points of its line (one panel)."""
    assert isinstance(figure, Figure)
    names = [text.get_text() for text in figure.legends[0].get_texts()] if figure.legends else [""]
    axes: Any
    (axes,) = (axes for axes in figure.axes if axes.get_visible())
    lines = [bars.lines[0] for bars in axes.containers]
    return {name: list(zip(*map(list, line.get_data()), strict=True)) for name, line in zip(names, lines, strict=True)}


def test_selectivity_against_lambda_is_the_mean_over_seeds_in_points(grid: Sweep) -> None:
    summary = summarise_sweep(grid.folder)
    figure = against_knob(summary.table, summary.varying, "sae.sparsity", SELECTIVITY)
    found = drawn(figure)
    assert set(found) == {"dictionary_size 64", "dictionary_size 256"}
    for name, size in (("dictionary_size 64", 64), ("dictionary_size 256", 256)):
        means = [statistics.mean(100 * measured(x, size, s)["select_selectivity"] for s in SEEDS) for x in LAMBDAS]
        assert found[name] == [(x, pytest.approx(mean)) for x, mean in zip(LAMBDAS, means, strict=True)]
    assert isinstance(figure, Figure)
    axes: Any
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    spread = statistics.stdev(100 * measured(1.0, 64, s)["select_selectivity"] for s in SEEDS)
    segment = axes.containers[0].lines[2][0].get_segments()[1]  # the bar at λ = 1
    assert segment[1, 1] - segment[0, 1] == pytest.approx(2 * spread)
    assert "standard deviation over seeds" in " ".join(figure.get_supxlabel().split())


def test_an_infinite_alpha_flip_stands_at_the_edge_and_not_in_the_line(grid: Sweep) -> None:
    summary = summarise_sweep(grid.folder)
    figure = against_knob(summary.table, summary.varying, "sae.sparsity", ALPHA_FLIP)
    found = drawn(figure)["dictionary_size 64"]
    assert math.isnan(found[0][1])
    assert [y for _, y in found[1:]] == [pytest.approx(2 + x + 1) for x in LAMBDAS[1:]]
    assert isinstance(figure, Figure)
    lines: Any = figure.axes[0].lines
    hollow = [line for line in lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_xdata()) for line in hollow] == [[0.1]]
    assert "∞" in figure.get_supxlabel()


def test_fve_against_l0_has_a_point_per_configuration_and_the_front(grid: Sweep) -> None:
    summary = summarise_sweep(grid.folder)
    figure = fve_against_l0(summary.table, summary.varying)
    found = drawn(figure)
    points = []
    for size in SIZES:
        values = [[measured(x, size, s) for s in SEEDS] for x in LAMBDAS]
        means = sorted(
            (statistics.mean(m["select_l0"] for m in group), statistics.mean(m["select_fve"] for m in group))
            for group in values
        )
        points += means
        assert found[f"dictionary_size {size}"] == [(pytest.approx(x), pytest.approx(y)) for x, y in means]
    front = sorted(p for p in points if not any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points))
    assert isinstance(figure, Figure)
    lines: Any = figure.axes[0].lines
    (step,) = (line for line in lines if line.get_drawstyle() == "steps-post")
    assert list(zip(*map(list, step.get_data()), strict=True)) == [
        (pytest.approx(x), pytest.approx(y)) for x, y in front
    ]


def test_backbones_are_side_by_side_and_topk_is_drawn_against_k(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    for name in ("resnet10t", "vit_b_16"):
        for sparsity in (1.0, 2.0):
            sweep.finish(measured(sparsity, 64, 0), backbone__name=name, sae__sparsity=sparsity)
        for k in (2, 4):
            swept: dict[str, Any] = {"sae__sparsity": 0.0, "sae__k": k, "sae__variant": "topk"}
            sweep.finish(measured(k, 64, 0), backbone__name=name, **swept)
    summary = summarise_sweep(sweep.folder)
    assert {path.stem for path in summary.figures} == {
        *("fve-l0", "selectivity-sparsity", "selectivity-k", "alpha-flip-sparsity", "alpha-flip-k")
    }
    figure = against_knob(summary.table, summary.varying, "sae.k", SELECTIVITY)
    assert isinstance(figure, Figure)
    assert [axes.get_title("left") for axes in figure.axes] == ["resnet10t", "vit_b_16"]
    axes: Any
    for axes in figure.axes:
        assert [list(bars.lines[0].get_xdata()) for bars in axes.containers] == [[2, 4]]
        assert axes.get_xscale() == "linear"


@pytest.mark.parametrize(
    ("metrics", "reasons"),
    [
        (
            {"select_fve": 0.5, "select_l0": 3.0},
            {"fve-l0": "fewer than two configurations", "selectivity-sparsity": "not known"},
        ),
        (
            {"select_selectivity": 0.5, "fve": 0.5, "l0": 3.0},
            {"fve-l0": "fewer than two", "selectivity-sparsity": "does not vary"},
        ),
        ({"alpha_flip_median": None, "alpha_flip_infinite": 0.9}, {"alpha-flip-sparsity": "does not vary"}),
    ],
)
def test_a_picture_whose_axes_do_not_vary_is_left_out_with_the_reason(
    tmp_path: Path, metrics: dict[str, Any], reasons: dict[str, str]
) -> None:
    sweep = Sweep(tmp_path / "s")
    for seed in (0, 1):
        sweep.finish(metrics, seed=seed)
    (sweep.folder / "figures").mkdir()
    stale = sweep.folder / "figures" / "fve-l0.png"
    stale.touch()
    summary = summarise_sweep(sweep.folder)
    assert summary.figures == ()
    for name, reason in reasons.items():
        assert reason in summary.left_out[name]
    assert "No figure" not in shown(summary, 80)
    assert not stale.exists()  # a picture of runs that are no longer what they were
    sweep.finish(metrics, seed=0, layer="other")
    summary = summarise_sweep(sweep.folder)
    assert summary.left_out
    assert all(f"No figure {name}: " in shown(summary, 80) for name in summary.left_out)


def test_alpha_flip_that_is_infinite_everywhere_is_no_picture(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path / "s")
    for sparsity in (1.0, 2.0):
        sweep.finish({"alpha_flip_median": None, "alpha_flip_infinite": 0.9}, sae__sparsity=sparsity)
    summary = summarise_sweep(sweep.folder)
    assert "infinite in every run" in summary.left_out["alpha-flip-sparsity"]


def test_the_front_is_what_nothing_dominates() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        cost, gain = random.integers(0, 8, (2, 12)).astype(float)
        cost[0] = gain[1] = np.nan
        expected = {
            (cost[i], gain[i])
            for i in range(2, 12)
            if not any(
                cost[j] <= cost[i] and gain[j] >= gain[i] and (cost[j], gain[j]) != (cost[i], gain[i])
                for j in range(2, 12)
            )
        }
        front = pareto_front(cost, gain)
        assert [(cost[i], gain[i]) for i in front] == sorted(expected)


def test_averages_leave_missing_values_out_and_keep_infinite_ones() -> None:
    table = pd.DataFrame({"d": [1, 1, 2, 2, 3], "m": [1.0, np.nan, 2.0, np.inf, 5.0]})
    found = averaged(table, ["d"], ["m"])
    assert found["m"].tolist() == [1.0, np.inf, 5.0]
    assert found["m_sd"].isna().all()


# -- names


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["sae.sparsity", "sae.seed", "seed", "backbone.name"]) == {
        **{"sae.sparsity": "sparsity", "sae.seed": "sae.seed", "seed": "seed", "backbone.name": "backbone"}
    }
    assert short_names(["a.x.y", "b.x.y", "y"]) == {"a.x.y": "a.x.y", "b.x.y": "b.x.y", "y": "y"}
    values = {"sae.sparsity": 2.0, "sae.dictionary_size": 64, "edit.alpha": [0, 1], "sae.centre": True}
    assert with_values(values) == "sparsity=2 dictionary_size=64 alpha=[0,1] centre=true"
    assert data_name(config()) == "concepts"


# -- the command


def test_the_command_writes_prints_and_explains_itself(grid: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(grid.folder)]) == 0
    assert "18 of 18 planned runs finished." in capsys.readouterr().out
    assert {path.name for path in (grid.folder / "figures").iterdir()} == {
        f"{name}.{kind}"
        for name in ("fve-l0", "selectivity-sparsity", "alpha-flip-sparsity")
        for kind in ("png", "svg")
    }
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "sweep.csv" in text
    assert "salve-sweep outputs/sweeps/" in text


def test_a_command_that_is_told_to_end_leaves_nothing_half_written(
    grid: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(_: Any, file: Path, **options: Any) -> None:
        Path(file).write_text("half")
        signal.raise_signal(signal.SIGINT)

    for writer in ("pandas.DataFrame.to_csv", "salve.report.style.FigureCanvasSVG.print_svg"):
        before = {path: path.read_bytes() for path in grid.folder.rglob("*") if path.is_file()}
        with monkeypatch.context() as patch:
            patch.setattr(writer, told)
            with pytest.raises(SystemExit) as left:
                main([str(grid.folder)])
        assert left.value.code == 130
        assert capsys.readouterr().err == "salve-sweep: stopped; the same command writes everything anew.\n"
        after = {path: path.read_bytes() for path in grid.folder.rglob("*") if path.is_file()}
        assert {path.name for path in after.keys() - before.keys()} <= {"sweep.csv"}
        assert b"half" not in after.values()
        assert not [path for path in grid.folder.rglob("*") if path.is_dir() and path.name.startswith(".")]


@pytest.mark.parametrize(
    ("content", "said"), [(None, "holds no sweep.json"), ("[]", "cannot be read"), ("{", "cannot be read")]
)
def test_a_folder_that_is_no_sweep_is_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "sweep.json").write_text(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("salve-sweep: ")
    assert said in error
    assert error.count("\n") == 1
    with pytest.raises(UserError):
        summarise_sweep(tmp_path)


# -- the numbers of one run


SAE_NUMBERS = {
    **{"fve": 0.8, "cosine": 0.95, "l0": 12.0, "dead_fraction": 0.25, "almost_dead_fraction": 0.1},
    **{"dense_fraction": 0.02, "downstream_accuracy": 0.88, "downstream_kl": 0.03, "kl_recovered_from_mean": 0.97},
    **{"select_fve": 0.81, "select_l0": 12.5, "select_downstream_accuracy": 0.87},
}


def write_stages(root: Path, flips: Sequence[float]) -> dict[str, Path]:
    paths = {kind: root / kind for kind in ("classifier", "sae", "features", "control", "diagnose")}
    for path in paths.values():
        path.mkdir(parents=True)
    write_record(paths["classifier"] / "classifier.json", {"classes": ["a", "b", "c"]})
    history = [(0, "train", 0.9), (0, "select", 0.6), (1, "train", 0.95), (1, "select", 0.7), (2, "select", 0.65)]
    write_table(
        paths["classifier"] / "history.csv",
        pd.DataFrame([(e, s, 1.0, a) for e, s, a in history], columns=["epoch", "split", "loss", "accuracy"]),
    )
    original = {"original_accuracy": 0.89, "select_original_accuracy": 0.91, "kl_recovered_from_zero": None}
    write_record(paths["sae"] / "sae.json", SAE_NUMBERS | original)
    latents = pd.DataFrame({"latent": [0, 1, 2], "purity": [0.5, math.nan, 1.0]})  # the second never fires
    write_table(paths["features"] / "latents.csv", latents)
    concepts = pd.DataFrame({"concept": ["x", "y", "z"], "auroc": [0.7, 0.9, math.nan]})  # the last is in no image
    write_table(paths["features"] / "concepts.csv", concepts)
    classes = pd.DataFrame({"class": ["a", "b", "c"], "test_images": [10, 10, 20], "test_accuracy": [1.0, 0.5, 0.75]})
    write_table(paths["features"] / "classes.csv", classes)
    columns = ["target", "accuracy_before", "accuracy_after", "others_mean_change", "alpha_used", "select_separates"]
    rows = [("a", 1.0, 0.0, 0.02, 4.0, True), ("b", 0.5, 0.3, 0.1, 20.0, True)]
    rows += [("a + b", 0.75, 0.0, 0.5, 9.0, True)]  # a set of classes
    summary = pd.DataFrame(rows, columns=columns)
    select = {"select_accuracy_before": 0.9, "select_accuracy_after": 0.1, "select_others_mean_change": [0.0, 0.2, 0.7]}
    write_table(paths["control"] / "summary.csv", summary.assign(**select))
    verdict = {"judged": 2, "separates": 1, "separates_low": 0, "separates_high": 2, "separates_published": 2}
    limits = {"accuracy": 0.05, "others_mean_change": 0.03, "others_worst_loss": 0.1}
    write_record(paths["control"] / "verdict.json", verdict | {"confidence": 0.95, "limits": limits})
    images = pd.DataFrame({"class": "a", "correct": [True] * len(flips) + [False], "flip_exact": [*flips, 0.0]})
    write_table(paths["diagnose"] / "images.csv", images)
    return paths


def test_the_numbers_of_a_run_are_those_of_its_stages(tmp_path: Path) -> None:
    found = run_metrics(write_stages(tmp_path, [1.0, 3.0, 2.0, math.inf]))
    assert found == {
        "test_accuracy": pytest.approx((10 * 1.0 + 10 * 0.5 + 20 * 0.75) / 40),
        "select_accuracy": 0.91,
        **SAE_NUMBERS,
        **{"purity": 0.75, "concept_auroc": pytest.approx(0.8)},
        **{"separating": 1, "separating_low": 0, "separating_high": 2, "separating_published": 2, "classes": 2},
        **{"select_separating": 2, "select_on_target_drop": pytest.approx(0.8)},
        **{"select_off_target_drift": pytest.approx(0.1), "select_selectivity": pytest.approx(0.7)},
        "on_target_drop": pytest.approx((1.0 + 0.2) / 2),
        "off_target_drift": pytest.approx((0.02 + 0.1) / 2),
        "selectivity": pytest.approx((0.98 + 0.1) / 2),
        "alpha_used_median": 12.0,
        # Of 1, 2, 3, ∞ the lower of the two in the middle; the misclassified image does not count.
        **{"alpha_flip_median": 2.0, "alpha_flip_infinite": 0.25},
    }
    json.dumps(found, allow_nan=False)


def test_an_infinite_median_is_none_and_stages_that_did_not_run_are_absent(tmp_path: Path) -> None:
    paths = write_stages(tmp_path, [1.0, math.inf, math.inf])
    found = run_metrics(paths)
    images = pd.read_csv(paths["diagnose"] / "images.csv")
    write_table(paths["diagnose"] / "images.csv", images.rename(columns={"flip_exact": "flip_crossing"}))
    assert run_metrics(paths) == found  # as at other sites than the last
    assert found["alpha_flip_median"] is None
    assert found["alpha_flip_infinite"] == pytest.approx(2 / 3)
    assert run_metrics({"classifier": paths["classifier"]}) == {"select_accuracy": 0.7}
    only_sae = run_metrics({kind: paths[kind] for kind in ("classifier", "sae")})
    assert only_sae == {"test_accuracy": 0.89, "select_accuracy": 0.91, **SAE_NUMBERS}
    assert run_metrics({}) == {}
