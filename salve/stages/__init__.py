"""The verbs, one short file each; they meet only through artifacts."""

from salve.stages.control import control
from salve.stages.diagnose import diagnose
from salve.stages.discover import DiscoverSettings, capture, read_features
from salve.stages.finetune import FinetuneSettings, finetune
from salve.stages.job import BackboneSettings, Job
from salve.stages.targets import EditSettings
from salve.stages.train import SAESettings, can_share, train_sae, train_saes
from salve.stages.validate import ValidateSettings, validate

__all__ = [
    "BackboneSettings",
    "DiscoverSettings",
    "EditSettings",
    "FinetuneSettings",
    "Job",
    "SAESettings",
    "ValidateSettings",
    "can_share",
    "capture",
    "control",
    "diagnose",
    "finetune",
    "read_features",
    "train_sae",
    "train_saes",
    "validate",
]
