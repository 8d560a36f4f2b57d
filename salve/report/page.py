"""The report of one run: a page that is read from top to bottom, its figures and its tables."""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from salve.report.blocks import Cell, Section, Shelf, TableBlock
from salve.report.inputs import Artifacts, records
from salve.report.sections.control import control, verdict_cell
from salve.report.sections.diagnose import diagnose
from salve.report.sections.discover import classifier, discover
from salve.report.sections.validate import validation
from salve.report.tables import Headline, class_summary, headline
from salve.report.text import MISSING, label, latent_name, number, percent, plural, points, slug


def write_report(
    out: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    config: str,
    artifacts: Mapping[str, Path],
    commands: Sequence[str],
) -> Path:
    """Write ``index.html`` with its figures, tables and recipes into a folder that can be moved as a whole.

    Args:
        out: folder to write into; made if it is not there.
        title: heading of the page.
        facts: names and values shown at the top, in their order.
        config: resolved configuration as YAML, shown at the end.
        artifacts: kind ("classifier", "activations", "sae", "features", "validate", "control", "diagnose") → the
            folder that the stage wrote. A part whose artifacts are missing says which stage to run.
        commands: what to type to get this run again.

    Returns:
        Path of ``index.html``. Beside it: ``tables/<kind>-<table>.csv`` (byte-equal copies), ``figures/*.png`` and
        ``*.svg``, ``recipes/*`` (copies of the edits' recipes). The same input gives the same bytes.
    """
    found = Artifacts(artifacts)
    for name in ("figures", "tables"):
        (out / name).mkdir(parents=True, exist_ok=True)
    tables = _copy_tables(found, out / "tables")
    recipes = _copy_recipes(found, out)
    rows = class_summary(found)
    main = headline(found, rows)
    shelf = Shelf(out / "figures")
    sections = [build(found, shelf) for build in (classifier, discover, validation, control, diagnose)]
    page = _template().render(
        title=title,
        facts=dict(facts),
        statement=statement(found, main),
        cards=_cards(main),
        summary=_summary_block(found) if len(rows) else None,
        sections=sections,
        nav=[*sections, Section("reproduce", "Reproduce", (), "")],
        commands=list(commands),
        config=config,
        tables=tables,
        recipes=recipes,
    )
    path = out / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _subscripts(text: str) -> Markup:
    """Escaped text with the indices of α set low."""
    return Markup(re.sub(r"α_(flip|logit)", r"α<sub>\1</sub>", str(escape(text))))


def _template() -> jinja2.Template:
    environment = page_environment()
    environment.filters["sub"] = _subscripts
    return environment.get_template("page.html.j2")


def page_environment(*folders: Path) -> jinja2.Environment:
    """Templates of the report, and of other folders: their pages may include ``page.css``."""
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


def _copy_recipes(artifacts: Artifacts, out: Path) -> list[str]:
    names = []
    for _, path in artifacts.files("recipes/*"):
        if path.suffix in (".json", ".safetensors"):
            (out / "recipes").mkdir(exist_ok=True)
            names.append(f"{slug(path.stem)}{path.suffix}")
            shutil.copyfile(path, out / "recipes" / names[-1])
    return names


def statement(artifacts: Artifacts, main: Headline) -> str:
    """What was run and what came out, in a few sentences."""
    record = artifacts.record("classifier", "classifier.json")
    site = artifacts.record("activations", "activations.json").get("site")
    if not main.classes:
        return "Nothing has been run yet."
    sentences = []
    network = f"The classifier ({record['backbone']})" if record.get("backbone") else "The classifier"
    if main.val_accuracy is not None:
        place = f"; its activations were read at {site}" if site else ""
        sentences.append(
            f"{network} tells {plural(main.classes, 'class')} apart with {percent(main.val_accuracy)} accuracy on "
            f"validation images{place}."
        )
    if main.judged:
        sentences.append(
            f"For {main.separate} of {plural(main.judged, 'class')}, suppressing one latent in the weights takes the "
            "class to 5 % accuracy or less while the mean accuracy of the others changes by less than 3 points: the "
            f"class “separates”. For {main.strictly} of them this holds even if the others' gains may not make up for "
            "losses (the mean of their absolute changes)."
        )
    if main.flip_low is not None and main.flip_high is not None:
        if math.isinf(main.flip_low):
            sentences.append("In every class, most images keep their class at any strength.")
        else:
            sentences.append(
                f"The strength at which the median image of a class loses its class is {main.flip_range} over the "
                "classes."
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
    if main.val_accuracy is not None:
        cards.append(
            (percent(main.val_accuracy), "validation accuracy", f"{plural(main.classes, 'class')}, before any edit")
        )
    if main.judged:
        cards.append(
            (
                f"{main.separate} of {main.judged}",
                "classes separate",
                f"≤ 5 % left, others within 3 points; {main.strictly} strictly",
            )
        )
    if main.flip_low is not None:
        cards.append((main.flip_range, "median α_flip", "lowest to highest class"))
    if main.pointing is not None:
        remark = "" if main.random_pointing is None else f"random latent: {percent(main.random_pointing, 0)}"
        cards.append((percent(main.pointing, 0), "pointing game", remark))
    return cards


def _summary_block(artifacts: Artifacts) -> TableBlock:
    """The per-class summary; columns that no class has a value for are left out."""
    rows = records(class_summary(artifacts))
    measured = any(percent(row["pointing"]) != MISSING for row in rows)
    header = [
        *(Cell("class"), Cell("accuracy", "num"), Cell("latent"), Cell("kind"), Cell("α to ≤\u00a05\u00a0%", "num")),
        *(Cell("others: mean\u00a0|\u2060Δ\u2060|", "num"), Cell("worst Δ", "num"), Cell("separates")),
        *([Cell("pointing game", "num")] if measured else []),
        Cell("median α_flip", "num"),
    ]
    body = [
        [
            Cell(row["class"]),
            Cell(percent(row["val_accuracy"]), "num"),
            Cell(latent_name(row["latent"], row["sign"]), "nowrap"),
            Cell(row["kind"] or MISSING, f"kind-{slug(row['kind'])}"),
            Cell(number(row["alpha"]), "num"),
            Cell(points(row["others_mean_change"], signed=False), "num"),
            Cell(points(row["others_worst_change"]), "num", label(row["worst_class"], 30)),
            verdict_cell(row["separates"], row["reason"]),
            *([_pointing_cell(row["pointing"], row["random_pointing"])] if measured else []),
            Cell(number(row["alpha_flip_median"]), "num"),
        ]
        for row in rows
    ]
    title = (
        "Class by class. α to ≤ 5 %: the first strength of the grid that takes the class to 5 % accuracy; others: "
        "change of the other classes' accuracy there, in percentage points; (+) or (−): the latent's sign for the "
        "class."
    )
    return TableBlock(title, header, body)


def _pointing_cell(value: float, chance: float) -> Cell:
    beside = percent(chance, 0)
    return Cell(percent(value, 0), "num", "" if beside == MISSING else f"random\u00a0{beside}")
