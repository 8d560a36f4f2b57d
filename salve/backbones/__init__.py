"""Backbones, their sites, fine-tuning, and captured activations."""

from salve.backbones.capture import captured
from salve.backbones.classifier import Classifier
from salve.backbones.load import load_backbone, preset, read_state_dict
from salve.backbones.shards import AnyRows, Captured, Shards, load_captured
from salve.backbones.sites import Site, find_site, site_activations, sites

__all__ = [
    "AnyRows",
    "Captured",
    "Classifier",
    "Shards",
    "Site",
    "captured",
    "find_site",
    "load_backbone",
    "load_captured",
    "preset",
    "read_state_dict",
    "site_activations",
    "sites",
]
