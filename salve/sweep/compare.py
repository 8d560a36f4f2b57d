# SPDX-License-Identifier: MIT
"""``salve-compare``: fit edit methods to every class of a network, and compare them where they have the same effect."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from salve.edit_settings import RETRAINED
from salve.ending import as_told, run_child
from salve.system import in_one_sentence, refused_by_system
from salve.types import UserError

if TYPE_CHECKING:  # they take seconds
    import pandas as pd
    from rich.console import Console

    from salve.report.blocks import TableBlock
    from salve.results import Sweep

RECIPE = "beyond/rivals"
#: What --quick adds to the recipe: three classes, two SAEs of fewer steps, half of the images.
QUICK = ("sae.seed=0,1", "sae.steps=300", "compare.images=20", "compare.targets=3")
#: What it adds on the drawn scenes, whose networks are small enough to be trained without each class, and elsewhere.
QUICK_SCENES = (
    *("compare.retrained=true", "finetune.epochs=6"),
    *("data.train_per_class=200", "data.select_per_class=20", "data.test_per_class=20"),
)
QUICK_IMAGES = ("data.limit_per_class=100", "finetune.epochs=2")
EPILOG = """\
An edit takes one class away; of all others it should change nothing. Each
method gets the strength at which it takes the class to 5 % of select images,
and is measured there on test images. SETTINGs are salve's. Those that you list
with commas are swept, such as layer and sae.seed; the rest holds for all runs.

how to read the table:
  selectivity     what the class loses minus the mean change of the others
  first ahead     by how much the first method is more selective, seed by seed
  taken           classes that some strength takes to 5 %; the others count as 0
  for good        a plain state_dict can hold the edit
  random_...      controls: an edit that is not better than these shows nothing
On the page also: weights changed, seconds, images and labels that a method
uses, and what else compare.retrained=true and compare.relearn=[10,100] measure.

written into <output_dir>/sweeps/<sweep.name>:
  compare/index.html   the table and its figure
  compare/tables/      edits.csv, one row per site, seed, method and class, and
                       methods.csv, means with 95 % intervals over seeds

The same command again makes only what is missing.

examples:
  salve-compare --quick
      a first look in minutes, on the drawn scenes: three classes, two SAEs, and
      networks that never saw the class beside the edited ones
  salve-compare
      all methods on the drawn scenes, at the last site
  salve-compare experiment=imagenette/resnet18 data.root=FOLDER \\
      backbone.weights=FILE layer=last,layer3.0.conv1
  salve-compare compare.methods=[gate,mine] compare.variants.mine._target_=my.Method
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    return as_told(partial(_main, arguments), "salve-compare: stopped; the same command continues it.")


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="salve-compare",
        description="Is an edit through an SAE better than others, for your network? Fit every edit method to every "
        "class, compare them at a matched effect, and print one table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the work: three classes, two SAEs, fewer images and steps; what you set yourself stays",
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="any of salve's, as key=value")
    given = parser.parse_args(arguments)
    typed, output_dir, name = command_of(given.settings, given.quick)
    if status := run_child([sys.executable, "-m", "salve.cli", *typed]):
        print(f"salve-compare: some runs could not be made (see above): salve {shlex.join(typed)}", file=sys.stderr)
        return status
    # Imported here because they take seconds.
    from rich.console import Console

    from salve.results import open_sweep

    try:
        console = Console(markup=False, emoji=False)
        page = write_comparison(open_sweep(output_dir / "sweeps" / name), f"salve {shlex.join(typed)}", console)
    except UserError as error:
        print(f"salve-compare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"salve-compare: {in_one_sentence(error)}", file=sys.stderr)
        return 1
    print(f"Page: {page}")
    return 0


def command_of(settings: Sequence[str], quick: bool = False) -> tuple[list[str], Path, str]:
    """The arguments of ``salve`` that make the runs, the folder of results, and the name of the sweep."""
    values = dict(setting.split("=", 1) for setting in settings if "=" in setting)
    recipes = [part for part in values.get("experiment", "").strip("[]").split(",") if part and part != RECIPE]
    kept = [setting for setting in settings if not setting.startswith("experiment=")]
    name = values.get("sweep.name", f"rivals{'-quick' * quick}")
    named = [] if "sweep.name" in values else [f"sweep.name={name}"]
    typed_keys = {setting.partition("=")[0] for setting in settings}
    shorter: tuple[str, ...] = ()
    if quick:
        drawn = not recipes and typed_keys.isdisjoint({"data", "backbone", "data._target_"})
        shorter = (*QUICK, *(QUICK_SCENES if drawn else QUICK_IMAGES if has_limit(recipes, values) else ()))
    short = [setting for setting in shorter if setting.partition("=")[0] not in typed_keys]
    typed = ["-m", f"experiment=[{','.join([*recipes, RECIPE])}]", *named, *short, *kept]
    return typed, Path(values.get("output_dir", "outputs").strip("'\"")), name


def has_limit(recipes: Sequence[str], values: Mapping[str, str]) -> bool:
    """Whether the data that are named have the setting ``data.limit_per_class``."""
    folders = {recipe.partition("/")[0] for recipe in recipes}
    return values.get("data", "") in ("imagenette", "cifar100", "folder") or bool(folders & {"imagenette", "cifar100"})


def write_comparison(sweep: "Sweep", command: str, console: "Console") -> Path:
    """Print the table of a sweep, and write it with its figure and page into the sweep's folder.

    Returns:
        The page.

    Raises:
        UserError: no run has finished. OSError: the folder cannot be written into.
    """
    from salve.artifacts import write_table
    from salve.report.blocks import FigureFolder, Section
    from salve.report.page import write_page
    from salve.sweep.compared import edits_of, forest_figure, table_of
    from salve.sweep.summary import varying

    edits = edits_of(sweep, varying(sweep))
    table = table_of(edits)
    folder = sweep.folder / "compare"
    try:
        for name in ("tables", "figures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_table(folder / "tables" / "edits.csv", edits)
        write_table(folder / "tables" / "methods.csv", table)
        caption = (
            "Mean over classes, with the 95 % interval over SAE seeds. Blue: the edit is permanent, grey: it needs "
            "the SAE whenever the network runs, white: it takes no class away. Selectivity is what the class loses "
            "minus the mean absolute change of the others, on test images."
        )
        figure = FigureFolder(folder / "figures").figure(
            forest_figure(table),
            "methods",
            "Edit methods by selectivity, change of the others and KL",
            caption,
            "methods.csv",
        )
        page = write_page(
            folder,
            title="Edit methods at a matched effect",
            statement=statement(table),
            sections=[Section("methods", "Methods", [*figure, block(_named(table))], "compare")],
            commands=[command],
            tables=["edits.csv", "methods.csv"],
        )
    except OSError as error:
        raise refused_by_system(error, folder) or error from None
    _print(table, console)
    console.print(statement(table), soft_wrap=True, markup=False, highlight=False)
    return page


def _named(table: "pd.DataFrame") -> "pd.DataFrame":
    """The table with sites that say of which network they are, where there are several."""
    if table["backbone"].nunique() < 2:
        return table
    return table.assign(site=[f"{site} of {of}" for site, of in zip(table["site"], table["backbone"], strict=True)])


def statement(table: "pd.DataFrame") -> str:
    """Which edit is the most selective at each site, and how the first one compares with it."""
    from salve.report.text import plural, points

    said = []
    named = _named(table[table["method"] != RETRAINED])
    for (_, site), here in named.groupby(["backbone", "site"], sort=False):
        if here["selectivity"].isna().all():
            said.append(f"At {site}: nothing to compare, since the network is right on too few images of each class.")
            continue
        first, best = here.iloc[0], here.loc[here["selectivity"].idxmax()]
        permanent = here[here["permanent"].eq(True) & here["selectivity"].notna()]
        line = f"At {site}, over {plural(int(here['seeds'].max()), 'SAE')}: "
        if best["method"] == first["method"]:
            line += f"{first['method']} is the most selective ({points(first['selectivity'], False)} points)."
        else:
            behind, half = -best["ahead"], best["ahead_half"]
            sure = "" if half != half else f" ± {points(half, False)}"
            chance = ", which may be chance" if half == half and behind <= half else ""
            line += (
                f"{best['method']} is the most selective ({points(best['selectivity'], False)} points), "
                f"{points(behind, False)}{sure} points more than {first['method']}{chance}."
            )
        if len(permanent) and not best["permanent"]:
            other = permanent.loc[permanent["selectivity"].idxmax()]
            line += f" Of the permanent edits it is {other['method']} ({points(other['selectivity'], False)} points)."
        said.append(line)
    return " ".join(said)


HEADER = (
    *("site", "method", "selectivity", "first ahead by", "classes taken", "left", "others change", "worst loss", "KL"),
    *("permanent", "weights changed", "images used", "labels used", "seconds"),
)
#: Further columns where networks were trained without the classes.
GAP_HEADER = ("gap to retrained", "KL to retrained", "agrees with retrained")


def header_of(table: "pd.DataFrame") -> list[str]:
    """Names of the columns; of gaps and of relearning where they were measured."""
    steps = [name.removeprefix("relearned_") for name in _relearned(table)]
    gap = GAP_HEADER if "gap" in table else ()
    return [*HEADER, *gap, *(f"back after {number} steps" for number in steps)]


def _relearned(table: "pd.DataFrame | pd.Series") -> list[str]:
    names = table.columns if hasattr(table, "columns") else table.index
    return [name for name in names if name.startswith("relearned_") and not name.endswith("_half")]


def _cells(row: "pd.Series") -> list[str]:
    import numpy as np

    from salve.report.text import MISSING, is_missing, number, percent, points, yes_no

    def half(name: str, signed: bool = False) -> str:
        if is_missing(row[name]):
            return MISSING
        spread = row[f"{name}_half"]
        return points(row[name], signed) + ("" if is_missing(spread) else f" ± {points(spread, False)}")

    taken = f"{row['reached'] * row['classes']:.3g} of {row['classes']}" if not is_missing(row["reached"]) else MISSING
    return [
        *(str(row["site"]), str(row["method"]), half("selectivity"), half("ahead", True), taken),
        *(percent(row["after"]), half("drift"), half("worst_loss"), number(row["kl_others"], 2)),
        MISSING if is_missing(row["permanent"]) else yes_no(row["permanent"]),
        MISSING if is_missing(row["parameters"]) else f"{int(row['parameters']):,}",
        *(MISSING if is_missing(row[name]) else f"{int(row[name]):,}" for name in ("images", "labels")),
        number(np.nansum([row["fit_seconds"], row["apply_seconds"]]), 2) if "fit_seconds" in row else MISSING,
        *((half("gap"), number(row["gap_kl"], 2), percent(row["agreement"])) if "gap" in row else ()),
        *(percent(row[name]) for name in _relearned(row)),
    ]


def block(table: "pd.DataFrame") -> "TableBlock":
    """The table for the page."""
    from salve.report.blocks import Cell, TableBlock

    header = [Cell(name, "" if name in ("site", "method") else "num") for name in header_of(table)]
    rows = [
        [
            Cell(text, "" if name in ("site", "method") else "num")
            for name, text in zip(header_of(table), _cells(row), strict=True)
        ]
        for _, row in table.iterrows()
    ]
    return TableBlock("Means over classes; points are percentage points of test images", header, rows, "methods.csv")


#: What the terminal shows, in 80 columns; the page has all of :data:`HEADER`.
SHOWN = {"method": "method", "selectivity": "selectivity", "first ahead by": "first ahead", "classes taken": "taken",
         "others change": "others", "KL": "KL", "permanent": "for good"}  # fmt: skip


def _print(table: "pd.DataFrame", console: "Console") -> None:
    from rich import box
    from rich.table import Table

    for (backbone, site), here in table.groupby(["backbone", "site"], sort=False):
        shown = Table(
            title=f"{backbone}, {site}",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,  # so that 80 columns hold all
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for name in SHOWN.values():
            shown.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
        for _, row in here.iterrows():
            cells = dict(zip(header_of(table), _cells(row), strict=True))
            # Of what the others lose the page has the interval.
            cells["others change"] = cells["others change"].partition(" ±")[0]
            shown.add_row(*(cells[name] for name in SHOWN))
        console.print(shown, "")


if __name__ == "__main__":
    sys.exit(main())
