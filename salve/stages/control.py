# SPDX-License-Identifier: MIT
"""Stage ``control``: edit each class's latent over a grid of strengths, and save the chosen edits as files."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, write_record, write_table
from salve.backbones.cut import Cut
from salve.cells import for_spreadsheets
from salve.edit_settings import GATE, EditSettings
from salve.editing import (
    Edit,
    EditEvaluation,
    EditFile,
    NewWeights,
    apply_edit_file,
    load_edit_file,
    make_additions,
    make_edit_files,
    save_edit_file,
)
from salve.editing.methods import FittedEdit, Method, Target, key_of, make_method
from salve.editing.methods.gate import GateEdit
from salve.editing.verdict import (
    CONFIDENCE,
    LIMITS,
    RESAMPLES,
    Effect,
    resampled_effects,
    verdict,
)
from salve.report.text import slug
from salve.sae import SAE
from salve.stages.context import StageContext, settings_of_key
from salve.stages.curves import CurvesByClass, Measured, curve_tables, measure, own_classes
from salve.stages.measured import EditMeasures, SampledMeasures, measures_of
from salve.stages.outcome import choose, summarise
from salve.stages.sampled import fitting_of
from salve.stages.targets import contributions_of, refuse_aligned_on_signed, targets_of
from salve.stages.training import evaluate

#: The name in ``confusion.csv`` of the network's outputs that are no class of the data.
OTHER_OUTPUT = "other output"


def control(
    context: StageContext,
    settings: EditSettings,
    seed: int,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    features: Artifact,
) -> Artifact:
    """Measure every target at every strength; choose each edit's strength on select, and report it on test.

    Returns:
        Artifact ``control``: ``curves.csv``, ``summary.csv``, ``verdict.json``, ``evaluation.csv``, ``confusion.csv``,
        one edit file per target under ``edits/``, and with ``edit.by_class`` also ``curves.parquet``.
    """
    cut, method = context.cut(classifier), method_of(settings)
    if method is None:
        refuse_aligned_on_signed(settings, activations)
    key_settings = settings_of_key(_used(settings, cut, method, seed), classifier, activations, sae, features)

    def make(folder: Path, _: Path) -> None:
        autoencoder = context.sae(sae, activations)
        edits = measures_of(context, cut, settings, activations, method)
        fitted = _fitted(context, settings, cut, method, activations, autoencoder, seed)
        targets = targets_of(context.classes, features, settings.sets)
        # Keep only per-edit effects: accuracies of all classes for all edits would grow with the square of the classes.
        suppressed: list[Measured] = []
        chosen_edits: list[FittedEdit] = []
        by_class = CurvesByClass(folder / "curves.parquet") if settings.by_class else nullcontext()
        with (
            context.progress("editing", len(targets)) as advance,
            (folder / "curves.csv").open("w", encoding="utf-8", newline="") as file,
            by_class as table,
        ):
            for target in targets:
                curves: list[pd.DataFrame] = []
                for mode in settings.modes:
                    edit = fitted(target, mode)
                    measured = measure(edits, edit, target, len(context.classes))
                    curves += curve_tables(measured, mode, target)
                    if table is not None:
                        table.add(measured, mode, target.name, context.classes)
                    if mode == "suppress":
                        suppressed.append(replace(measured, accuracy={}))
                        chosen_edits.append(edit)
                lines = for_spreadsheets(pd.concat(curves))
                lines.to_csv(file, header=not file.tell(), index=False, float_format="%.6g")
                advance(1)
        if suppressed:
            sampled = settings.images if isinstance(edits, SampledMeasures) else None
            known: dict[str, Any] = {} if method is None else {"method": settings.method, "full_size": method.full_size}
            if sampled is not None:
                known["images_sampled"] = sampled
            rows = _judge(context, edits, chosen_edits, targets, suppressed, folder, len(settings.sets), known)
            if method is None:
                files = _gate_files(context, settings, cut, autoencoder, targets, rows)
            else:
                files = _addition_files(context, settings, cut, chosen_edits, rows)
            _keep_edit_files(files, rows, folder)
            write_table(folder / "summary.csv", pd.DataFrame(rows))
            _evaluate(context, settings, classifier, edits, chosen_edits, targets, rows, folder)

    return context.store.get_or_make("control", key_settings, make)


def method_of(settings: EditSettings) -> Method | None:
    """The edit method; None for the gate, which the settings themselves describe."""
    return None if settings.method == GATE else make_method(settings.method, settings.args)


def _used(settings: EditSettings, cut: Cut, method: Method | None, seed: int) -> dict[str, Any]:
    """The settings that the results depend on."""
    used = asdict(settings)
    if method is None:
        idle = {"method", "args"}
    else:
        idle = {"scale", "channels", "args"}
        used |= {**key_of(method), "seed": seed if method.draws else None}
    if cut.linear is not None and not (method and method.everywhere):
        idle |= {"images", "resolution"}  # all images are measured at all strengths
    return {name: value for name, value in used.items() if name not in idle}


def _fitted(
    context: StageContext,
    settings: EditSettings,
    cut: Cut,
    method: Method | None,
    activations: Artifact,
    sae: SAE,
    seed: int,
) -> Callable[[Target, Any], FittedEdit]:
    """What gives the edit of a target in a mode."""
    if method is None:
        return lambda target, mode: GateEdit.of(cut, contributions_of(sae.decoder, target, settings), mode)
    fitting = fitting_of(context, cut, activations, sae, seed)
    return lambda target, _: method.fit(fitting, target)


def _judge(
    context: StageContext,
    edits: EditMeasures,
    fitted: Sequence[FittedEdit],
    targets: Sequence[Target],
    suppressed: Sequence[Measured],
    folder: Path,
    sets: int,
    known: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Write ``verdict.json``; returns the rows of ``summary.csv``.

    ``sets``: how many of the targets, the last ones, are sets of latents. ``known``: what else the record says.
    """
    chosen = [choose(measured.effects["select"]) for measured in suppressed]
    own = np.stack([own_classes(target, len(context.classes)) for target in targets])
    images = edits.labels("test").numpy()
    counts = np.bincount(images, minlength=len(context.classes))
    untouched = edits.outcomes(fitted[0], 0.0)[0].numpy()
    # Allocated beforehand: small arrays that stay between large temporary ones fragment the heap, by a gigabyte with a
    # thousand classes.
    right, kl = np.empty((len(targets), len(images)), bool), np.full(len(targets), np.nan)
    for i, (at, _) in enumerate(chosen):
        alpha = suppressed[i].alphas[at]
        kept, drift = edits.outcomes(fitted[i], alpha)
        right[i] = kept.numpy()
        others = ~own[i] & (counts > 0)
        if others.any():
            moved = np.bincount(images, drift.numpy(), minlength=len(context.classes))  # [C]
            kl[i] = (moved[others] / counts[others]).mean()
    resampled = resampled_effects(images, untouched, right, own)
    rows, found = [], []
    for i, (target, measured, (at, reached)) in enumerate(zip(targets, suppressed, chosen, strict=True)):
        found.append(measured.effects["test"].at(at))
        redrawn = Effect(*(field[i] for field in resampled))
        row = summarise(target, measured, at, reached, redrawn, int(counts[own[i]].sum()))
        worst = int(found[-1].worst)
        row["worst_class"] = context.classes[worst] if worst >= 0 else ""
        row["kl_others"] = float(kl[i])
        rows.append(row)
    stacked = Effect(*(np.stack(field) for field in zip(*found, strict=True)))
    of_class = [i < len(targets) - sets for i in range(len(targets))]  # sets come last
    said = verdict(stacked, resampled, of_class, [reached for _, reached in chosen])
    record: dict[str, Any] = {
        "judged": said.judged,
        "separates": said.separates,
        "separates_low": said.low,
        "separates_high": said.high,
        "separates_published": said.published,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
        "limits": asdict(LIMITS),
        "images_per_class": int(counts[counts > 0].min()) if counts.any() else 0,
    }
    write_record(folder / "verdict.json", {**record, **known})
    return rows


def _gate_files(
    context: StageContext,
    settings: EditSettings,
    cut: Cut,
    autoencoder: SAE,
    targets: Sequence[Target],
    rows: Sequence[dict[str, Any]],
) -> list[EditFile | None]:
    """The gates at their chosen strengths, as edit files."""
    named = []
    for target, row in zip(targets, rows, strict=True):
        edit = Edit(0, row["alpha_used"], "suppress", settings.scale, settings.channels)  # type: ignore[arg-type]
        edits = [replace(edit, latent=la, sign=s) for la, s in zip(target.latents, target.signs, strict=True)]
        named.append((target.name, edits))
    return [*make_edit_files(cut.model, cut.site, autoencoder, named, _backbone(context))]


def _addition_files(
    context: StageContext,
    settings: EditSettings,
    cut: Cut,
    fitted: Sequence[FittedEdit],
    rows: Sequence[dict[str, Any]],
) -> list[EditFile | None]:
    """The edits of another method at their chosen strengths; None for one that is not permanent."""
    weights = [edit.at(row["alpha_used"]).weights for edit, row in zip(fitted, rows, strict=True)]
    new = [
        NewWeights(change(), row["target"], settings.method, row["alpha_used"], cut.site.name)
        for change, row in zip(weights, rows, strict=True)
        if change is not None
    ]
    made = iter(make_additions(cut.model, new, _backbone(context)))
    return [None if change is None else next(made) for change in weights]


def _backbone(context: StageContext) -> str:
    return f"{context.backbone.library}/{context.backbone.name}"


def _keep_edit_files(files: Sequence[EditFile | None], rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the edit files; adds their names to the rows of ``summary.csv``."""
    (folder / "edits").mkdir()
    digits = max(2, len(str(len(files) - 1)))
    for number_, (edit_file, row) in enumerate(zip(files, rows, strict=True)):
        row["edit_file"] = ""
        if edit_file is not None:
            row["edit_file"] = f"edits/{number_:0{digits}d}-{slug(edit_file.name) or 'unnamed'}.json"
            save_edit_file(edit_file, folder / row["edit_file"])


def _evaluate(
    context: StageContext,
    settings: EditSettings,
    classifier: Artifact,
    edits: EditMeasures,
    fitted: Sequence[FittedEdit],
    targets: Sequence[Target],
    rows: list[dict[str, Any]],
    folder: Path,
) -> None:
    """Run the edited networks of the first ``settings.evaluate`` targets on every test image.

    The other measures use cached activations, or the network's tail. Writes ``evaluation.csv``, which has both, and
    ``confusion.csv``.
    """
    evaluated: list[dict[str, Any]] = []
    confusion: list[pd.DataFrame] = []
    counts = torch.bincount(edits.labels("test"), minlength=len(context.classes))
    for target, edit, row in list(zip(targets, fitted, rows, strict=True))[: settings.evaluate]:
        if not row["edit_file"]:  # no weights hold the edit
            continue
        model = context.cut(classifier).model.cpu()
        edit_file = load_edit_file(folder / row["edit_file"])
        module = EditEvaluation(model, apply_edit_file(edit_file, model.state_dict()), context.output_order(model))
        found = evaluate(context, "control", module)
        right, _ = edits.outcomes(edit, row["alpha_used"])
        cached = torch.bincount(edits.labels("test")[right], minlength=len(counts)) / counts
        for k, name in enumerate(context.classes):
            evaluated.append(
                {
                    "target": target.name,
                    "alpha": row["alpha_used"],
                    "class": name,
                    "accuracy_original": float(found["original_accuracy"][k]),
                    "accuracy_edited": float(found["edited_accuracy"][k]),
                    "accuracy_cached": float(cached[k]),
                    "kl": float(found["drift"][k]),
                }
            )
        if not confusion:
            confusion.append(_confusion_table("", found["original_confusion"], context.classes))
        confusion.append(_confusion_table(target.name, found["edited_confusion"], context.classes))
    if evaluated:
        write_table(folder / "evaluation.csv", pd.DataFrame(evaluated))
        write_table(folder / "confusion.csv", pd.concat(confusion, ignore_index=True))


def _confusion_table(target: str, counts: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """The non-zero entries of a confusion matrix ``[outputs, outputs]`` with true classes as rows."""
    counts = counts[: len(classes)].clone()
    beyond = counts[:, len(classes) :].sum(dim=1, keepdim=True)
    counts = torch.cat([counts[:, : len(classes)], beyond], dim=1)
    true, predicted = counts.nonzero(as_tuple=True)
    names = [*classes, OTHER_OUTPUT]
    return pd.DataFrame(
        {
            "target": target,
            "true": [names[k] for k in true.tolist()],
            "predicted": [names[k] for k in predicted.tolist()],
            "images": counts[true, predicted].tolist(),
        }
    )
