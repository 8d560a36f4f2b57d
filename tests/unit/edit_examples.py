"""Edits as stage ``control`` leaves them, for tests of what reads them."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd


def verdicts(
    classes: Sequence[str], edited: Collection[str], strict: Collection[str], published: Collection[str] | None = None
) -> pd.DataFrame:
    """What is read of ``summary.csv``: a row per class, of which some are edited and some of these separate."""
    known = [name in edited for name in classes]
    columns = {
        "alpha_used": np.where(known, 2.0, np.nan),
        "accuracy_after": np.where(known, 0.01, np.nan),
        "separates": [name in strict for name in classes],
        "separates_published": [name in (strict if published is None else published) for name in classes],
    }
    return pd.DataFrame(columns, index=list(classes))


def verdict(low: int, high: int) -> dict[str, Any]:
    """What is read of ``verdict.json``."""
    return {"separates_low": low, "separates_high": high}
