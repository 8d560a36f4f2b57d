"""What mkdocs calls while it builds the site (mkdocs.yml): links that leave docs/, and pages without a file there."""

import re
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
#: Pages of the site that lie at the top of the repository, where a code host looks for them.
AT_THE_TOP = ("CONTRIBUTING.md", "CHANGELOG.md")
#: Packages with a page in the reference; `import salve` finds each of them.
ROOMS = (
    *("results", "data", "backbones", "activations", "sae", "features", "saliency", "editing", "editing.methods"),
    *("diagnosis", "metrics", "stages", "report"),
)
#: The names that project.urls in pyproject.toml may give to the repository.
LABELS = ("repository", "source", "source code", "homepage")

_LINK = re.compile(r"(?P<text>!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s]+)\)")


def repository() -> str | None:
    """The address of the repository, as the installed package names it; None if it names none."""
    try:
        named = [line.split(", ", 1) for line in metadata("salve").get_all("Project-URL") or []]
    except PackageNotFoundError:
        return None
    urls = {label.lower(): url.rstrip("/") for label, url in named}
    return next((urls[label] for label in LABELS if label in urls), None)


def relinked(text: str, folder: Path, url: str | None) -> str:
    """Change the links of a page that lead out of docs/, so that they work in the site.

    Args:
        text: the page's Markdown. folder: where its file lies, below the repository.
        url: of the repository; with None, a link to a file or folder that the site does not have becomes its text.

    Returns:
        The page with other links; those within docs/ stay as they are.
    """

    def changed(link: re.Match[str]) -> str:
        target, hash_, anchor = link["target"].partition("#")
        if re.match(r"[a-z]+:", target) or not target:
            return link[0]
        there = (ROOT / folder / target).resolve()
        if not there.is_relative_to(ROOT):
            return link[0]
        path = there.relative_to(ROOT).as_posix()
        up = "../" * max(len(folder.parts) - 1, 0)
        if path in AT_THE_TOP:
            return f"{link['text']}({up}{path}{hash_}{anchor})"
        if path.startswith("docs/") and not there.is_dir():
            return link[0] if folder.parts else f"{link['text']}({path.removeprefix('docs/')}{hash_}{anchor})"
        if not there.exists():
            return link[0]  # which mkdocs refuses
        if url is None:
            return link["text"].strip("![]")
        return f"{link['text']}({url}/{'tree' if there.is_dir() else 'blob'}/main/{path}{hash_}{anchor})"

    return _LINK.sub(changed, text)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the repository, if it is known, at the top of every page."""
    config.repo_url = repository()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that have no file in docs/: those at the top of the repository, and the API's, one a package."""
    for name in AT_THE_TOP:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    listed = "\n".join(f"- [`salve.{room}`]({room}.md)" for room in ROOMS)
    files.append(File.generated(config, "api/README.md", content=f"# Python API\n\n::: salve\n\n{listed}\n"))
    for room in ROOMS:
        files.append(File.generated(config, f"api/{room}.md", content=f"# salve.{room}\n\n::: salve.{room}\n"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Change the links that lead out of docs/."""
    source = page.file.src_uri
    folder = Path() if source in AT_THE_TOP else Path("docs", source).parent
    return relinked(markdown, folder, config.repo_url)
