"""The verbs, one short file each; they meet only through artifacts."""

from salve.stages.control import control
from salve.stages.diagnose import diagnose
from salve.stages.discover import DiscoverSettings, SAESettings, capture, read_features, train_sae
from salve.stages.finetune import FinetuneSettings, finetune
from salve.stages.job import BackboneSettings, Job
from salve.stages.targets import EditSettings
from salve.stages.validate import ValidateSettings, validate

__all__ = [
    "BackboneSettings",
    "DiscoverSettings",
    "EditSettings",
    "FinetuneSettings",
    "Job",
    "SAESettings",
    "ValidateSettings",
    "capture",
    "control",
    "diagnose",
    "finetune",
    "read_features",
    "train_sae",
    "validate",
]
