"""Sparse autoencoders: variants, losses, training, files; docs/saes.md says when to use which."""

from salve.sae.ensemble import Member, SAEEnsemble
from salve.sae.io import fingerprint, load_sae, save_sae
from salve.sae.losses import sae_loss
from salve.sae.models import (
    SAE,
    VARIANTS,
    BatchTopK,
    Gated,
    JumpReLU,
    LinearL1,
    Matryoshka,
    Pass,
    ReluL1,
    TopK,
    make_sae,
)
from salve.sae.module import SparseAutoencoder
from salve.sae.objective import objective
from salve.sae.pace import pace
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
    "Pass",
    "ReluL1",
    "SAEEnsemble",
    "SparseAutoencoder",
    "TopK",
    "auxk_losses",
    "fingerprint",
    "load_sae",
    "make_sae",
    "objective",
    "pace",
    "remarks",
    "resample",
    "sae_loss",
    "save_sae",
]
