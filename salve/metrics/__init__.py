# SPDX-License-Identifier: MIT
"""Measures: formulas as pure functions, and torchmetrics classes that accumulate them."""

from salve.metrics.dictionaries import (
    Matching,
    match_columns,
    mean_max_cosine,
    planted_recovery,
    random_stability,
    stability,
)
from salve.metrics.functional import (
    ALMOST_DEAD,
    DENSE,
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
    "ALMOST_DEAD",
    "DENSE",
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
    "random_stability",
    "reconstruction_cosine",
    "recovered_share",
    "relative_magnitude_histogram",
    "stability",
    "usage_fractions",
]
