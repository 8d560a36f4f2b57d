# SPDX-License-Identifier: MIT
"""Sparse autoencoders: variants, losses, training and files. docs/saes.md says when to use which variant."""

from salve.sae.ensemble import Member, SAEEnsemble
from salve.sae.io import fingerprint, load_sae, save_sae
from salve.sae.learning_rate import learning_rate_factor
from salve.sae.models import (
    SAE,
    VARIANTS,
    BatchTopK,
    Gated,
    JumpReLU,
    LinearL1,
    Matryoshka,
    ReluL1,
    SAEOutput,
    TopK,
    make_sae,
)
from salve.sae.module import SparseAutoencoder
from salve.sae.objective import objective
from salve.sae.remarks import remarks
from salve.sae.revival import auxk_losses, resample

__all__ = [
    "SAE",
    "VARIANTS",
    "BatchTopK",
    "Gated",
    "JumpReLU",
    "LinearL1",
    "Matryoshka",
    "Member",
    "ReluL1",
    "SAEEnsemble",
    "SAEOutput",
    "SparseAutoencoder",
    "TopK",
    "auxk_losses",
    "fingerprint",
    "learning_rate_factor",
    "load_sae",
    "make_sae",
    "objective",
    "remarks",
    "resample",
    "save_sae",
]
