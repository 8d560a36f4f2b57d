"""The runs of the comparison: which there are, how to start them, and what they found.

Beside them stand edits without an SAE: along random directions, and along the classes' own directions.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from experiments.compare import Reader, matched_edit, random_directions
from experiments.runs import SAERun, edits_by_class
from salve.backbones.tail import LinearTail
from salve.editing.curves import edit_curves
from salve.ending import run_child
from salve.results import open_sweep
from salve.types import Activations, Labels, Split, UserError

RANDOM, ORACLE = "random direction", "class direction"


def class_directions(weight: Float[Tensor, "C M"], activations: Activations, labels: Labels) -> Float[Tensor, "C M"]:
    """Each class's evidence by channel, ``mean_{n ∈ k}(w_k ⊙ a_n)``, at unit norm ``[C, M]`` (docs/method.md).

    It reads the classifier's own weights and labels, which an SAE does not see.
    """
    means = torch.stack([activations[labels == k].mean(dim=0) for k in range(len(weight))])  # [C, M]
    return torch.nn.functional.normalize(weight * means, dim=1)


def alignment(columns: Float[Tensor, "C M"], directions: Float[Tensor, "C M"]) -> Float[Tensor, " C"]:
    """How well the gate of each class's latent covers the class: the cosine of ``|c_k|`` and ``|direction_k|``, 0 … 1.

    The gate acts by ``|c|``, so signs do not count. At 1 the edit closes channels as the class direction would.
    """
    return torch.nn.functional.cosine_similarity(columns.abs(), directions.abs(), dim=1)


def reference_edits(
    reader: Reader, alphas: Float[Tensor, " K"], classes: Sequence[str], seeds: Sequence[int]
) -> pd.DataFrame:
    """The edits of every class along a random direction (one for each class and seed) and along its own direction.

    Args:
        reader: its train split gives the class directions. alphas: strengths. classes: their names. seeds: of the
            random directions.

    Returns:
        One row per reference, seed and class: ``reference``, ``seed``, ``class`` and the fields of ``MatchedEdit``.
    """
    drawn = [(RANDOM, seed, random_directions(len(reader.tail), reader.tail.weight.shape[1], seed)) for seed in seeds]
    rows = []
    for reference, seed, directions in [*drawn, (ORACLE, 0, class_directions(reader.tail.weight, *reader.train))]:
        for k, name in enumerate(classes):
            choosing, reporting = (
                edit_curves(reader.tail, *images, directions[k], alphas)[0].numpy()
                for images in (reader.select, reader.test)
            )
            edit = matched_edit(alphas.numpy(), choosing, reporting, k)
            rows.append({"reference": reference, "seed": seed, "class": name, **edit._asdict()})
    return pd.DataFrame(rows)


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
    planned = _planned(output_dir / "sweeps" / sweep_name(data, plan), output_dir / "artifacts", plan)
    first = next(iter(planned.values()))
    tensors = first.tensors("classifier", "model.safetensors")
    captured = map(first.activations, get_args(Split))
    splits = ((split.activations, split.labels) for split in captured)
    # ``fc`` is the last layer of the ResNets of both experiments.
    reader = Reader(LinearTail(tensors["fc.weight"].float(), tensors["fc.bias"].float()), *splits)
    own = class_directions(reader.tail.weight, *reader.train)
    rows, edits = [], []
    for (variant, knob, seed), run in planned.items():
        found = {"data": data, "variant": variant, "knob": knob, "seed": seed, "run": run.key}
        classes = edits_by_class(run, run.classes).assign(alignment=_alignment(run, own))
        edits.append(classes.assign(**found))
        measures = {name: run.metrics.get(name) for name in MEASURES}
        known = classes[classes["selectivity"].notna()]  # a class without images does not count
        means = {name: float(known[name].mean()) for name in MEANS}
        counts = {"reached": int(known["reached"].sum()), "classes": len(known)}
        rows.append({**found, **measures, **means, **counts})
    runs = pd.DataFrame(rows)
    runs[list(MEASURES)] = runs[list(MEASURES)].astype(float)
    alphas = torch.tensor(first.flat_settings["edit.alpha"], dtype=torch.float32)
    references = reference_edits(reader, alphas, first.classes, plan.seeds)
    return Found(runs, pd.concat(edits, ignore_index=True), references.assign(data=data))


def _planned(folder: Path, artifacts: Path, plan: Plan) -> dict[tuple[str, float, int], SAERun]:
    """By variant, knob and seed, the runs of a plan in a sweep's folder, in the plan's order."""
    families = {variant: family for family in plan.families for variant in family.variants}
    order = [
        (variant, float(value), seed)
        for variant, family in families.items()
        for value in family.values
        for seed in plan.seeds
    ]
    found: dict[tuple[str, float, int], SAERun] = {}
    for run in (SAERun(run.folder, artifacts) for run in open_sweep(folder, artifacts).finished):
        variant = run.flat_settings["sae.variant"]
        if variant not in families:
            continue
        knob = families[variant].knob
        key = (variant, float(run.flat_settings[knob]), run.seed)
        if key in found and key in order:
            raise UserError(
                f"{folder} holds two runs of {variant}, {knob}={key[1]:g}, sae.seed={key[2]}, "
                "which differ in other settings or in the version of salve; choose an empty --output-dir."
            )
        found[key] = run
    if missing := [key for key in order if key not in found]:
        raise UserError(f"{folder} lacks {len(missing)} of {len(order)} runs, such as {missing[0]}.")
    return {key: found[key] for key in order}


def _alignment(run: SAERun, directions: Tensor) -> list[float]:
    """See :func:`alignment`; NaN for a class without a latent."""
    latents = torch.tensor(run.selected["latent"].fillna(-1).to_numpy(int))
    found = alignment(run.sae.decoder[:, latents.clamp_min(0)].T, directions)
    return torch.where(latents >= 0, found, torch.nan).tolist()
