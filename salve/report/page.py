# SPDX-License-Identifier: MIT
"""Write the report of one run: a page with its figures and tables."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from salve.artifacts import write_table, write_whole
from salve.report.blocks import MOST_ROWS, Cell, FigureFolder, Section, TableBlock
from salve.report.explorer.page import write_explorer
from salve.report.first import first_lines
from salve.report.remarks import cautions
from salve.report.sections.compare import compare
from salve.report.sections.control import (
    CHANGE,
    INTERVALS,
    accuracy_cell,
    change_cell,
    control,
    strength_cell,
    verdict_cell,
)
from salve.report.sections.diagnose import diagnose
from salve.report.sections.discover import classifier, discover
from salve.report.sections.evaluation import evaluation
from salve.report.sections.repair import audit, repair
from salve.report.sections.validate import validation
from salve.report.tables import Headline, class_summary, failing_first, headline, records
from salve.report.terms import Linker, subscripts, terms_of
from salve.report.text import MISSING, count_of, file_name, latent_name, number, percent, plural, slug
from salve.results import Artifacts

#: The table with one row per class, which the report writes.
CLASSES_CSV = "class-by-class.csv"


def write_report(
    out: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    config: str,
    artifacts: Mapping[str, Path],
    commands: Sequence[str],
    remarks: Sequence[str] = (),
) -> Path:
    """Write ``index.html`` with its figures, tables and edit files into a folder that can be moved as a whole.

    Args:
        out: folder to write into; made if it is not there.
        title: heading of the page.
        facts: names and values shown at the top, in their order.
        config: resolved configuration as YAML, shown at the end.
        artifacts: kind ("classifier", "activations", "sae", "features", "validate", "control", "diagnose") → the
            folder that the stage wrote. A section without its artifacts says which stage to run.
        commands: what to type to repeat this run.
        remarks: cautions about data, weights and SAE. They stand before all results, with those that
            :func:`salve.report.remarks.cautions` adds.

    Returns:
        Path of ``index.html``. Beside it: ``explorer.html``, if the features were read;
        ``tables/<kind>-<table>.csv`` (byte-equal copies) and
        ``tables/class-by-class.csv``, ``figures/*.png`` and ``*.svg``, ``edits/*`` (copies of the edit files).
        The same input gives the same bytes.
    """
    found = Artifacts(artifacts)
    for name in ("figures", "tables"):
        (out / name).mkdir(parents=True, exist_ok=True)
    tables = _copy_tables(found, out / "tables")
    edit_files = _copy_edit_files(found, out)
    rows = class_summary(found)
    if len(rows):
        write_table(out / "tables" / CLASSES_CSV, rows)
        tables = [CLASSES_CSV, *tables]
    main = headline(found, rows)
    terms = terms_of(main.verdict, "own" in found.record("validate", "maps.json").get("kinds", ()))
    figure_folder = FigureFolder(out / "figures")
    sections = [build(found, figure_folder) for build in (classifier, discover, validation, control, diagnose)]
    # A repair is the answer that its run was made for, so it stands first.
    answers = [section for section in (repair(found), audit(found, figure_folder)) if section is not None]
    # Of the other stages, those that its run has not gone through would only stand in between.
    sections = [one for one in sections if one.blocks or not answers]
    sections = [*answers, *sections, *(one for one in (compare(found), evaluation(found)) if one is not None)]
    told = main.verdict is not None or not answers
    lines = first_lines(found, main, rows)
    explorer = write_explorer(out, found, title=title, verdict=[f"{line.question}: {line.answer}" for line in lines])
    page = _template(Linker(terms)).render(
        title=title,
        facts=dict(facts),
        verdict=lines,
        explorer="" if explorer is None else explorer.name,
        statement=statement(found, main),
        remarks=cautions(found, remarks),
        terms=terms if main.classes else [],
        cards=_cards(main) if told else [],
        summary=_summary_block(rows) if len(rows) and told else None,
        sections=sections,
        nav=[*sections, Section("reproduce", "Reproduce", (), "")],
        commands=list(commands),
        config=config,
        tables=tables,
        edit_files=[name for name in edit_files if name.endswith(".json")],
        most_links=MOST_ROWS,
    )
    path = out / "index.html"
    write_whole(path, page)
    return path


def write_page(
    out: Path,
    *,
    title: str,
    statement: str,
    sections: Sequence[Section],
    commands: Sequence[str],
    tables: Sequence[str],
) -> Path:
    """Write ``index.html`` of sections whose figures and tables lie in ``out`` already; returns its path."""
    page = _template(Linker([])).render(
        title=title,
        statement=statement,
        sections=sections,
        commands=list(commands),
        tables=list(tables),
        nav=[*sections, Section("reproduce", "Reproduce", (), "")],
        **{
            "verdict": [],
            "explorer": "",
            "facts": {},
            "remarks": [],
            "terms": [],
            "cards": [],
            "summary": None,
            "config": "",
            "edit_files": [],
        },
        most_links=MOST_ROWS,
    )
    path = out / "index.html"
    write_whole(path, page)
    return path


def _template(link: Linker) -> jinja2.Template:
    environment = page_environment()
    environment.filters["sub"] = lambda text: Markup(subscripts(str(escape(text))))
    environment.filters["terms"] = link
    return environment.get_template("page.html.j2")


def page_environment(*folders: Path) -> jinja2.Environment:
    """Finds templates in the report's folder and in others; their pages may include ``page.css``."""
    loader = jinja2.FileSystemLoader([Path(__file__).parent, *folders], encoding="utf-8")
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _copy_tables(artifacts: Artifacts, folder: Path) -> list[str]:
    names = []
    for kind, path in artifacts.files("*.csv"):
        names.append(f"{slug(kind)}-{slug(path.stem)}.csv")
        shutil.copyfile(path, folder / names[-1])
    return names


def _copy_edit_files(artifacts: Artifacts, out: Path) -> list[str]:
    names = []
    for _, path in artifacts.files("edits/*"):
        if path.suffix in (".json", ".safetensors"):
            (out / "edits").mkdir(exist_ok=True)
            # An edit file names the weights file that it shares with others, so a safe name must stay as it is.
            names.append(file_name(path.name))
            shutil.copyfile(path, out / "edits" / names[-1])
    return names


def statement(artifacts: Artifacts, main: Headline) -> str:
    """What was run and what came of it, in a few sentences."""
    record = artifacts.record("classifier", "classifier.json")
    site = artifacts.record("activations", "activations.json").get("site")
    if not main.classes:
        return "Nothing has been run yet."
    sentences = []
    network = f"The classifier ({record['backbone']})" if record.get("backbone") else "The classifier"
    if main.test_accuracy is not None:
        place = f"; its activations were read at the site {site}" if site else ""
        sentences.append(
            f"{network} has {plural(main.classes, 'class')}, and is right on {percent(main.test_accuracy)} of the test "
            f"images{place}."
        )
    if main.verdict is not None:
        verdict = main.verdict
        edit = f"the edit method {verdict.method}" if verdict.method else "suppressing one latent in the weights"
        sentences.append(
            f"For {count_of(verdict.separates)} of {plural(verdict.judged, 'class')} "
            f"({percent(verdict.confidence, 0)} interval: {verdict.range}), {edit} "
            f"separates the class, at a strength α that select images chose: {verdict.meaning}."
        )
    if main.flip_low is not None and main.flip_high is not None:
        if math.isinf(main.flip_low):
            sentences.append("In every class, most images keep their class at any strength (α_flip is ∞).")
        else:
            sentences.append(
                "The strength at which the median image of a class loses its class (α_flip) is "
                f"{main.flip_range} over the classes."
            )
    if main.pointing is not None:
        chance = percent(main.random_pointing, 0)
        beside = "" if chance == MISSING else f" (a random latent's: {chance})"
        sentences.append(
            f"The peak of a latent's Grad-FAM map lies on its class's concept, or within the tolerance in pixels that "
            f"the settings give (validate.pointing_tolerance), in {percent(main.pointing, 0)} of images{beside}."
        )
    return " ".join(sentences)


def _cards(main: Headline) -> list[tuple[str, str, str]]:
    """Value, name and remark of each headline number that is known."""
    cards = []
    if main.test_accuracy is not None:
        cards.append(
            (
                percent(main.test_accuracy),
                "accuracy on test images",
                f"{plural(main.classes, 'class')}, before any edit",
            )
        )
    if main.verdict is not None:
        verdict = main.verdict
        cards.append(
            (
                f"{count_of(verdict.separates)} of {count_of(verdict.judged)}",
                "classes separate",
                f"{percent(verdict.confidence, 0)} interval: {verdict.range}",
            )
        )
    if main.flip_low is not None:
        cards.append((main.flip_range, "median α_flip", "lowest to highest class"))
    if main.pointing is not None:
        remark = "" if main.random_pointing is None else f"random latent: {percent(main.random_pointing, 0)}"
        cards.append((percent(main.pointing, 0), "pointing game", remark))
    return cards


def _summary_block(summary: pd.DataFrame) -> TableBlock:
    """The per-class summary; columns that no class has a value for are left out."""
    rows = failing_first(records(summary), MOST_ROWS)
    measured = any(percent(row["pointing"]) != MISSING for row in rows)
    header = [
        *(Cell("class"), Cell("accuracy", "num"), Cell("latent"), Cell("kind"), Cell("α", "num"), Cell("after", "num")),
        *(Cell(f"others: mean\u00a0{CHANGE}", "num"), Cell("largest loss", "num"), Cell("separates")),
        *([Cell("pointing game", "num")] if measured else []),
        Cell("median α_flip", "num"),
    ]
    body = [
        [
            Cell(row["class"]),
            Cell(percent(row["test_accuracy"]), "num"),
            Cell(latent_name(row["latent"], row["sign"]), "nowrap"),
            Cell(row["kind"] or MISSING, f"kind-{slug(row['kind'])}"),
            strength_cell(row),
            accuracy_cell(row),
            *(change_cell(row, "others_mean_change"), change_cell(row, "others_worst_loss", row["worst_class"])),
            verdict_cell(row),
            *([_pointing_cell(row["pointing"], row["random_pointing"])] if measured else []),
            Cell(number(row["alpha_flip_median"]), "num"),
        ]
        for row in rows
    ]
    title = (
        "Class by class, all of test images. Accuracy: before any edit. α: the strength of the grid that separates the "
        "class most selectively on select images, else that takes it away there; ∞ where none does, and the strongest "
        "one is used. After, others: at that strength; changes and losses of the other classes' accuracy in percentage "
        f"points. Below them: {INTERVALS}"
    )
    return TableBlock(title, header, body, CLASSES_CSV)


def _pointing_cell(value: float, chance: float) -> Cell:
    beside = percent(chance, 0)
    return Cell(percent(value, 0), "num", "" if beside == MISSING else f"random\u00a0{beside}")
