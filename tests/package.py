"""Build the wheel and the source distribution, install each in an environment of its own, and make a small run with it.

    python -m tests.package                     the dependencies are those of this Python: a minute
    python -m tests.package --dependencies      pip installs them anew, as a user's pip would
    python -m tests.package --release v0.1.0    also: whether it may be published under this tag, or $GITHUB_REF_NAME

The distributions stay in ``dist/``.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from email.message import Message
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Files that a wheel must have. Settings, the page's styles and the marker of types are no Python, and easily left out.
WANTED = (
    *("salve/py.typed", "salve/__main__.py", "salve/conf/config.yaml", "salve/conf/experiment/repair/quickstart.yaml"),
    *("salve/report/explorer/explorer.js", "salve/report/explorer/explorer.css", "hydra_plugins/salve_sweeper.py"),
)
#: The only folders at the top of a wheel, beside its metadata.
AT_THE_TOP = {"salve", "hydra_plugins"}
#: The version of the metadata. Tools that upload and install do not all read a newer one yet.
METADATA = "2.4"
COMMANDS = ("salve", "salve-edit", "salve-sweep", "salve-store", "salve-sites", "salve-compare")
SMALL = (
    *("trainer=cpu", "finetune.epochs=1", "sae.steps=20", "sae.dictionary_size=16", "validate.maximisation_steps=2"),
    *("data.train_per_class=4", "data.select_per_class=2", "data.test_per_class=2", "data.image_size=32"),
    *("backbone.args.channels=[8,16,24,32]", "edit.alpha=[0,1,10]", "validate.random_latents=2"),
)


def version_of(text: str) -> str:
    """The version in the text of ``salve/__init__.py``, its only source."""
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    assert found is not None, "salve/__init__.py names no version"
    return found[1]


def metadata_of(wheel: Path) -> Message:
    """The metadata in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def names_in(wheel: Path) -> set[str]:
    """The files in a wheel, without its list of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith(".dist-info/RECORD")}


def wrong_with_wheel(wheel: Path, version: str) -> list[str]:
    """What is wrong with a wheel; empty if nothing is."""
    names, metadata = names_in(wheel), metadata_of(wheel)
    wrong = [f"it lacks {name}" for name in WANTED if name not in names]
    tops = {name.partition("/")[0] for name in names} - AT_THE_TOP
    wrong += [f"it has {top}/" for top in sorted(tops) if not top.endswith(".dist-info")]
    if metadata["Version"] != version:
        wrong.append(f"its version is {metadata['Version']}, not {version}")
    if metadata["Metadata-Version"] != METADATA:
        wrong.append(f"its metadata have version {metadata['Metadata-Version']}, not {METADATA}")
    if metadata["License-Expression"] != "MIT" or not any(name.endswith("licenses/LICENSE") for name in names):
        wrong.append("it does not bring its licence")
    return wrong


def wrong_with_release(tag: str, version: str, metadata: Message, changelog: str, citation: str) -> list[str]:
    """Why a version may not be published under a tag; empty if it may."""
    wrong = [] if tag == f"v{version}" else [f"the tag is {tag or 'not given'}, and salve/__init__.py says {version}"]
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        wrong.append(f"CHANGELOG.md has no head '## [{version}] - YYYY-MM-DD'")
    if not re.search(rf"^version: {re.escape(version)}$", citation, re.MULTILINE):
        wrong.append(f"CITATION.cff does not say version: {version}")
    if not any(url.startswith("Repository,") for url in metadata.get_all("Project-URL", [])):
        wrong.append("[project.urls] in pyproject.toml names no Repository")
    return wrong


def build(folder: Path, source: Path = ROOT) -> tuple[Path, Path]:
    """Build both distributions of a source tree into a folder; the wheel, and the source distribution."""
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=source, check=True, stdout=subprocess.DEVNULL)
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def wheel_of_sdist(sdist: Path, folder: Path) -> Path:
    """The wheel that is built from an unpacked source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    [source] = [path for path in folder.iterdir() if path.is_dir()]
    return build(folder / "built", source)[0]


def try_out(distribution: Path, folder: Path, dependencies: bool) -> None:
    """Install a distribution in an environment of its own, and use it from an empty folder.

    Args:
        distribution: a wheel or a source distribution. folder: for the environment and results.
        dependencies: install them, too; else those of this Python are used.
    """
    home, place = folder / "environment", folder / "empty"
    venv.create(home, with_pip=True)
    place.mkdir()
    python = home / "bin" / "python"
    options = [] if dependencies else ["--no-deps", "--no-build-isolation"]
    if not dependencies:
        site = _said([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], place)
        others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        # What is installed here comes after it, so that the distribution is what is imported.
        Path(site, "dependencies.pth").write_text("\n".join(others))
    _said([str(python), "-m", "pip", "install", "--quiet", *options, str(distribution)], place)
    where = _said([str(python), "-c", "import salve; print(salve.__file__)"], place)
    assert Path(where).is_relative_to(home), f"{where} is not what was installed"
    for command in COMMANDS:
        _said([str(home / "bin" / command), "--help"], place)
    _said([str(python), "-m", "salve", *SMALL], place)
    [run] = (place / "outputs" / "runs" / "quickstart").iterdir()
    _said([str(python), "-c", f"import salve; assert 'fve' in salve.open_run({str(run)!r}).metrics"], place)


def _said(command: Sequence[str], folder: Path) -> str:
    """What a command prints; it must succeed, and sees no package but those of its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dependencies", action="store_true", help="install the dependencies, too")
    parser.add_argument(
        "--release",
        metavar="TAG",
        nargs="?",
        const=os.environ.get("GITHUB_REF_NAME", ""),
        help="also check whether it may be published under this tag; by default that of the workflow",
    )
    given = parser.parse_args(arguments)
    version = version_of((ROOT / "salve" / "__init__.py").read_text(encoding="utf-8"))
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    wheel, sdist = build(dist)
    wrong = wrong_with_wheel(wheel, version)
    if given.release is not None:
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff")]
        wrong += wrong_with_release(given.release, version, metadata_of(wheel), *texts)
    with tempfile.TemporaryDirectory() as name:
        again = wheel_of_sdist(sdist, Path(name))
        if differ := names_in(wheel) ^ names_in(again):
            wrong.append(f"one of the two wheels, of the tree and of the sdist, lacks {sorted(differ)[0]}")
    if wrong:
        raise SystemExit(f"{wheel.name}: {'; '.join(wrong)}.")
    for distribution in (wheel, sdist):
        with tempfile.TemporaryDirectory() as name:
            try_out(distribution, Path(name), given.dependencies)
        print(f"{distribution.relative_to(ROOT)}: installed alone, all commands answer, and a small run finished.")


if __name__ == "__main__":
    main()
