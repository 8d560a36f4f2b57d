# SPDX-License-Identifier: MIT
"""Measure the classifier and its edits on the evaluation sets of a run."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, write_table
from salve.backbones.cut import Cut
from salve.editing import apply_edit_file, load_edit_file
from salve.report.grouped import REPAIRED, REPAIRED_FILE
from salve.stages.context import StageContext, settings_of_key
from salve.stages.on_sets import Weights, measured_on, predictions


def evaluate_sets(
    context: StageContext, classifier: Artifact, control: Artifact | None = None, repair: Artifact | None = None
) -> Artifact:
    """Measure the classifier, every network that stage ``control`` edited, and a repaired one, on every evaluation set.

    Args:
        context: of the run. classifier: the original network.
        control: holds ``summary.csv`` and edit files. repair: holds the ``state_dict`` :data:`REPAIRED_FILE`.

    Returns:
        Artifact ``evaluation``: ``evaluation.csv``, see :func:`measured_on`.
    """
    settings = {"sets": [[one.name, one.paired, one.digest()] for one in context.evaluation]}
    key_settings = settings_of_key(settings, classifier, *(one for one in (control, repair) if one is not None))

    def make(folder: Path, _: Path) -> None:
        cut = context.cut(classifier)
        networks: dict[str, Weights] = {"": {}, **({} if control is None else edited_weights(cut, control))}
        if repair is not None:
            networks[REPAIRED] = _changed(cut, repair.tensors(REPAIRED_FILE))
        tables = []
        with context.progress("evaluating", len(context.evaluation)) as advance:
            for one in context.evaluation:
                tables.append(measured_on(one, predictions(context, cut, networks, one), context.classes))
                advance(1)
        write_table(folder / "evaluation.csv", pd.concat(tables, ignore_index=True))

    return context.store.get_or_make("evaluation", key_settings, make)


def edited_weights(cut: Cut, control: Artifact) -> dict[str, Weights]:
    """By target, the tensors that each permanent edit of stage ``control`` changes."""
    state = {name: tensor.detach().cpu() for name, tensor in cut.model.state_dict().items()}
    found: dict[str, Weights] = {}
    for row in control.table("summary.csv").to_dict("records"):
        if row["edit_file"]:
            edit_file = load_edit_file(control.file(str(row["edit_file"])))
            edited = apply_edit_file(edit_file, state)
            found[str(row["target"])] = {name: edited[name] for name in edit_file.tensors}
    return found


def _changed(cut: Cut, state: Mapping[str, Tensor]) -> Weights:
    """The tensors of a ``state_dict`` that differ from the network's."""
    own = cut.model.state_dict()
    return {name: tensor for name, tensor in state.items() if not torch.equal(tensor, own[name].cpu())}
