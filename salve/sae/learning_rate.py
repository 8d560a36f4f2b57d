# SPDX-License-Identifier: MIT
"""The learning-rate schedule of SAE training."""

from salve.settings import DECAY, WARMUP


def learning_rate_factor(step: int, steps: int, warmup: float = WARMUP, decay: float = DECAY) -> float:
    """The factor on the learning rate at a step: a linear warm-up, then 1, then a linear decay towards 0.

    Args:
        step: 0 … steps − 1. steps: of the whole training.
        warmup, decay: shares of the steps, together at most 1.

    Returns:
        A factor in (0, 1]. The first step of a warm-up of n steps has 1/n, as has the last step of a decay of n steps.
    """
    rising = (step + 1) / (warmup * steps) if warmup else 1.0
    falling = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, rising, falling)
