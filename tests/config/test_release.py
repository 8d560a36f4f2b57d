"""What a release says of itself: one version, a changelog in its form, workflows with few rights, a whole wheel."""

import os
import re
import sys
import zipfile
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import yaml

import salve
from tests.package import AT_THE_TOP, WANTED, version_of, wrong_with_release, wrong_with_wheel

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
WORKFLOWS = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml")}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

# -- the version, the citation, the changelog


def test_the_version_has_one_source() -> None:
    metadata = pytest.importorskip("hatchling.metadata.core")
    from hatchling.plugin.manager import PluginManager

    assert "version" not in PROJECT
    built = metadata.ProjectMetadata(str(ROOT), PluginManager()).version
    assert built == salve.__version__ == version_of((ROOT / "salve" / "__init__.py").read_text()) == CITATION["version"]


def test_the_citation_is_valid() -> None:
    """What version 1.2.0 of the schema requires, and the names that it allows at the top."""
    allowed = (
        "abstract authors cff-version commit contact date-released doi identifiers keywords license license-url "
        "message preferred-citation references repository repository-artifact repository-code title type url version"
    )
    assert {"cff-version", "message", "title", "authors"} <= CITATION.keys() <= set(allowed.split())
    assert (CITATION["cff-version"], CITATION["type"], CITATION["license"]) == ("1.2.0", "software", PROJECT["license"])
    paper = CITATION["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"] == PROJECT["urls"]["Paper"]
    for author in (*CITATION["authors"], *paper["authors"]):
        assert author.keys() in ({"name"}, {"family-names", "given-names"})


def test_the_changelog_has_its_form() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *releases = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", release) for release in releases)
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_every_python_is_named() -> None:
    prefix = "Programming Language :: Python :: "
    named = [one.removeprefix(prefix) for one in PROJECT["classifiers"] if one.startswith(prefix)]
    assert [one for one in named if "." in one] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert yaml.safe_load(WORKFLOWS["check.yml"])["jobs"]["test"]["strategy"]["matrix"]["python"] == PYTHONS


@pytest.mark.parametrize(("ending", "opens"), [(".py", "# "), (".js", "// "), (".css", "/* ")])
def test_what_ships_names_its_licence(ending: str, opens: str) -> None:
    files = [path for top in sorted(AT_THE_TOP) for path in (ROOT / top).rglob(f"*{ending}")]
    assert files
    head = f"{opens}SPDX-License-Identifier: {PROJECT['license']}"
    assert [path for path in files if not path.read_text(encoding="utf-8").startswith(head)] == []


# -- the workflows


def steps(workflow: str) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(WORKFLOWS[workflow])["jobs"].values()
    return [step for job in jobs for step in job["steps"]]


def test_there_are_workflows() -> None:
    assert set(WORKFLOWS) == {"check.yml", "publish.yml"}


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_actions_are_pinned_to_a_commit_with_its_version(workflow: str) -> None:
    used = re.findall(r"uses: (.+)$", WORKFLOWS[workflow], re.MULTILINE)
    assert len(used) == len([step for step in steps(workflow) if "uses" in step])
    assert [one for one in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one)] == []


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_jobs_may_only_read_but_for_the_one_that_publishes(workflow: str) -> None:
    content = yaml.safe_load(WORKFLOWS[workflow])
    assert content["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in content["jobs"].items() if "permissions" in job}
    assert more == ({"publish": {"id-token": "write"}} if workflow == "publish.yml" else {})
    for job in content["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", "")  # a name of a branch or tag would be run as shell
    assert "secrets." not in WORKFLOWS[workflow]


def test_only_a_tag_publishes_what_was_built_and_tried() -> None:
    content = yaml.safe_load(WORKFLOWS["publish.yml"])
    assert content[True] == {"push": {"tags": ["v*"]}}  # YAML reads `on` as true
    assert content["jobs"]["publish"]["needs"] == "build"
    assert not [step for step in content["jobs"]["publish"]["steps"] if "run" in step]
    assert '--release"' in WORKFLOWS["publish.yml"]


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_workflows_run_what_a_developer_can_run(workflow: str) -> None:
    for line in [step["run"] for step in steps(workflow) if "run" in step]:
        words = [word for word in re.sub(r'"[^"]*"', "", line).split() if "=" not in word]
        assert words == [".ci/run"] or (words[0] == "make" and set(words[1:]) <= TARGETS), line


def test_what_is_run_is_there() -> None:
    """Targets, files and modules that the workflows, .ci/run and the Makefile name."""
    whole = ROOT / ".ci" / "run"
    assert os.access(whole, os.X_OK)
    script = whole.read_text(encoding="utf-8")
    assert set(re.findall(r"^ *make ([a-z-]+)", script, re.MULTILINE)) <= TARGETS
    text = "\n".join([*WORKFLOWS.values(), script, MAKEFILE])
    files = re.findall(r"\b(?:tests|docs|benchmarks|experiments)/[\w/.-]*\w", text)
    modules = re.findall(r"-m ((?:tests|docs|experiments)\.[\w.]+)", text)
    named = [*files, *(f"{module.replace('.', '/')}.py" for module in modules)]
    assert {"tests/config", "tests/cluster/slurm.sh", "tests/package.py", "docs/tools/results.py"} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("name", ["bug.yml", "idea.yml"])
def test_issue_templates_ask_something(name: str) -> None:
    template = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / name).read_text(encoding="utf-8"))
    assert template.keys() >= {"name", "description", "body"}
    assert all(part["type"] == "textarea" and part["attributes"]["label"] for part in template["body"])
    assert any(part.get("validations", {}).get("required") for part in template["body"])


# -- the checks of a wheel and of a release see what they are there to see


def wheel(
    folder: Path, *, without: str = "", more: str = "", version: str = "1.2.3", metadata_version: str = "2.4"
) -> Path:
    metadata = f"Metadata-Version: {metadata_version}\nName: salve\nVersion: {version}\nLicense-Expression: MIT\n"
    names = [*WANTED, "salve-1.2.3.dist-info/licenses/LICENSE", "salve-1.2.3.dist-info/RECORD", more]
    path = folder / "salve-1.2.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("salve-1.2.3.dist-info/METADATA", metadata)
        for name in names:
            if name and name != without:
                archive.writestr(name, "")
    return path


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        ({"without": "salve/py.typed"}, ["it lacks salve/py.typed"]),
        ({"without": "salve-1.2.3.dist-info/licenses/LICENSE"}, ["it does not bring its licence"]),
        ({"more": "tests/a.py"}, ["it has tests/"]),
        ({"more": "salve_extra/a.py"}, ["it has salve_extra/"]),
        ({"version": "1.2.4"}, ["its version is 1.2.4, not 1.2.3"]),
        ({"metadata_version": "2.5"}, ["its metadata have version 2.5, not 2.4"]),
    ],
)
def test_a_wheel_that_is_not_whole_is_seen(tmp_path: Path, change: dict[str, str], wrong: list[str]) -> None:
    assert wrong_with_wheel(wheel(tmp_path, **change), "1.2.3") == wrong


def test_a_release_that_is_not_ready_is_seen() -> None:
    metadata = Message()
    metadata["Project-URL"] = "Repository, https://example.org/salve"
    ready = ("1.2.3", metadata, "## [1.2.3] - 2026-01-31\n", "version: 1.2.3\n")
    assert wrong_with_release("v1.2.3", *ready) == []
    assert len(wrong_with_release("v1.2.4", *ready)) == 1
    assert wrong_with_release("", *ready) == ["the tag is not given, and salve/__init__.py says 1.2.3"]
    assert len(wrong_with_release("v1.2.3", "1.2.3", Message(), "## [Unreleased]\n", "version: 1.2.2\n")) == 3
