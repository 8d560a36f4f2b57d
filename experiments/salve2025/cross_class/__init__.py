"""Latents that several classes depend on: who falls, who is redundant and who rises when one is suppressed."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from experiments.claims import Measured
from experiments.compare import LEVEL_TEXT
from experiments.experiment import Experiment, Findings, Picture
from experiments.runs import Study
from experiments.salve2025.cross_class import tables
from experiments.salve2025.cross_class.figures import counts_figure, images_figure, roles_figure
from experiments.salve2025.cross_class.roles import FALL, FALLS, REDUNDANT, RISE, RISES
from salve.report.text import plural


def analyse(studies: Sequence[Study]) -> Findings:
    """See the module."""
    found = Findings.together([_analyse(study) for study in studies])
    figure = counts_figure(found.tables["saes"], found.tables["latents"])
    counts = Picture.of(figure, "cross_class.counts", fall=100 * FALL)
    filled = {name: table for name, table in found.tables.items() if len(table)}
    return replace(found, pictures={"counts": counts, **found.pictures}, tables=filled)


def _analyse(study: Study) -> Findings:
    readings, cases = tables.cases_of(study)
    saes, latents = tables.sae_table(readings, cases), tables.latent_table(readings)
    classes, tower = tables.class_table(cases), tables.tower_table(study, readings, cases)
    shown = tables.telling(cases)
    pictures, images = {}, pd.DataFrame()
    if shown:
        title, testbed = study.testbed.title, study.testbed.name
        said = {"title": title, "latents": plural(len(shown), "shared latent"), "images": len(study.test.labels)}
        figure, images = images_figure(study, shown)
        pictures[f"roles-{testbed}"] = Picture.of(roles_figure(study, shown), "cross_class.roles", **said)
        pictures[f"images-{testbed}"] = Picture.of(figure, "cross_class.images", title=title)
    return Findings(
        " ".join([_shared_text(study, saes, latents), *_roles_text(classes), *_tower_text(tower)]),
        pictures,
        {
            "saes": saes,
            "latents": latents,
            "classes": classes,
            "curves": tables.curve_table(shown),
            "images": images,
            "tower": tower,
        },
        _measured(study, saes, latents, tower),
    )


def _main(saes: pd.DataFrame) -> pd.DataFrame:
    """The rows of the sparsest SAEs: the largest dictionary with the largest λ, which are the defaults."""
    size = saes["dictionary_size"] == saes["dictionary_size"].max()
    return saes[size & (saes["sparsity"] == saes["sparsity"].max())]


def _setting(rows: pd.DataFrame) -> str:
    return f"d {rows['dictionary_size'].iloc[0]}, λ {rows['sparsity'].iloc[0]:g}"


def _shared_text(study: Study, saes: pd.DataFrame, latents: pd.DataFrame) -> str:
    main = _main(saes)
    text = (
        f"{study.testbed.title}: in the sparsest SAEs ({_setting(main)}; {len(main)} of {len(saes)}) "
        f"{main['by_share'].mean():.1f} latents per SAE are cross-class by share, {main['shared'].mean():.1f} of them "
        f"also count for both classes and take one of them to {LEVEL_TEXT} of its select images, and "
        f"{main['clean'].mean():.1f} do so without dragging along a class that does not depend on them."
    )
    others = saes.drop(main.index)
    if len(others):
        parts = [
            f"{rows['clean'].mean():.1f} ({_setting(rows)})"
            for _, rows in others.groupby(["dictionary_size", "sparsity"], sort=True)
        ]
        text += f" Elsewhere: {', '.join(parts)} of the last kind."
    known = latents.dropna(subset="fallen")
    by_kind = [(kind, rows) for kind, rows in known.groupby("kind") if kind in ("class-defining", "cross-class")]
    fallen = [f"{100 * (rows['fallen'] >= 2).mean():.0f} % of {len(rows)} {kind} latents" for kind, rows in by_kind]
    risen = [f"{100 * (rows['risen'] >= 1).mean():.0f} %" for _, rows in by_kind]
    if not by_kind:
        return text
    return (
        f"{text} Two or more classes fall under {' and '.join(fallen)}; some class gains {100 * RISE:.0f} points or "
        f"more under {' and '.join(risen)}."
    )


def _roles_text(classes: pd.DataFrame) -> list[str]:
    """What the classes do, over all shared latents that drag no other along."""
    clean = classes[classes["clean"]] if len(classes) else classes
    if not len(clean):
        return ["No latent that counts for two classes can be suppressed alone, so that there are no roles to tell."]
    keys = ["dictionary_size", "sparsity", "seed", "latent"]
    count = len(clean.groupby(keys))
    mine = clean[clean["depends"]]
    rising = clean[clean["role"] == RISES]
    text = [
        f"Over all settings, {plural(count, 'latent')} are of this kind. Of the {len(mine)} cases of a class that "
        f"depends on one, the class falls in {(mine['role'] == FALLS).sum()}, is redundant in "
        f"{(mine['role'] == REDUNDANT).sum()} (it keeps its accuracy, but not when its own latent is suppressed too), "
        f"and rises in {(mine['role'] == RISES).sum()}."
    ]
    if len(rising):
        most = rising["class"].value_counts()
        gained = float((rising["gained"] * rising["taken"].fillna(0)).sum() / max(rising["gained"].sum(), 1))
        wrong = float(rising["mistaken"].mean())
        text.append(
            f"{len(rising)} times a class rises by more than is usual for it, most often {most.index[0]} "
            f"({most.iloc[0]} times): {100 * gained:.0f} % of the images gained had been taken for a class that "
            f"depends on the latent, against {100 * wrong:.0f} % of all mistakes."
        )
    return text


def _tower_text(tower: pd.DataFrame) -> list[str]:
    if not len(tower):
        return []
    text = (
        f"The paper's own case: church and gas pump both depend on a latent in {(tower['depend'] > 0).sum()} of "
        f"{len(tower)} SAEs, and show the paper's pattern in {(tower['tower'] > 0).sum()} (the largest share that both "
        f"hold of one latent is {100 * tower['nearest_share'].max():.0f} %, in the mean over SAEs "
        f"{100 * tower['nearest_share'].mean():.0f} %). By effect alone (gas pump falls, church changes by less than "
        f"{100 * RISE:.0f} points, chain saw gains {100 * RISE:.0f} or more) {tower['by_effect'].sum()} latents look "
        "like it."
    )
    if alone := int(tower["by_effect_defining"].sum()):
        text += (
            f" {alone} of those are latents that define gas pump and nothing else: the pattern of effects alone is no "
            "evidence of sharing."
        )
    return [text]


def _measured(study: Study, saes: pd.DataFrame, latents: pd.DataFrame, tower: pd.DataFrame) -> list[Measured]:
    testbed, main = study.testbed.name, _main(saes)
    having = saes[saes["clean"] > 0]
    alone = latents.loc[latents["kind"] == "class-defining", "risen"].dropna()
    share = float((main["clean"] > 0).mean())
    every = f"; {(saes['clean'] > 0).sum()} of {len(saes)} over all settings" if len(saes) > len(main) else ""
    text = f"in {(main['clean'] > 0).sum()} of the {len(main)} sparsest SAEs{every}"
    found = [Measured("cross_class.shared", testbed, share, text)]
    for name, column in (("redundant", "falls_redundant"), ("other_way", "falls_rises")):
        seen = int((having[column] > 0).sum())
        value = seen / len(having) if len(having) else math.nan
        text = f"in {seen} of {len(having)} SAEs that have one" if len(having) else "no SAE has a shared latent"
        if name == "other_way" and len(having) and len(alone):
            text += f"; some class gains as much under {100 * (alone >= 1).mean():.0f} % of class-defining latents"
        found.append(Measured(f"cross_class.{name}", testbed, value, text))
    if len(tower):
        seen, depend = int((tower["tower"] > 0).sum()), int((tower["depend"] > 0).sum())
        text = f"in {seen} of {len(tower)} SAEs; church and gas pump share a latent in {depend}"
        found.append(Measured("cross_class.tower", testbed, seen / len(tower), text))
    return found


EXPERIMENT = Experiment(
    "cross_class", "Cross-class latents", analyse, quick=("sae.seed=0,1", "sae.epochs=20", "sae.dictionary_size=64")
)
