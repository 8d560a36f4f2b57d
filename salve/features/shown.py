# SPDX-License-Identifier: MIT
"""Which latents a page shows where there are too many."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

#: Latents on a page, at most; and numbers of their decoder columns, at most: 256 latents of 512 channels fit twice.
MOST_LATENTS, MOST_NUMBERS = 512, 300_000


def shown_latents(means: Float[np.ndarray, " d"], width: int, first: Iterable[int] = ()) -> NDArray[np.int64]:
    """The latents that a page shows, rising.

    Args:
        means: ``[d]``, of each latent its largest class mean in absolute value. width: ``M``, channels of the site.
        first: latents that are shown in any case, as long as there is room.

    Returns:
        All, or those of ``first`` and those with the largest means.
    """
    most = min(MOST_LATENTS, max(1, MOST_NUMBERS // width))
    order = list(dict.fromkeys([*first, *np.argsort(-np.abs(np.nan_to_num(means)), kind="stable").tolist()]))
    return np.sort(np.array(order[:most], dtype=np.int64))
