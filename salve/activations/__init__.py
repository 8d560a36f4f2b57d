# SPDX-License-Identifier: MIT
"""Activations at a site: captured once, stored on disk in shards, and fed to a training in batches.

Names are imported lazily, so that reading activations does not import Lightning.
"""

from typing import TYPE_CHECKING

from salve.lazy import lazy

if TYPE_CHECKING:
    from salve.activations.capture import captured
    from salve.activations.rows import ActivationsData, Block, WholeData
    from salve.activations.schedule import Schedule
    from salve.activations.shards import AnyRows, Captured, Shards, load_captured

_MODULES = {
    "ActivationsData": "rows",
    "AnyRows": "shards",
    "Block": "rows",
    "Captured": "shards",
    "Schedule": "schedule",
    "Shards": "shards",
    "WholeData": "rows",
    "captured": "capture",
    "load_captured": "shards",
}

__all__ = [
    "ActivationsData",
    "AnyRows",
    "Block",
    "Captured",
    "Schedule",
    "Shards",
    "WholeData",
    "captured",
    "load_captured",
]

__getattr__, __dir__ = lazy(__name__, _MODULES)
