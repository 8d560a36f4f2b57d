"""Tables of critical strengths, from an SAE's runs and from the edited network itself."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from experiments.compare import margins
from experiments.runs import SAERun, Study
from experiments.salve2025.critical.measures import closing, given_way, median_of, numerical, relative_error
from salve.backbones import Site
from salve.editing import contribution, edited_logits, gates

METHODS = ("logit_linear", "logit_exact", "flip_linear", "flip_exact")


def contribution_of(run: SAERun, name: str) -> Tensor:
    """The contribution vector ``[M]`` of a class's latent, as stage ``diagnose`` has it."""
    chosen = run.selected.loc[name]
    scale, channels = run.settings["edit.scale"], run.settings["edit.channels"]
    return contribution(run.sae.decoder, int(chosen["latent"]), scale, channels, int(chosen["sign"]))


def rows_of(study: Study, run: SAERun) -> pd.DataFrame:
    """One row per test image of a class that has a latent: ``images.csv`` of stage ``diagnose``, and the fields of
    :class:`experiments.salve2025.critical.measures.Closing` for α_logit."""
    weight = study.tail.weight
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
    tail = study.tail
    parts = []
    for name, rows in images.groupby("class", sort=False):
        at, vector = rows["image"].tolist(), contribution_of(run, str(name))
        activations, labels = study.test.activations[at], study.test.labels[at]
        columns = {
            f"{criterion}_numerical": numerical(tail, activations, vector, labels, criterion).numpy()
            for criterion in ("logit", "flip")
        }
        parts.append(rows.assign(**columns))
    return pd.concat(parts)


def shares_of(study: Study, run: SAERun, images: pd.DataFrame) -> pd.DataFrame:
    """By class and strength of the grid, the share of the rightly classified images whose class has given way.

    Columns: one for each of ``METHODS``; ``predicted``: the share that the edited head no longer classifies rightly.
    """
    tail = study.tail
    alphas = list(run.settings["edit.alpha"])
    parts = []
    for name, rows in images[images["correct"]].groupby("class", sort=False):
        at = rows["image"].tolist()
        labels = study.test.labels[at]
        logits = edited_logits(tail, study.test.activations[at], contribution_of(run, str(name)), alphas)
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


#: Images of each class that are tried.
TRIED = 5
#: How far below and above the critical strength, as a part of it.
STEP = 1e-3


def edited_outputs(
    model: nn.Module, site: Site, image: Float[Tensor, "3 H W"], gate: Float[Tensor, "K M"]
) -> Float[Tensor, "K C"]:
    """Logits of the network whose readers' weights are scaled by each gate; all of the network is run each time."""
    weights = {reader.weight: model.get_parameter(reader.weight) for reader in site.readers}
    found = []
    with torch.inference_mode():
        for one in gate:
            edited = {name: weight * one.to(weight) for name, weight in weights.items()}
            found.append(functional_call(model, edited, (image[None],))[0])
    return torch.stack(found)


def spread(strengths: Sequence[float], count: int) -> list[int]:
    """Indices of up to ``count`` strengths that are neither 0 nor infinite, evenly over their order."""
    known = np.asarray(strengths, dtype=float)
    order = [int(k) for k in known.argsort(kind="stable") if 0 < known[k] < np.inf]
    count = min(count, len(order))
    return [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]


def tried(study: Study, run: SAERun, images: pd.DataFrame) -> pd.DataFrame:
    """Some images of each class through the edited network, for α_logit and for α_flip.

    Args:
        images: of one SAE, as :func:`experiments.salve2025.critical.tables.rows_of` gives them.

    Returns:
        Columns ``class``, ``image``, ``criterion``, ``alpha``; ``below``, ``above``: what is positive while the class
        holds (its logit, or its margin over the largest other one), at ``α (1 ∓ STEP)``; ``agrees``: whether the class
        holds at the one and not at the other.
    """
    cut = study.context.cut(run.found.artifact("classifier"))
    model, site = cut.model, cut.site
    data = study.context.data.dataset("test")
    found = []
    for name, rows in images[images["correct"]].groupby("class", sort=False):
        vector, label = contribution_of(run, str(name)), study.classes.index(str(name))
        for criterion in ("logit", "flip"):
            for k in spread(rows[f"{criterion}_exact"].tolist(), TRIED):
                row = rows.iloc[k]
                alpha = float(row[f"{criterion}_exact"])
                image = data[int(row["image"])][0].to(study.context.device)
                gate = gates(vector, torch.tensor([alpha * (1 - STEP), alpha * (1 + STEP)]))
                logits = edited_outputs(model, site, image, gate).cpu()
                ahead = margins(logits, torch.tensor([label, label])) if criterion == "flip" else logits[:, label]
                below, above = ahead.tolist()
                found.append((name, int(row["image"]), criterion, alpha, below, above, below > 0 >= above))
    columns = ["class", "image", "criterion", "alpha", "below", "above", "agrees"]
    return pd.DataFrame(found, columns=columns)
