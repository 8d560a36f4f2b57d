# SPDX-License-Identifier: MIT
"""Read the table of evaluation sets, for the page and for ``metrics.json``."""

import pandas as pd

from salve.report.tables import column

#: What the table calls the network of stage ``repair``.
REPAIRED = "repaired network"
#: The file of its weights.
REPAIRED_FILE = "repaired.safetensors"


def sets_of(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each evaluation set, in the order of the run."""
    return {str(name): mine for name, mine in table.groupby("set", sort=False)}


def worst_group(rows: pd.DataFrame) -> "pd.Series | None":
    """The row of the group with the lowest accuracy, of one network on one set; None where no group has images."""
    groups = rows[rows["attribute_value"] != ""]
    accuracy = column(groups, "accuracy").dropna()
    return None if accuracy.empty else groups.loc[accuracy.idxmin()]
