"""The notebooks run, with everything made smaller, and their rendered pages hold the code that they have."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.py"))
TINY = (
    "finetune.epochs=1 sae.steps=20 data.train_per_class=4 data.select_per_class=2 data.test_per_class=4 "
    "data.image_size=32 backbone.args.channels=[8,16,24,32] edit.alpha=[0,1,5,20,100] audit.labels=2 "
    "compare.targets=2 repair.methods=[dfr,gate] repair.sizes=[1] repair.strengths=[1]"
)
#: What each says in the end, whatever the network has learned.
SAYS = {
    "tour": ["the same as those of the run: True", "the same bits after undoing it: True"],
    "repair_a_shortcut": ["the tag changes", "measured here"],
    "compare_two_methods": ["taken away by both"],
}


def code_cells(notebook: Path) -> list[str]:
    """The code of the percent format, cell by cell."""
    cells = re.split(r"^# %%", notebook.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [cell.partition("\n")[2].strip() for cell in cells[1:] if not cell.startswith(" [markdown]")]


def test_there_are_notebooks() -> None:
    assert {notebook.stem for notebook in NOTEBOOKS} == set(SAYS)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    environment = os.environ | {"SALVE_NOTEBOOK_SETTINGS": TINY, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-W", "ignore", str(notebook)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [words for words in SAYS[notebook.stem] if words not in done.stdout] == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_page_is_of_this_code(notebook: Path) -> None:
    """`make notebooks` makes the page; its code, its outputs and its pictures stand in git."""
    page = notebook.with_suffix(".md").read_text(encoding="utf-8")
    shown = [cell.strip() for cell in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    assert shown == code_cells(notebook), f"{notebook.name} has changed: make notebooks"
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert pictures
    assert all((FOLDER / picture).is_file() for picture in pictures)
    assert not re.search(r"Traceback|Warning|site-packages", page)
