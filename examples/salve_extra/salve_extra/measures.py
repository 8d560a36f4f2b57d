"""A measure: how unevenly latents fire."""

import numpy as np

from salve.results import Artifacts


def gini(run: Artifacts, column: str = "frequency") -> float | None:
    """The Gini coefficient of a column of ``latents.csv``: 0 if all latents have the same value, near 1 if one has all.

    ``G = Σ_i Σ_j |x_i − x_j| / (2 n² x̄)``, from the sorted values.

    Args:
        run: its artifacts; a table that is not there is empty. column: of non-negative numbers.

    Returns:
        None where there are no latents, or only zeros.
    """
    latents = run.table("features", "latents.csv")
    values = np.sort(latents[column].to_numpy(float)) if column in latents else np.empty(0)
    if not values.sum() > 0:
        return None
    ranks = np.arange(1, len(values) + 1)
    return float((2 * ranks - len(values) - 1) @ values / (len(values) * values.sum()))
