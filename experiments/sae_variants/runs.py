"""The runs of the comparison: which there are, how to start them, and what they found."""

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import pandas as pd
import torch
from torch import Tensor

from experiments.compare import MatchedEdit
from experiments.runs import SAERun, suppressed
from experiments.sae_variants.references import alignment, class_directions, reference_edits
from salve.backbones.tail import LinearTail
from salve.ending import run_child
from salve.results import Sweep, open_sweep
from salve.types import Split, UserError


class Family(NamedTuple):
    """Variants that are made sparse by the same setting, its values, and their further settings."""

    variants: tuple[str, ...]
    knob: str
    values: tuple[float, ...]
    settings: tuple[str, ...] = ()


class Plan(NamedTuple):
    """What is run on each data set.

    Attributes:
        families: the SAEs. seeds: of the SAEs. name: the end of the sweep's. settings: beyond the experiment's.
    """

    families: tuple[Family, ...]
    seeds: tuple[int, ...]
    name: str = ""
    settings: tuple[str, ...] = ()


PRICED, BUDGETED = ("linear_l1", "relu_l1", "gated", "jumprelu"), ("topk", "batch_topk", "matryoshka")
FULL = Plan(
    (
        Family(PRICED, "sae.sparsity", (0.5, 1, 2, 3, 5, 10, 20)),
        # Their papers train them with AuxK. Without it most of their latents die here.
        Family(BUDGETED, "sae.k", (1, 2, 3, 4, 8, 20), ("sae.auxk=32",)),
    ),
    seeds=(0, 1, 2, 3, 4),
)
#: Few images and little training, to see that everything works; the numbers mean nothing.
QUICK = Plan(
    (Family(PRICED, "sae.sparsity", (0.1, 1)), Family(BUDGETED, "sae.k", (2, 4), ("sae.auxk=8",))),
    seeds=(0, 1),
    name="-quick",
    settings=("sae.dictionary_size=32", "sae.epochs=3", "edit.alpha=[0,1,2,5,10,20,50]", "sae.learning_rate=0.01"),
)
QUICK_DATA = {
    "concepts": ("data.train_per_class=30", "data.select_per_class=10", "data.test_per_class=10", "finetune.epochs=2"),
    "imagenette": ("data.limit_per_class=20",),
}
EXPERIMENTS = {"concepts": "beyond/sae_variants", "imagenette": "beyond/sae_variants_imagenette"}

#: Metrics of a run that are compared.
MEASURES = (
    *("fve", "l0", "dead_fraction", "downstream_accuracy", "concept_auroc"),
    *("separating", "separating_published"),
    # Runs are matched or chosen by these.
    *("select_fve", "select_l0"),
)


#: Measures of a run's edits: their means over classes.
MEANS = ("selectivity", "select_selectivity", "after", "drift", "worst_loss", "alignment")


def sweep_name(data: str, plan: Plan) -> str:
    """The folder of a data set's runs under ``<output_dir>/sweeps``."""
    return f"sae_variants-{data}{plan.name}"


def commands(data: str, plan: Plan, output_dir: Path, settings: Sequence[str]) -> Iterator[list[str]]:
    """One sweep per family; finished runs are not made again."""
    quick = QUICK_DATA[data] if plan is QUICK else ()
    for family in plan.families:
        yield [
            *(sys.executable, "-m", "salve.cli", f"experiment={EXPERIMENTS[data]}"),
            *(f"output_dir={output_dir}", f"sweep.name={sweep_name(data, plan)}"),
            f"sae={','.join(family.variants)}",
            f"{family.knob}={','.join(f'{value:g}' for value in family.values)}",
            f"sae.seed={','.join(map(str, plan.seeds))}",
            *(*plan.settings, *family.settings, *quick, *settings),
        ]


def make(data: str, plan: Plan, output_dir: Path, settings: Sequence[str]) -> None:
    """Make a data set's runs, each family in its own process.

    Raises:
        UserError: some runs could not be made; the sweep has printed which and why.
    """
    for command in commands(data, plan, output_dir, settings):
        status = run_child(command)
        if status:
            raise UserError(f"A sweep on {data} ended with status {status}; see above. The same command goes on.")


class Found(NamedTuple):
    """What the runs on a data set found.

    Attributes:
        runs: one row per run: ``data``, ``variant``, ``knob``, ``seed``, ``run`` (its key), ``MEASURES``, and over its
            classes the mean ``selectivity``, ``select_selectivity``, ``alignment``, ``after``, ``drift`` and
            ``worst_loss`` (of those reached), ``reached`` and ``classes``.
        edits: one row per run and class. references: see :func:`reference_edits`.
    """

    runs: pd.DataFrame
    edits: pd.DataFrame
    references: pd.DataFrame


def collect(data: str, plan: Plan, output_dir: Path) -> Found:
    """Read the runs of a data set.

    Raises:
        UserError: a planned run is missing, or there are two of it that differ in other settings.
    """
    planned = _planned(open_sweep(output_dir / "sweeps" / sweep_name(data, plan), output_dir / "artifacts"), plan)
    first = next(iter(planned.values())).found
    tensors = first.tensors("classifier", "model.safetensors")
    # ``fc`` is the last layer of the ResNets of both experiments.
    tail = LinearTail(tensors["fc.weight"].float(), tensors["fc.bias"].float())
    captured = [first.activations(split) for split in get_args(Split)]
    train, select, test = ((split.activations, split.labels) for split in captured)
    own = class_directions(tail.weight, *train)
    rows, edits = [], []
    for (variant, knob, seed), run in planned.items():
        found = {"data": data, "variant": variant, "knob": knob, "seed": seed, "run": run.found.key}
        classes = _edits(run).assign(alignment=_alignment(run, own))
        edits.append(classes.assign(**found))
        measures = {name: run.metrics.get(name) for name in MEASURES}
        rows.append({**found, **measures, **over_classes(classes)})
    runs = pd.DataFrame(rows)
    runs[list(MEASURES)] = runs[list(MEASURES)].astype(float)
    alphas = torch.tensor(first.flat_settings["edit.alpha"], dtype=torch.float32)
    references = reference_edits(tail, train, select, test, alphas, first.classes, plan.seeds)
    return Found(runs, pd.concat(edits, ignore_index=True), references.assign(data=data))


def over_classes(edits: pd.DataFrame) -> dict[str, float]:
    """Means of a run's edits over the classes; those without images do not count."""
    table = edits[edits["selectivity"].notna()]
    means = {name: float(table[name].mean()) for name in MEANS}
    return {**means, "reached": int(table["reached"].sum()), "classes": len(table)}


def _planned(sweep: Sweep, plan: Plan) -> dict[tuple[str, float, int], SAERun]:
    """By variant, knob and seed, the runs of a plan, in its order."""
    families = {variant: family for family in plan.families for variant in family.variants}
    order = [
        (variant, float(value), seed)
        for variant, family in families.items()
        for value in family.values
        for seed in plan.seeds
    ]
    found: dict[tuple[str, float, int], SAERun] = {}
    for run in map(SAERun, sweep.finished):
        variant = run.settings["sae.variant"]
        if variant not in families:
            continue
        knob = families[variant].knob
        key = (variant, float(run.settings[knob]), run.seed)
        if key in found and key in order:
            raise UserError(
                f"{sweep.folder} holds two runs of {variant}, {knob}={key[1]:g}, sae.seed={key[2]}, "
                "which differ in other settings or in the version of salve; choose an empty --output-dir."
            )
        found[key] = run
    if missing := [key for key in order if key not in found]:
        raise UserError(f"{sweep.folder} lacks {len(missing)} of {len(order)} runs, such as {missing[0]}.")
    return {key: found[key] for key in order}


def _edits(run: SAERun) -> pd.DataFrame:
    """Each class's edit on test at the strength that select has chosen, and its selectivity on select itself.

    No strength reaches a class that has no latent.
    """
    none = MatchedEdit(False, math.inf, math.nan, math.nan, 0.0, math.nan, math.nan, 0.0)
    classes = run.found.classes
    found = {one.name: (one.edit, one.on_select) for one in suppressed(run, classes)}
    pairs = [(name, *found.get(name, (none, none))) for name in classes]
    return pd.DataFrame(
        [{"class": name, **edit._asdict(), "select_selectivity": chose.selectivity} for name, edit, chose in pairs]
    )


def _alignment(run: SAERun, directions: Tensor) -> list[float]:
    """See :func:`references.alignment`; NaN for a class without a latent."""
    latents = torch.tensor(run.selected["latent"].fillna(-1).to_numpy(int))
    found = alignment(run.sae.decoder[:, latents.clamp_min(0)].T, directions)
    return torch.where(latents >= 0, found, torch.nan).tolist()
