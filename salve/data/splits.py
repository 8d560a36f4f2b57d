"""One held-out set in two: images that choose, and images that report."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from salve.types import UserError


def check_share(select_share: float, split_seed: int) -> None:
    """Raises UserError for a share that leaves one part empty, or a seed below 0."""
    if not 0 < select_share < 1:
        raise UserError(
            f"data.select_share must lie between 0 and 1, both excluded, not {select_share}: it is the share of the "
            "held-out images that selects, and the rest tests"
        )
    if split_seed < 0:
        raise UserError(f"data.split_seed must be 0 or more, not {split_seed}")


def divide(
    labels: NDArray[np.int64], classes: Sequence[str], select_share: float, split_seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of the held-out images select, and which test: the same share of every class, drawn at random.

    What becomes of a class depends on its number of images, its label and the seed alone.

    Args:
        labels: `[N]`, of the held-out images. classes: a name for each label. select_share: of each class, in (0, 1),
            rounded to whole images; at least one image selects and at least one tests.
        split_seed: another one draws another division.

    Returns:
        Indices into the N images of those that select, and of those that test, each in ascending order.

    Raises:
        UserError: a class with fewer than two images; or see `check_share`.
    """
    check_share(select_share, split_seed)
    scarce = [name for label, name in enumerate(classes) if np.count_nonzero(labels == label) < 2]
    if scarce:
        more = f" and {len(scarce) - 5} more" if len(scarce) > 5 else ""
        raise UserError(
            f"too few held-out images of {', '.join(map(repr, scarce[:5]))}{more}: every class needs at least two, "
            "one to select and one to test"
        )
    select = []
    for label in range(len(classes)):
        own = np.flatnonzero(labels == label)
        count = min(max(round(len(own) * select_share), 1), len(own) - 1)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((split_seed, label))))
        select.append(own[np.argsort(rng.random(len(own)), kind="stable")[:count]])
    chosen = np.sort(np.concatenate(select))
    return chosen, np.setdiff1d(np.arange(len(labels)), chosen)
