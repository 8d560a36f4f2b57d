"""Names that look like the console's markup are shown as they are, and raise nothing."""

import ast
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from rich.console import Console

from salve.integrity import sealed
from salve.report import summary_table
from salve.run import execute, rerun
from salve.sweep import print_summary, summarise_sweep
from salve.sweep.launch import submit
from salve.sweep.plan import Run
from tests.composing import settings

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("salve", "experiments") for path in (ROOT / folder).rglob("*.py"))
#: A closing tag of nothing raises; an opening one is swallowed; a colour is applied.
HOSTILE = ("x[/y]", "[bold]x", "[red]a[/red]", "[/]", "a[b", ":church:")


def unsafe_prints(source: str) -> list[int]:
    """Lines that give the console an f-string or a variable as text with markup."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "print"
        and "console" in ast.unparse(node.func.value)
        and any(isinstance(argument, ast.JoinedStr) or "join" in ast.unparse(argument) for argument in node.args)
        and "Text(" not in ast.unparse(node)
        and not any(item.arg == "markup" and ast.unparse(item.value) == "False" for item in node.keywords)
    ]


def unsafe_consoles(source: str) -> list[int]:
    """Lines that make a console which takes text for markup or for the name of an emoji."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "Console"
        and not {"markup=False", "emoji=False"} <= {f"{item.arg}={ast.unparse(item.value)}" for item in node.keywords}
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_composed_is_printed_as_markup(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ".print" not in source or unsafe_prints(source) == []
    assert "Console" not in source or unsafe_consoles(source) == []


def test_what_would_be_printed_as_markup_is_seen() -> None:
    assert unsafe_prints('console.print(f"{name}")\nconsole.print("; ".join(names))\nconsole.print("x")') == [1, 2]
    assert unsafe_consoles("Console()\nConsole(markup=False)\nConsole(markup=False, emoji=False)") == [1, 2]
    assert unsafe_prints('console.print(f"{name}", markup=False)\nself._console.print(Text(f"{name}"))') == []


def shown_by(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def terminal() -> Console:
    file = io.StringIO()
    return Console(file=file, width=400, force_terminal=True, color_system=None, markup=False, emoji=False)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_that_fails_with_a_hostile_reason_does_not_end_the_sweep(tmp_path: Path, name: str) -> None:
    config = settings()
    runs = [Run(key, {"sae.variant": name}, config) for key in ("abc", "def")]
    reasons: list[str] = []

    def launch(jobs: object) -> None:
        for run in runs:
            run.folder(tmp_path).path.mkdir()
            reasons.append(run.folder(tmp_path).fail(RuntimeError(f"it said {name}")))
        raise RuntimeError(f"the launcher said {name}")

    console = terminal()
    submit(runs, tmp_path, launch, console)
    assert reasons == [f"RuntimeError: it said {name}"] * 2
    assert shown_by(console).count(f"sae.variant={name}  failed: RuntimeError: it said {name}") == 2
    assert f"the launcher said {name}" in shown_by(console)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_sweep_with_hostile_names(tmp_path: Path, name: str) -> None:
    sweep = tmp_path / name.replace("/", "-")
    run = sweep / "abc123"
    run.mkdir(parents=True)
    axis = f"+backbone.args.{name}"
    planned = {"abc123": {"swept": {axis: name}}, "def456": {"swept": {axis: "b"}}}
    (sweep / "sweep.json").write_text(json.dumps({"name": sweep.name, "runs": planned}))
    settings = {"sae": {"variant": name, "seed": 0}, "data": {"_target_": "x.Y", "root": name}}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "metrics.json").write_text(json.dumps({"fve": 0.5}))
    (run / "manifest.json").write_text(json.dumps(sealed({"artifacts": {}, "files": {}})))
    (sweep / "def456").mkdir()
    (sweep / "def456/failure.json").write_text(json.dumps({"reason": f"it said {name}", "kind": "Error"}))
    console = terminal()
    print_summary(summarise_sweep(sweep), console)
    assert f"it said {name}" in shown_by(console)
    shown = "".join(shown_by(console).split())  # a title takes several lines above a narrow table
    assert f"Sweep{sweep.name}".replace(" ", "") in shown


@pytest.mark.parametrize("name", HOSTILE)
def test_a_rerun_with_hostile_versions(name: str) -> None:
    console = terminal()
    record = {"artifacts": {}, "versions": {"torch": name}, "git": name, "python": "3", "seed": 0, "inputs": {}}
    rerun._compare(record, record | {"git": "b", "versions": {"torch": "2"}}, console)
    assert f"git: {name} then, b now" in shown_by(console)
    assert f"torch: {name} then, 2 now" in shown_by(console)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_with_a_hostile_name_ends_well(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, job = SimpleNamespace(name=name, stages=["report"]), SimpleNamespace(remarks=[])
    console = terminal()
    page = Path("runs") / name / "index.html"
    monkeypatch.setattr(execute, "_facts", lambda *_: {})
    monkeypatch.setattr(execute, "report", lambda *_, **__: page)
    monkeypatch.setattr(execute, "summary_table", lambda *_, **__: "")
    execute._report(config, job, {}, Path(), "", "salve", console)  # type: ignore[arg-type]
    assert f"Report: {page}" in shown_by(console)


@pytest.mark.parametrize("name", HOSTILE)
def test_classes_with_hostile_names(tmp_path: Path, name: str) -> None:
    classes = [name, "other"]
    pd.DataFrame({"class": classes, "latent": [0, 1], "sign": [1, 1], "kind": ["class-defining"] * 2}).to_csv(
        tmp_path / "selected.csv", index=False
    )
    pd.DataFrame({"class": classes, "test_images": [4, 4], "test_accuracy": [0.5, 1.0]}).to_csv(
        tmp_path / "classes.csv", index=False
    )
    console = terminal()
    console.print(summary_table({"features": tmp_path}))
    assert name in shown_by(console)
