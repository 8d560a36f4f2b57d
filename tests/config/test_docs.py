"""The pages: their links lead somewhere, all of them are in the site, and the README stays short."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import salve

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")])
MOST_WORDS = 700
#: Pages of the site that docs/tools/site.py makes or finds elsewhere.
NO_FILE = ("api/", "CONTRIBUTING.md", "CHANGELOG.md")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        place, _, anchor = target.partition("#")
        there = (page.parent / place).resolve() if place else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


def test_there_are_pages() -> None:
    assert {"README.md", "docs/method.md", "docs/results.md"} <= {page.relative_to(ROOT).as_posix() for page in PAGES}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_every_promise_is_held_by_a_test() -> None:
    text = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 20
    for row in rows:
        held = re.findall(r"`((?:unit|integration|config)/\w+\.py)(?:::(\w+))?`", row)
        assert held, row
        for file, name in held:
            assert f"def {name or 'test_'}" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"


# -- the site


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name functions of Python."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def pages_in(nav: Any) -> list[str]:
    """The files that a part of the navigation names."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    listed = pages_in(SITE["nav"])
    assert sorted(listed) == sorted(set(listed))
    written = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert {page for page in listed if not page.startswith(NO_FILE)} == written - set(SITE["exclude_docs"].split())


def test_every_public_package_is_in_the_reference() -> None:
    listed = {
        page.removeprefix("api/").removesuffix(".md") for page in pages_in(SITE["nav"]) if page.startswith("api/")
    }
    assert set(salve._ROOMS) <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_in_a_list_is_code_in_the_site_too(page: Path) -> None:
    """A code host takes six spaces for it, Python-Markdown eight."""
    in_list, above, wrong = False, "", []
    for line in page.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(" "):
            in_list = line.startswith(("- ", "* ")) or bool(re.match(r"\d+\. ", line))
        if in_list and not above.strip() and re.match(r" {5,7}\S", line):
            wrong.append(line)
        above = line
    assert not wrong


built = pytest.mark.skipif(find_spec("mkdocstrings_handlers") is None, reason="needs what `make docs` installs")


def build(site: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--site-dir",
        str(site),
        "--config-file",
        str(config),
    ]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )


@built
@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api" / "editing.html").read_text(encoding="utf-8")
    # A function from another module, a link to it from a docstring, and no role left as it was written.
    assert 'id="salve.editing.gate"' in page
    assert re.search(r'href="#salve\.editing\.gates"><code>gates</code>', page)
    for file in (tmp_path / "api").glob("*.html"):
        assert not re.search(r":(?:func|class|meth|mod|data|attr|exc):<code>", file.read_text(encoding="utf-8")), file
    assert 'id="salve.saliency.grad_fam"' in (tmp_path / "api" / "saliency.html").read_text(encoding="utf-8")
    # Links that leave docs/ lead to pages of the site, or nowhere where the repository's address is unknown.
    assert 'href="CONTRIBUTING.html"' in (tmp_path / "index.html").read_text(encoding="utf-8")
    assert not [file for file in tmp_path.rglob("*.html") if 'href="../../' in file.read_text(encoding="utf-8")]


@built
@pytest.mark.slow
@pytest.mark.parametrize("link", ["[away](nowhere.md)", "[below](method.md#nowhere)", "[out](../nowhere.py)"])
def test_a_link_that_leads_nowhere_breaks_the_build(tmp_path: Path, link: str) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "README.md").write_text(f"# Here\n\n{link}\n")
    (docs / "method.md").write_text("# The method\n")
    config = SITE | {"docs_dir": str(docs), "nav": ["README.md", "method.md"], "plugins": [], "extra_css": []}
    config |= {"hooks": [str(ROOT / "docs/tools/site.py")], "markdown_extensions": ["toc"], "exclude_docs": ""}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert "nowhere" in done.stderr


@built
@pytest.mark.parametrize(
    ("link", "folder", "wanted"),
    [
        ("[a](method.md#site)", "docs", "[a](method.md#site)"),
        ("[a](../CONTRIBUTING.md#tests)", "docs", "[a](CONTRIBUTING.md#tests)"),
        ("[a](../../CHANGELOG.md)", "docs/paper", "[a](../CHANGELOG.md)"),
        ("[a](docs/method.md#site)", ".", "[a](method.md#site)"),
        ("[the files](../conf)", "docs", "[the files](https://here/tree/main/conf)"),
        ("[the `files`](../pyproject.toml)", "docs", "[the `files`](https://here/blob/main/pyproject.toml)"),
        ("[pages](docs/paper)", ".", "[pages](https://here/tree/main/docs/paper)"),
        ("[a](../nowhere.py) and [b](https://there/x)", "docs", "[a](../nowhere.py) and [b](https://there/x)"),
    ],
)
def test_links_that_leave_the_docs(link: str, folder: str, wanted: str) -> None:
    from docs.tools.site import relinked

    assert relinked(link, Path(folder), "https://here") == wanted
    text = re.sub(r"\[([^]]*)\]\(https://here[^)]*\)", r"\1", wanted)
    assert relinked(link, Path(folder), None) == text
