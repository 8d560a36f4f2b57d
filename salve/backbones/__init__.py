# SPDX-License-Identifier: MIT
"""Backbones: loading them, their sites, and the :class:`Classifier` that fine-tunes them.

Most names are loaded when they are first used: ``salve-edit`` reads weights and need not wait seconds for torchvision,
timm and Lightning.
"""

from typing import TYPE_CHECKING

# Imported at once, because ``salve.backbones.sites`` must be the function, not the module of the same name.
from salve.backbones.site import Reader, Site
from salve.backbones.sites import find_site, graph_of, head_site, site_activations, sites
from salve.backbones.tail import LinearTail, Tail
from salve.lazy import lazy

if TYPE_CHECKING:
    from salve.backbones.classifier import Classifier
    from salve.backbones.load import Loaded, load_backbone
    from salve.backbones.presets import Preset, preset
    from salve.backbones.weights import read_tensors

_MODULES = {
    "Classifier": "classifier",
    "Loaded": "load",
    "Preset": "presets",
    "load_backbone": "load",
    "preset": "presets",
    "read_tensors": "weights",
}

__all__ = [
    "Classifier",
    "LinearTail",
    "Loaded",
    "Preset",
    "Reader",
    "Site",
    "Tail",
    "find_site",
    "graph_of",
    "head_site",
    "load_backbone",
    "preset",
    "read_tensors",
    "site_activations",
    "sites",
]

__getattr__, __dir__ = lazy(__name__, _MODULES)
