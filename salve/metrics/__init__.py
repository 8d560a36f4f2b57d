"""Measures: pure formulas, and torchmetrics around them."""

from salve.metrics.dictionaries import Matching, match_columns, mean_max_cosine, planted_recovery, stability
from salve.metrics.functional import (
    downstream,
    firing,
    fraction_of_variance_explained,
    kl_divergence,
    per_class_accuracy,
    reconstruction_cosine,
    recovered_share,
    relative_magnitude_histogram,
    usage_fractions,
)
from salve.metrics.streaming import (
    BatchMean,
    Downstream,
    FractionOfVarianceExplained,
    PredictiveDrift,
    ReconstructionCosine,
)
from salve.metrics.usage import ActivationHistogram, LatentUsage

__all__ = [
    "ActivationHistogram",
    "BatchMean",
    "Downstream",
    "FractionOfVarianceExplained",
    "LatentUsage",
    "Matching",
    "PredictiveDrift",
    "ReconstructionCosine",
    "downstream",
    "firing",
    "fraction_of_variance_explained",
    "kl_divergence",
    "match_columns",
    "mean_max_cosine",
    "per_class_accuracy",
    "planted_recovery",
    "reconstruction_cosine",
    "recovered_share",
    "relative_magnitude_histogram",
    "stability",
    "usage_fractions",
]
