"""Latents that several classes depend on: who falls, who is redundant and who rises when one is suppressed."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from experiments.claims import Measured
from experiments.experiment import Experiment, Findings, Picture, said
from experiments.runs import Study
from experiments.salve2025.cross_class import tables
from experiments.salve2025.cross_class.figures import counts_figure, images_figure, roles_figure
from experiments.salve2025.cross_class.roles import FALL, FALLS, REDUNDANT, RISE, RISES
from salve.report.text import plural


def analyse(studies: Sequence[Study]) -> Findings:
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
        testbed, count = study.testbed.name, plural(len(shown), "shared latent")
        figure, images = images_figure(study, shown)
        pictures[f"roles-{testbed}"] = Picture.of(roles_figure(study, shown), "cross_class.roles", study, latents=count)
        pictures[f"images-{testbed}"] = Picture.of(figure, "cross_class.images", study)
    text = [*_shared_text(study, saes, latents), *_roles_text(classes), *_tower_text(tower)]
    written = {"saes": saes, "latents": latents, "classes": classes, "curves": tables.curve_table(shown)}
    written |= {"images": images, "tower": tower}
    return Findings(" ".join(text), pictures, written, _measured(study, saes, latents, tower))


def _main(saes: pd.DataFrame) -> pd.DataFrame:
    """The rows of the sparsest SAEs: the largest dictionary with the largest λ, which are the defaults."""
    size = saes["dictionary_size"] == saes["dictionary_size"].max()
    return saes[size & (saes["sparsity"] == saes["sparsity"].max())]


def _setting(rows: pd.DataFrame) -> str:
    return f"d {rows['dictionary_size'].iloc[0]}, λ {rows['sparsity'].iloc[0]:g}"


def _shared_text(study: Study, saes: pd.DataFrame, latents: pd.DataFrame) -> list[str]:
    main = _main(saes)
    means = main.mean(numeric_only=True)
    text = [said("cross_class.shared", study, setting=_setting(main), count=len(main), means=means)]
    others = saes.drop(main.index).groupby(["dictionary_size", "sparsity"])
    if len(others):
        each = ", ".join(f"{rows['clean'].mean():.1f} ({_setting(rows)})" for _, rows in others)
        text.append(said("cross_class.elsewhere", each=each))
    by_kind = latents.dropna(subset="fallen").groupby("kind")
    kinds = [(kind, rows) for kind, rows in by_kind if kind in ("class-defining", "cross-class")]
    if kinds:
        fallen = [f"{100 * (rows['fallen'] >= 2).mean():.0f} % of {len(rows)} {kind} latents" for kind, rows in kinds]
        risen = [f"{100 * (rows['risen'] >= 1).mean():.0f} %" for _, rows in kinds]
        text.append(said("cross_class.kinds", fallen=" and ".join(fallen), risen=" and ".join(risen), rise=RISE))
    return text


def _roles_text(classes: pd.DataFrame) -> list[str]:
    """What the classes do, over all shared latents that drag no other along."""
    clean = classes[classes["clean"]] if len(classes) else classes
    if not len(clean):
        return [said("cross_class.no_roles")]
    latents = plural(len(clean.groupby(["dictionary_size", "sparsity", "seed", "latent"])), "latent")
    roles, rising = clean[clean["depends"]]["role"], clean[clean["role"] == RISES]
    counts = roles.value_counts().reindex([FALLS, REDUNDANT, RISES], fill_value=0)
    text = [said("cross_class.roles_found", latents=latents, count=len(roles), roles=counts)]
    if len(rising):
        most = rising["class"].value_counts()
        gained = float((rising["gained"] * rising["taken"].fillna(0)).sum() / max(rising["gained"].sum(), 1))
        often = {"count": len(rising), "most": most.index[0], "times": most.iloc[0]}
        text.append(said("cross_class.rising", **often, gained=gained, mistaken=float(rising["mistaken"].mean())))
    return text


def _tower_text(tower: pd.DataFrame) -> list[str]:
    if not len(tower):
        return []
    seen, sums = (tower[["depend", "tower"]] > 0).sum(), tower.sum(numeric_only=True)
    share = tower["nearest_share"].describe()
    text = [said("cross_class.tower", saes=len(tower), seen=seen, share=share, rise=RISE, alike=sums["by_effect"])]
    if alone := sums["by_effect_defining"]:
        text.append(said("cross_class.tower_defining", alone=alone))
    return text


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
