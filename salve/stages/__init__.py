# SPDX-License-Identifier: MIT
"""The stages of a run, one file each. They exchange data only through artifacts."""

from salve.edit_settings import CompareSettings, EditSettings
from salve.settings import (
    BackboneSettings,
    CaptureSettings,
    DiscoverSettings,
    FinetuneSettings,
    SAESettings,
    ValidateSettings,
)
from salve.stages.atlas import atlas
from salve.stages.audit import audit
from salve.stages.compare import compare
from salve.stages.context import StageContext
from salve.stages.control import control
from salve.stages.diagnose import diagnose
from salve.stages.discover import capture, read_features
from salve.stages.evaluate import evaluate_sets
from salve.stages.finetune import finetune
from salve.stages.repair import repair
from salve.stages.train import can_share, train_sae, train_saes
from salve.stages.validate import validate

__all__ = [
    "BackboneSettings",
    "CaptureSettings",
    "CompareSettings",
    "DiscoverSettings",
    "EditSettings",
    "FinetuneSettings",
    "SAESettings",
    "StageContext",
    "ValidateSettings",
    "atlas",
    "audit",
    "can_share",
    "capture",
    "compare",
    "control",
    "diagnose",
    "evaluate_sets",
    "finetune",
    "read_features",
    "repair",
    "train_sae",
    "train_saes",
    "validate",
]
