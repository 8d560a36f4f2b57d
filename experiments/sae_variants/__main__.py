"""``python -m experiments.sae_variants``: which sparse autoencoder gives the cleanest edits?"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from experiments.experiment import joined
from experiments.figures import save
from experiments.sae_variants.runs import EXPERIMENTS, FULL, QUICK, collect, make
from experiments.sae_variants.tables import NAME, Target, comparison_figure, markdown, reference_summary, summary
from experiments.testbeds import as_command
from salve.artifacts import write_table
from salve.types import UserError

#: Where variants are compared. L0 means something else for linear latents, which are never zero; FVE does not.
_L0 = (Target("l0", 4), Target("l0", 8), Target("l0", 16))
TARGETS = {
    "concepts": (Target("best"), Target("fve", 0.85), Target("fve", 0.92), *_L0),
    "imagenette": (Target("best"), Target("fve", 0.75), Target("fve", 0.85), *_L0),
}

EPILOG = """\
written into <output-dir>/experiments/sae_variants:
  runs.csv, edits.csv       every run; every run's edit of every class
  references.csv            random directions and the classes' own
  summary.csv, summary.md   the variants at matched FVE and L0, with intervals
  sae-variants.pdf, .png    the figure

Finished runs are found and not made again. SETTING is any of salve's, such as
cluster=joblib or trainer=cpu, for all runs.
"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return as_command("sae_variants", partial(_main, arguments))


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sae_variants",
        description="Make the runs of all SAE variants, or find them, and compare the edits that their latents give.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="key=value")
    parser.add_argument("--data", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--imagenette", metavar="FOLDER", default=os.environ.get("SALVE_IMAGENETTE"))
    parser.add_argument("--weights", metavar="FILE", default=os.environ.get("SALVE_RESNET18"), help="of ResNet-18")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    parser.add_argument("--quick", action="store_true", help="tiny runs that only show that everything works")
    compare(parser.parse_args(arguments))
    return 0


def compare(given: argparse.Namespace) -> None:
    """Make or find the runs, and write tables and figure.

    Raises:
        UserError: Imagenette was not given, or some runs could not be made.
    """
    if "imagenette" in given.data and not given.imagenette:
        raise UserError("Imagenette's folder is not known; give --imagenette FOLDER, or only --data concepts.")
    plan = QUICK if given.quick else FULL
    where = [f"data.root={given.imagenette}"] + ([f"backbone.weights={given.weights}"] if given.weights else [])
    for data in given.data:
        make(data, plan, given.output_dir, [*(where if data == "imagenette" else []), *given.settings])
    found = [collect(data, plan, given.output_dir) for data in given.data]
    tables = {name: joined([getattr(one, name) for one in found]) for name in ("runs", "edits", "references")}
    tables["summary"] = summary(tables["runs"], TARGETS)
    references = reference_summary(tables["references"])
    folder = given.output_dir / "experiments" / f"sae_variants{plan.name}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table)
    (folder / "summary.md").write_text(markdown(tables["summary"], references), encoding="utf-8")
    save(comparison_figure(tables["runs"], tables["summary"], references), folder, NAME)
    print(f"Tables and figure: {folder}")


if __name__ == "__main__":
    sys.exit(main())
