"""Measure the classifier and its edits on the evaluation sets of a run."""

from pathlib import Path

import pandas as pd

from salve.artifacts import Artifact, write_table
from salve.backbones.cut import Cut
from salve.editing import apply_edit_file, load_edit_file
from salve.stages.context import StageContext, settings_of_key
from salve.stages.on_sets import Weights, measured_on, predictions


def evaluate_sets(context: StageContext, classifier: Artifact, control: Artifact | None) -> Artifact:
    """Measure the classifier, and every network that stage ``control`` edited, on every evaluation set.

    Returns:
        Artifact ``evaluation``: ``evaluation.csv``, see :func:`measured_on`.
    """
    settings = {"sets": [[one.name, one.paired, one.digest()] for one in context.evaluation]}
    key_settings = settings_of_key(settings, classifier, *([] if control is None else [control]))

    def make(folder: Path, _: Path) -> None:
        cut = context.cut(classifier)
        networks: dict[str, Weights] = {"": {}, **({} if control is None else edited_weights(cut, control))}
        tables = []
        with context.progress("evaluating", len(context.evaluation)) as advance:
            for number, one in enumerate(context.evaluation):
                tables.append(measured_on(one, predictions(context, cut, networks, one), context.classes))
                advance(number + 1)
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
