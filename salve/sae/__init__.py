"""Sparse autoencoders: variants, loss, training, files."""

from salve.sae.ensemble import EpochsData, Member, SAEEnsemble
from salve.sae.io import fingerprint, load_sae, save_sae
from salve.sae.losses import sae_loss
from salve.sae.models import SAE, VARIANTS, LinearL1, ReluL1, TopK, make_sae
from salve.sae.module import ActivationsData, SparseAutoencoder

__all__ = [
    "SAE",
    "VARIANTS",
    "ActivationsData",
    "EpochsData",
    "LinearL1",
    "Member",
    "ReluL1",
    "SAEEnsemble",
    "SparseAutoencoder",
    "TopK",
    "fingerprint",
    "load_sae",
    "make_sae",
    "sae_loss",
    "save_sae",
]
