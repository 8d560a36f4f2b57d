"""The oldest version of a dependency that is allowed is one that was tested."""

import ast
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements() -> list[Requirement]:
    """Of the package and of its tests; ``salve[a,b]`` stands for what is listed under these names."""
    extras = PROJECT["optional-dependencies"]
    found = [Requirement(line) for line in (*PROJECT["dependencies"], *extras["dev"])]
    own = [one for one in found if one.name == "salve"]
    return [one for one in found if one.name != "salve"] + [
        Requirement(line) for one in own for name in sorted(one.extras) for line in extras[name]
    ]


def versions_in_the_test() -> dict[str, Version]:
    lines = (ROOT / "tests" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    return {name: Version(one) for name, _, one in (line.partition("==") for line in lines if line[:1] != "#")}


def lowest_of(requirement: Requirement) -> Version:
    bounds = [Version(one.version) for one in requirement.specifier if one.operator in (">=", "==")]
    assert len(bounds) == 1, f"{requirement} has no lowest version"
    return bounds[0]


def test_the_lowest_versions_are_the_ones_that_are_tested() -> None:
    allowed = {one.name: lowest_of(one) for one in requirements()}
    assert versions_in_the_test() == allowed


def test_what_is_installed_is_allowed() -> None:
    for one in requirements():
        if one.name not in ("ruff", "mypy"):
            assert one.specifier.contains(version(one.name), prereleases=True), one


#: The package that an import comes in, where that has another name; "" where another package or an extra brings it.
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "hydra": "hydra-core"}
PACKAGES |= dict.fromkeys(("salve", "hydra_plugins", "submitit", "markupsafe", "transformers"), "")
PACKAGES |= dict.fromkeys(("imagecorruptions", "art"), "")


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_whatever_is_imported_is_a_dependency() -> None:
    """A package that only comes along with another has no lowest version of its own."""
    files = [*(ROOT / "salve").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
    names = set().union(*map(imported, files)) - sys.stdlib_module_names
    packages = {PACKAGES.get(name, name.replace("_", "-")) for name in names} - {""}
    assert packages <= {one.name for one in requirements()}
    assert len(packages) > 15
