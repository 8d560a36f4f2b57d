"""Which images break first: α_flip and the logit margin against what an attack and corruptions need."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from experiments.beyond.composition.measures import Edits
from experiments.beyond.robustness.measures import Seen, right
from experiments.compare import margins
from experiments.runs import Study
from salve.diagnosis import critical_strength
from salve.metrics.correlation import partial_spearman_interval


def images_of(study: Study, shown: Sequence[Seen], edits: Sequence[Edits], attacks: pd.DataFrame) -> pd.DataFrame:
    """``attacks`` with, for each image: ``margin``, its lead over other classes; ``survives``, the share of corrupted
    versions that keep the class; ``flip_<s>``, α_flip for its class's latent of the s-th SAE (NaN without one)."""
    clean = shown[0]
    frame = pd.DataFrame(
        {
            "margin": margins(study.tail(clean.activations), clean.labels).numpy(),
            "survives": torch.stack([right(study, one) for one in shown[1:]]).double().mean(dim=0).numpy(),
        }
    )
    for number, of_sae in enumerate(edits):
        flip = torch.full((len(clean.labels),), torch.nan, dtype=torch.float64)
        for label, vector in zip(of_sae.labels, of_sae.vectors, strict=True):
            own = clean.labels == label
            flip[own] = critical_strength(study.tail, clean.activations[own], vector, clean.labels[own]).double()
        frame[f"flip_{number}"] = flip.numpy()
    return attacks.join(frame)


def correlations(images: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of ``alpha_flip`` (mean over SAEs) and of the ``margin`` with the smallest ``adversarial``
    norm and with the share of ``corruption`` survived; of α_flip with the margin held fixed, too, and with the margin
    and the class; with 95 % bootstrap intervals over images."""
    flips = [name for name in images if str(name).startswith("flip_")]
    known = images[images[flips].notna().all(axis=1) & (images["margin"] > 0)] if flips else images[:0]
    margin = known[["margin"]].to_numpy(float)
    own = np.column_stack([margin, pd.get_dummies(known["class"]).to_numpy(float)])
    flip = known[flips].to_numpy(float).T
    rows = []
    for outcome, column in (("adversarial", "norm"), ("corruption", "survives")):
        y = known[column].to_numpy(float)
        for measure, x, given, what in (
            ("margin", margin.T, None, "nothing"),
            ("alpha_flip", flip, None, "nothing"),
            ("alpha_flip", flip, margin, "margin"),
            ("alpha_flip", flip, own, "margin and class"),
        ):
            found = partial_spearman_interval(x, y, given)
            rows.append({"outcome": outcome, "measure": measure, "given": what, **found._asdict()})
    return pd.DataFrame(rows)
