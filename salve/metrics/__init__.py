"""Measures: pure formulas, and torchmetrics around them."""

from salve.metrics.functional import (
    firing,
    fraction_of_variance_explained,
    kl_divergence,
    per_class_accuracy,
)
from salve.metrics.streaming import BatchMean, FractionOfVarianceExplained, LatentUsage, PredictiveDrift

__all__ = [
    "BatchMean",
    "FractionOfVarianceExplained",
    "LatentUsage",
    "PredictiveDrift",
    "firing",
    "fraction_of_variance_explained",
    "kl_divergence",
    "per_class_accuracy",
]
