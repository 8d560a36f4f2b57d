"""Tables of critical strengths, from an SAE's runs."""

import pandas as pd
import torch
from torch import Tensor

from experiments.runs import SAERun, Study
from experiments.salve2025.critical.measures import closing, given_way, median_of, numerical, relative_error
from salve.editing import contribution, edited_logits

METHODS = ("logit_linear", "logit_exact", "flip_linear", "flip_exact")


def contribution_of(run: SAERun, name: str) -> Tensor:
    """The contribution vector ``[M]`` of a class's latent, as stage ``diagnose`` has it."""
    chosen = run.selected.loc[name]
    scale, channels = run.settings["edit.scale"], run.settings["edit.channels"]
    return contribution(run.sae.decoder, int(chosen["latent"]), scale, channels, int(chosen["sign"]))


def rows_of(study: Study, run: SAERun) -> pd.DataFrame:
    """One row per test image of a class that has a latent: ``images.csv`` of stage ``diagnose``, and the fields of
    :class:`experiments.salve2025.critical.measures.Closing` for α_logit."""
    weight, _ = study.head
    parts = []
    for name, images in run.found.table("diagnose", "images.csv").groupby("class", sort=False):
        activations = study.test.activations[images["image"].tolist()].double()
        own = weight[study.classes.index(str(name))].double()
        exact = torch.tensor(images["logit_exact"].to_numpy(float))
        why = closing(activations, own, contribution_of(run, str(name)).double().abs(), exact)
        parts.append(images.assign(**{field: values.numpy() for field, values in why._asdict().items()}))
    found = pd.concat(parts, ignore_index=True)
    error = relative_error(found["logit_linear"], found["logit_exact"])
    return found.assign(seed=run.seed, testbed=study.testbed.name, error=error)


def solved(study: Study, run: SAERun, images: pd.DataFrame) -> pd.DataFrame:
    """``images`` with columns ``logit_numerical`` and ``flip_numerical``."""
    weight, bias = study.head
    parts = []
    for name, rows in images.groupby("class", sort=False):
        at, vector = rows["image"].tolist(), contribution_of(run, str(name))
        activations, labels = study.test.activations[at], study.test.labels[at]
        columns = {
            f"{criterion}_numerical": numerical(weight, bias, activations, vector, labels, criterion).numpy()
            for criterion in ("logit", "flip")
        }
        parts.append(rows.assign(**columns))
    return pd.concat(parts)


def shares_of(study: Study, run: SAERun, images: pd.DataFrame) -> pd.DataFrame:
    """By class and strength of the grid, the share of the rightly classified images whose class has given way.

    Columns: one for each of ``METHODS``; ``predicted``: the share that the edited head no longer classifies rightly.
    """
    weight, bias = study.head
    alphas = list(run.settings["edit.alpha"])
    parts = []
    for name, rows in images[images["correct"]].groupby("class", sort=False):
        at = rows["image"].tolist()
        labels = study.test.labels[at]
        logits = edited_logits(weight, bias, study.test.activations[at], contribution_of(run, str(name)), alphas)
        lost = (logits.argmax(dim=2) != labels).double().mean(dim=1).numpy()
        columns = {method: given_way(rows[method], alphas) for method in METHODS}
        parts.append(pd.DataFrame({"class": name, "alpha": alphas, **columns, "predicted": lost}))
    return pd.concat(parts, ignore_index=True).assign(seed=run.seed, testbed=study.testbed.name)


def classes_of(images: pd.DataFrame) -> pd.DataFrame:
    """By class and SAE: ``images`` rightly classified, the ``median`` of each of ``METHODS``, and the share for which
    the exact ones are infinite; ``rank`` of the median α_flip, from 1, the most fragile."""
    parts = []
    for (testbed, seed, name), rows in images[images["correct"]].groupby(["testbed", "seed", "class"], sort=False):
        medians = {method: median_of(rows[method]) for method in METHODS}
        never = {f"{one}_infinite": float((rows[f"{one}_exact"] == float("inf")).mean()) for one in ("logit", "flip")}
        key = {"testbed": testbed, "seed": seed, "class": name, "latent": int(rows["latent"].iloc[0])}
        parts.append({**key, "images": len(rows), **medians, **never})
    found = pd.DataFrame(parts)
    return found.assign(rank=found.groupby(["testbed", "seed"])["flip_exact"].rank())
