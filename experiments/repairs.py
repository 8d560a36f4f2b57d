"""Repairs beside their rivals: what finished runs of stage ``repair`` say of each method, over seeds and labels.

salve -m experiment=repair/quickstart seed=0,1,2,3,4 'repair.rivals=[inlp,mute,pruning]' sweep.name=repairs
python -m experiments.repairs outputs/sweeps/repairs

Sweeps with other numbers of labels go beside it: audit.labels=100000 takes all, and without labels audit.labels=0 takes
the suspects of a class that a person names, 'repair.suspects={clinic: audit}'.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.compare import intervals
from experiments.figures import PRINT_WIDTH, printed, save
from experiments.testbeds import as_command
from salve import open_sweep
from salve.artifacts import write_table
from salve.report.style import BLUE, GREEN, GREY, ORANGE, new_figure, percent_axis
from salve.report.text import is_missing, percent, points_and_half, slug
from salve.results import Run
from salve.types import UserError

MEASURES = {"worst_group": "worst group", "average": "average", "counterfactual_flips": "changed by the mark"}
#: All select images whose attribute is known.
ALL = "all"
#: The states of a repaired network that stand in the table beside the methods.
STATES = {"before": "untouched", "recalibrated": "new biases alone", "after": "the repair that select chose"}


def rows_of(run: Run) -> pd.DataFrame:
    """One row per method and state of a run: ``method``, ``permanent`` and the measures on test images, as shares.

    Raises:
        UserError: the run compared its repair with nothing.
    """
    if "rivals.csv" not in run.files("repair"):
        raise UserError(f"The run {run.folder} holds no rivals; make it again with repair.rivals=[inlp,mute].")
    record, rivals = run.record("repair", "repair.json"), run.table("repair", "rivals.csv")
    known = [name for name in MEASURES if name in rivals]
    states = [
        {"method": title, "permanent": True, **{name: record[f"{name}_{state}"] for name in known}}
        for state, title in STATES.items()
    ]
    return pd.concat([pd.DataFrame(states), rivals[["method", "permanent", *known]]], ignore_index=True)


def labels_of(run: Run) -> str:
    """How many labels chose the repair: ``0``, so many a group, or ``all``."""
    record = run.record("repair", "repair.json")
    if record["labels"] and record["labelled"] == record["could_be_labelled"]:
        return ALL
    return f"{record['labels']} a group" if record["labels"] else "0"


def by_labels(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs by their number of labels, the fewest first."""
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda one: int(one.record("repair", "repair.json")["labels"])):
        found.setdefault(labels_of(run), []).append(run)
    return found


def table_of(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per method: over the runs the mean of each measure, and half the 95 % interval of the mean of its gain
    over the untouched network, paired by run (``<measure>_gain``, ``<measure>_gain_half``)."""
    every = pd.concat([rows_of(run).assign(run=number) for number, run in enumerate(runs)], ignore_index=True)
    untouched = every[every["method"] == STATES["before"]].set_index("run")
    known = [name for name in MEASURES if name in every]
    rows = []
    for method, own in every.groupby("method", sort=False):
        mine = own.set_index("run")
        gains = {f"{name}_gain": mine[name] - untouched.loc[mine.index, name] for name in known}
        means = {name: mine[name].mean() for name in known}
        rows.append(
            {"method": method, "permanent": bool(mine["permanent"].all()), "runs": len(mine)} | means | intervals(gains)
        )
    return pd.DataFrame(rows)


def as_markdown(table: pd.DataFrame) -> str:
    """The table as Markdown: each measure, and in brackets its gain over the untouched network."""
    known = [name for name in MEASURES if name in table]
    lines = [
        f"| method | {' | '.join(MEASURES[name] for name in known)} | in the weights |",
        f"|---|{'---|' * len(known)}---|",
    ]
    for row in table.to_dict("records"):
        cells = [f"{percent(row[name])}{_gain(row, name)}" for name in known]
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {'yes' if row['permanent'] else 'no'} |")
    return "\n".join(lines) + "\n"


def _gain(row: dict[str, Any], name: str) -> str:
    if row["method"] == STATES["before"]:
        return ""
    return f" ({points_and_half(row[f'{name}_gain'], row.get(f'{name}_gain_half'), signed=True)})"


@printed
def gains_figure(table: pd.DataFrame) -> Figure:
    """A forest: each method's gain of the worst group over the untouched network, with its interval."""
    shown = table[table["method"] != STATES["before"]].iloc[::-1]
    figure = new_figure(PRINT_WIDTH, 0.8 + 0.24 * len(shown))
    axes = figure.subplots()
    own = list(STATES.values())
    for at, row in enumerate(shown.to_dict("records")):
        colour = (
            GREEN
            if row["method"] == own[-1]
            else GREY
            if row["method"] in own
            else BLUE
            if row["permanent"]
            else ORANGE
        )
        half = row.get("worst_group_gain_half", 0.0)
        half = 0.0 if is_missing(half) else half
        axes.errorbar(
            row["worst_group_gain"], at, xerr=half, fmt="o" if row["permanent"] else "D", color=colour, markersize=4
        )
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(shown)), shown["method"])
    axes.set(xlabel="gain of the worst group over the untouched network (diamonds: not in the weights)")
    percent_axis(axes.xaxis)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of a sweep's repairs; write it, and its figure."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.repairs", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "sweep", type=Path, nargs="+", help="folder of a sweep over seeds, with stage repair and repair.rivals"
    )
    parser.add_argument("--output-dir", type=Path, help="where table and figure go (default: the sweep's folder)")
    given = parser.parse_args(arguments)
    runs = [run for sweep in given.sweep for run in open_sweep(sweep).finished]
    if not runs:
        raise UserError(f"No run in {', '.join(map(str, given.sweep))} is finished.")
    folder = given.output_dir or given.sweep[0]
    folder.mkdir(parents=True, exist_ok=True)
    tables, texts = [], []
    for labels, own in by_labels(runs).items():
        table = table_of(own)
        tables.append(table.assign(labels=labels))
        texts.append(f"Labels: {labels} ({len(own)} runs)\n\n{as_markdown(table)}")
        save(gains_figure(table), folder, f"repairs-{slug(labels)}" if len(given.sweep) > 1 else "repairs")
    write_table(folder / "repairs.csv", pd.concat(tables, ignore_index=True))
    text = "\n".join(texts)
    (folder / "repairs.md").write_text(text, encoding="utf-8")
    print(f"Gains over the untouched network, with 95 % intervals over runs\n\n{text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(as_command("experiments.repairs", main))
