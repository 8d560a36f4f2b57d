# SPDX-License-Identifier: MIT
"""Compare the dictionaries that the SAEs of different seeds in a sweep learned."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from salve.artifacts import read_table, write_table, written_whole
from salve.metrics import random_stability, stability
from salve.report.names import short_names, value_text
from salve.report.text import number, percent
from salve.results import Run
from salve.sweep.figures import is_seed
from salve.sweep.summary import SweepSummary
from salve.system import refused_by_system
from salve.types import UserError

TABLE = "stability.csv"

#: Measures of a pair, each with its value by chance beside it.
MEASURES = ("matched_cosine", "shared_fraction")


@dataclass(frozen=True)
class _Dictionary:
    """What one run's SAE learned.

    Attributes:
        key: of the SAE. activations: digest of what it was trained on. decoder: of the latents that fire ``[M, d']``.
        signed: latents take both signs.
    """

    key: str
    activations: str
    decoder: Tensor
    signed: bool


def compare_seeds(summary: SweepSummary) -> Path:
    """Compare every two runs that differ in nothing but seeds, and write ``stability.csv`` beside the sweep's table.

    Latents that never fire on the train split are left out. Runs are compared only if they share their activations (as
    in a sweep over ``sae.seed``): channels of different classifiers mean different things.

    Args:
        summary: of the sweep.

    Returns:
        The file, with one row per pair: the settings that vary, except seeds; ``run_a``, ``run_b``; ``latents_a``,
        ``latents_b``: how many fire; ``matched_cosine`` and ``shared_fraction`` (:func:`salve.metrics.stability`), each
        with ``random_…`` beside it, by :func:`salve.metrics.random_stability`; ``flipped_fraction``.

    Raises:
        UserError: no two runs can be compared, or an SAE is not there. OSError: the file cannot be written.
    """
    folder = summary.csv.parent
    settings = [name for name in summary.varying if not is_seed(name)]
    alike: dict[str, list[tuple[Run, _Dictionary]]] = defaultdict(list)
    for run in summary.sweep.finished:
        if {"activations", "sae", "features"} <= run.artifacts.keys():
            found = _read(run)
            fixed = {name: value for name, value in run.flat_settings.items() if not is_seed(name)}
            alike[json.dumps([found.activations, fixed], sort_keys=True)].append((run, found))
    rows = [
        {name: value_text(run_a.flat_settings.get(name)) for name in settings}
        | {"run_a": run_a.key, "run_b": run_b.key}
        | _compare(a, b)
        for group in alike.values()
        for (run_a, a), (run_b, b) in combinations(group, 2)
        if a.key != b.key
    ]
    if not rows:
        raise UserError(
            f"{folder} has no two finished runs that differ in sae.seed alone and share their activations: there are "
            "no dictionaries to compare."
        )
    try:
        with written_whole(folder / TABLE) as unfinished:
            write_table(unfinished, pd.DataFrame(rows))
    except OSError as error:
        raise refused_by_system(error, folder) or error from None
    return folder / TABLE


def _read(run: Run) -> _Dictionary:
    for kind in ("sae", "features"):
        if not run.artifacts[kind].is_dir():
            raise UserError(
                f"{run.artifacts[kind]} is not there; say where the artifacts are: --artifacts <output_dir>/artifacts."
            )
    fires = torch.from_numpy(run.table("features", "latents.csv")["frequency"].to_numpy(copy=True)) > 0
    return _Dictionary(run.artifact("sae").key, run.digest("activations"), run.sae.decoder[:, fires], run.sae.signed)


def _compare(a: _Dictionary, b: _Dictionary) -> dict[str, float | int]:
    sizes = a.decoder.shape[1], b.decoder.shape[1]
    found = stability(a.decoder, b.decoder, a.signed)
    chance = random_stability(a.decoder.shape[0], *sizes, a.signed)
    row: dict[str, float | int] = dict(zip(("latents_a", "latents_b"), sizes, strict=True))
    for name in MEASURES:
        row |= {name: float(found[name]), f"random_{name}": float(chance[name])}
    return row | {"flipped_fraction": float(found["flipped_fraction"])}


def print_stability(path: Path, console: Console) -> None:
    """Print means over the pairs of each configuration, with chance in brackets, and where the table is.

    Args:
        path: the table of :func:`compare_seeds`.
    """
    pairs = read_table(path)
    settings = list(pairs.columns[: pairs.columns.get_loc("run_a")])
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    shown.title, shown.title_justify = "Stability between seeds", "left"
    for name in short_names(settings).values():
        shown.add_column(Text(name), overflow="fold")
    for name in ("pairs", "latents\nthat fire", "matched\ncosine", "shared\nlatents"):
        shown.add_column(name, justify="right")
    groups = pairs.groupby(settings, dropna=False, sort=False) if settings else [((), pairs)]
    for key, rows in groups:
        mean = rows.drop(columns=[*settings, "run_a", "run_b"]).mean()
        cells = [
            *map(value_text, key),
            str(len(rows)),
            number((mean["latents_a"] + mean["latents_b"]) / 2),
            _beside_chance(number, mean["matched_cosine"], mean["random_matched_cosine"]),
            _beside_chance(percent, mean["shared_fraction"], mean["random_shared_fraction"]),
        ]
        shown.add_row(*map(Text, cells))
    shown.caption = "In brackets: two dictionaries of random directions. Shared: matched with a cosine of 0.7 or more."
    shown.caption_justify = "left"
    console.print(shown)
    console.print(f"Table: {path}", soft_wrap=True, highlight=False, markup=False)


def _beside_chance(write: Callable[[float], str], value: float, chance: float) -> str:
    return f"{write(value)} ({write(chance)})"
