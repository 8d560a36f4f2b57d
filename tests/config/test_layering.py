"""The plan of the house, read from the source without importing it: imports point down."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "salve"
MODULES = sorted(PACKAGE.rglob("*.py"))

#: From the bottom up. What stands on one floor does not import each other, save that backbones may use data.
FLOORS = (
    ("axes", "cells", "lazy", "system", "timm_alone"),
    ("types", "ending"),
    ("named", "untrusted", "values"),
    ("variants",),
    ("settings", "edit_settings", "data_settings", "repair_settings"),
    ("files",),
    ("integrity",),
    ("artifacts", "metrics", "distributed"),
    ("data", "backbones"),
    ("activations",),
    ("sae",),
    ("features", "saliency"),
    ("editing",),
    ("diagnosis",),
    ("results",),
    ("report",),
    ("stages", "processes"),
    ("run",),
    ("sweep",),
    ("cli", "store"),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
BESIDE = {("backbones", "data")}
#: Stages meet through artifacts; these files are what they share.
SHARED_BY_STAGES = (
    *("context", "measure", "measured", "outcome", "curves", "through_tail", "targets", "effects", "latents"),
    *(
        "localise",
        "on_sets",
        "resume",
        "sampled",
        "training",
        "bench",
        "grouped",
        "evidence",
        "counterfactuals",
        "repair_suspects",
        "judging",
        "repairing",
        "candidates",
        "retraining",
        "weighting",
        "tcav",
    ),
)
MOST_LINES = 350


def name_of(path: Path, package: Path) -> tuple[str, ...]:
    """``salve/sae/io.py`` → ``("salve", "sae", "io")``; a package's ``__init__`` keeps that part."""
    return path.relative_to(package.parent).with_suffix("").parts


def imported(path: Path, package: Path = PACKAGE) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and dotted parts of everything a file imports, wherever in the file; a name may be the last part."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            above = name_of(path, package)[: -node.level] if node.level else ()
            module = (*above, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield node.lineno, (*module, alias.name)


def upward_imports(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        if path == package / "__init__.py":  # the house's door, which names what is inside
            continue
        room = (*name_of(path, package), "")[1]
        for line, parts in imported(path, package):
            if parts[0] != package.name or len(parts) == 1 or parts[1].startswith("__"):
                continue
            other = parts[1]
            if other != room and not (room in FLOOR and (FLOOR[other] < FLOOR[room] or (room, other) in BESIDE)):
                found.append(f"{path.relative_to(package.parent)}:{line}: {room} imports {other}")
    return found


def stages_that_meet(package: Path) -> list[str]:
    found = []
    for path in sorted((package / "stages").glob("*.py")):
        if path.stem == "__init__":
            continue
        for line, parts in imported(path, package):
            if parts[:2] == (package.name, "stages") and parts[2] not in SHARED_BY_STAGES:
                found.append(f"{path.relative_to(package.parent)}:{line}: {path.stem} imports {parts[2]}")
    return found


def who_has_heard_of_a_config(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package.parent)}:{line}: imports {'.'.join(parts)}"
        for path in sorted(package.rglob("*.py"))
        if path != package / "cli.py" and {package / "run", package / "sweep"}.isdisjoint(path.parents)
        for line, parts in imported(path, package)
        if parts[0] in ("hydra", "omegaconf", "hydra_plugins")
    ]


def statements_that_do_something(path: Path) -> list[str]:
    """Statements that an import would run, other than definitions, imports, assignments and docstrings."""
    quiet = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)

    def is_quiet(node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            return ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING")
        return isinstance(node, quiet) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))

    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [f"{path.name}:{node.lineno}: {ast.unparse(node)[:60]}" for node in body if not is_quiet(node)]


def test_every_room_has_its_floor() -> None:
    rooms = {name_of(path, PACKAGE)[1] for path in MODULES} - {"__init__"}
    assert rooms == set(FLOOR)


def test_imports_point_down() -> None:
    assert upward_imports(PACKAGE) == []


def test_stages_meet_only_through_artifacts() -> None:
    assert stages_that_meet(PACKAGE) == []


def test_only_the_run_has_heard_of_a_config() -> None:
    assert who_has_heard_of_a_config(PACKAGE) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_module_is_small_and_does_nothing_on_import(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    assert statements_that_do_something(path) == []


# -- the checks themselves see what they are there to see


@pytest.mark.parametrize(
    ("file", "line", "upward"),
    [
        ("sae/x.py", "import salve.features.classes", True),
        ("sae/x.py", "from salve.features import classes", True),
        ("sae/x.py", "from salve import features", True),
        ("sae/x.py", "from ..features import classes", True),
        ("sae/x.py", "from .. import features", True),
        ("sae/x.py", "def f():\n    from salve.features import classes", True),
        ("sae/__init__.py", "from salve.run import schema", True),
        ("types.py", "from salve.artifacts import Store", True),
        ("data/x.py", "from salve.backbones import sites", True),
        ("features/x.py", "from salve.saliency import grad_fam", True),
        ("backbones/x.py", "from salve.data import ImageData", False),
        ("sae/x.py", "from salve.sae.io import load_sae", False),
        ("sae/x.py", "from . import io", False),
        ("sae/x.py", "from .io import load_sae", False),
        ("sae/x.py", "from salve import __version__", False),
        ("sae/x.py", "import torch, salvelike.features", False),
        ("cli.py", "from salve.run import schema", False),
        ("run/x.py", "from salve.cli import main", True),
    ],
)
def test_an_upward_import_is_seen(tmp_path: Path, file: str, line: str, upward: bool) -> None:
    path = tmp_path / "salve" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert bool(upward_imports(tmp_path / "salve")) == upward


@pytest.mark.parametrize(
    ("line", "meets"),
    [
        ("from salve.stages.discover import capture", True),
        ("from salve.stages import discover", True),
        ("from . import discover", True),
        ("from .discover import capture", True),
        ("from salve.stages.context import StageContext", False),
        ("from salve.stages.targets import targets_of", False),
    ],
)
def test_a_stage_that_imports_another_is_seen(tmp_path: Path, line: str, meets: bool) -> None:
    path = tmp_path / "salve" / "stages" / "control.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert bool(stages_that_meet(tmp_path / "salve")) == meets


def test_a_config_in_the_wrong_place_is_seen(tmp_path: Path) -> None:
    for file in ("run/x.py", "cli.py", "stages/x.py", "editing/cli.py"):
        path = tmp_path / "salve" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from omegaconf import DictConfig")
    assert [line.partition(":")[0] for line in who_has_heard_of_a_config(tmp_path / "salve")] == [
        "salve/editing/cli.py",
        "salve/stages/x.py",
    ]


def test_a_side_effect_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        '"""Doc."""\nimport os\nX = 1\nos.environ.update(a="b")\nif __name__ == "__main__":\n    print(1)\n'
    )
    assert statements_that_do_something(path) == ["x.py:4: os.environ.update(a='b')"]
