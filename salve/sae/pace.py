"""The learning rate of an SAE's training, step by step."""

from salve.settings import DECAY, WARMUP


def pace(step: int, steps: int, warmup: float = WARMUP, decay: float = DECAY) -> float:
    """The share of the learning rate that a step is taken with: it rises linearly, stays at 1, and falls linearly to 0.

    Args:
        step: 0 … steps − 1. steps: of the training. warmup, decay: shares of the steps, together at most 1.

    Returns:
        Above 0; the first step of a warm-up of n steps has 1/n, the last of a decay of n steps too.
    """
    rising = (step + 1) / (warmup * steps) if warmup else 1.0
    falling = (steps - step) / (decay * steps) if decay else 1.0
    return min(1.0, rising, falling)
