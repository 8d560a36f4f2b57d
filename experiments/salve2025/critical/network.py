"""The edited network itself, a little below and above a critical strength."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from experiments.runs import SAERun, Study
from experiments.salve2025.critical.rows import contribution_of
from salve.backbones import Site
from salve.editing import gates

#: Images of each class that are tried.
TRIED = 5
#: How far below and above the critical strength, as a part of it.
STEP = 1e-3


def edited_outputs(
    model: nn.Module, site: Site, image: Float[Tensor, "3 H W"], gate: Float[Tensor, "K M"]
) -> Float[Tensor, "K C"]:
    """Logits of the network whose readers' weights are scaled by each gate; all of the network is run each time."""
    weights = {f"{reader}.weight": model.get_submodule(reader).weight for reader in site.readers}
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
        images: of one SAE, as :func:`experiments.salve2025.critical.rows.rows_of` gives them.

    Returns:
        Columns ``class``, ``image``, ``criterion``, ``alpha``; ``below``, ``above``: what is positive while the class
        holds (its logit, or its margin over the largest other one), at ``α (1 ∓ STEP)``; ``agrees``: whether the class
        holds at the one and not at the other.
    """
    model, site = study.context.model(run.found.artifact("classifier"))
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
                others = torch.cat([logits[:, :label], logits[:, label + 1 :]], dim=1).amax(dim=1)
                below, above = (logits[:, label] - (others if criterion == "flip" else 0)).tolist()
                found.append((name, int(row["image"]), criterion, alpha, below, above, below > 0 >= above))
    columns = ["class", "image", "criterion", "alpha", "below", "above", "agrees"]
    return pd.DataFrame(found, columns=columns)
