"""Stage ``control``: edit each class's latent over a grid of strengths, and keep the edits as recipes."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, save_tensors, write_table
from salve.editing import Edit, EditEvaluation, apply_recipe, load_recipe, make_recipe, save_recipe
from salve.editing.curves import edit_curves
from salve.stages.job import Job, recipe_of
from salve.stages.targets import EditSettings, Target, contributions_of, refuse_aligned_on_signed, targets_of

#: An edit separates its class when the class falls to this accuracy …
TARGET_ACCURACY = 0.05
#: … while the others' mean accuracy changes by less than this. *Strictly* so, if the mean of their absolute changes,
#: in which gains and losses do not cancel, stays below it.
OTHERS_CHANGE = 0.03


def control(
    job: Job, settings: EditSettings, classifier: Artifact, activations: Artifact, sae: Artifact, features: Artifact
) -> Artifact:
    """Measure every target at every strength on the val split.

    Returns:
        Artifact ``control``: ``curves.csv``, ``summary.csv``, ``evaluation.csv``, ``confusion.safetensors`` and one
        recipe per target under ``recipes/``.
    """
    refuse_aligned_on_signed(settings, activations)
    recipe = recipe_of(asdict(settings), classifier, activations, sae, features)

    def make(folder: Path, _: Path) -> None:
        autoencoder = job.sae(sae, activations)
        val = job.activations(activations, "val")
        weight, bias = job.head(classifier)
        alphas = torch.tensor(settings.alpha)
        targets = targets_of(job.classes, features, settings.sets)
        curves, summary = [], []
        for target in targets:
            rows = contributions_of(autoencoder.decoder, target, settings)
            for mode in settings.modes:
                accuracy, kl = edit_curves(weight, bias, val.activations, val.labels, rows, alphas, mode)  # type: ignore[arg-type]
                curves.append(_curve_table(mode, target.name, settings.alpha, accuracy, job.classes))
                if mode == "suppress":
                    summary.append(summarise(target, settings.alpha, accuracy, kl, job.classes))
        write_table(folder / "curves.csv", pd.concat(curves, ignore_index=True))
        if summary:
            write_table(folder / "summary.csv", pd.DataFrame(summary))
            _keep_recipes(job, settings, classifier, autoencoder, targets, summary, folder)
            _evaluate(job, settings, classifier, targets, summary, pd.concat(curves), folder)

    return job.store.get_or_make("control", recipe, make)


def _curve_table(
    mode: str, target: str, alphas: Sequence[float], accuracy: Tensor, classes: Sequence[str]
) -> pd.DataFrame:
    columns = {
        "mode": mode,
        "target": target,
        "alpha": list(alphas) * len(classes),
        "class": [name for name in classes for _ in alphas],
        "accuracy": accuracy.T.flatten().tolist(),  # [K, C] → class by class
    }
    return pd.DataFrame(columns)


def summarise(
    target: Target, alphas: Sequence[float], accuracy: Tensor, kl: Tensor, classes: Sequence[str]
) -> dict[str, Any]:
    """One row of ``summary.csv``: what suppression reaches, and what it costs the other classes.

    Args:
        target: the edit. alphas: ``K`` strengths. accuracy, kl: ``[K, C]``. classes: ``C`` names.
    """
    own = torch.zeros(len(classes), dtype=torch.bool)
    own[list(target.classes)] = True
    others = ~own & ~accuracy[0].isnan()
    mine = accuracy[:, own].nanmean(dim=1)  # [K]
    change = accuracy[:, others] - accuracy[0, others]  # [K, others]
    alone = not bool(others.any())
    signed = torch.zeros(len(alphas)) if alone else change.mean(dim=1)
    drift = torch.zeros(len(alphas)) if alone else change.abs().mean(dim=1)
    # A class that is lost without an edit shows nothing about one.
    down = (mine <= TARGET_ACCURACY) & bool(mine[0] > TARGET_ACCURACY)
    separating = (down & (signed.abs() < OTHERS_CHANGE)).nonzero()[:, 0]
    reached = down.nonzero()[:, 0]
    # The strength that is reported and kept: the first that separates, else the first that brings the class down.
    at = int(separating[0]) if len(separating) else int(reached[0]) if len(reached) else len(alphas) - 1
    row: dict[str, Any] = {
        "target": target.name,
        "latents": "; ".join(map(str, target.latents)),
        "sign": "; ".join(f"{sign:+d}" for sign in target.signs),
        "kind": "; ".join(target.kinds),
        "alpha": float(alphas[at]) if len(reached) else float("inf"),
        "alpha_used": float(alphas[at]),
        "accuracy_before": float(mine[0]),
        "accuracy_after": float(mine[at]),
        "others_mean_change": float(drift[at]),
        "separates": bool(len(separating)),
        "separates_strictly": bool((down & (drift < OTHERS_CHANGE)).any()),
    }
    if not alone:
        worst = int(change[at].abs().argmax())
        row |= {
            "others_signed_change": float(signed[at]),
            "others_worst_change": float(change[at, worst]),
            "worst_class": classes[int(others.nonzero()[worst])],
            "kl_others": float(kl[at, others].mean()),
        }
    if not bool(mine[0] > TARGET_ACCURACY):
        row["reason"] = f"without any edit its accuracy is only {float(mine[0]):.0%}"
    elif not len(reached):
        row["reason"] = f"accuracy stays at {float(mine.min()):.0%} or above for every strength up to {max(alphas):g}"
    elif not len(separating):
        row["reason"] = f"by then the mean accuracy of the other classes has changed by {float(signed[at]):+.1%}"
    else:
        row["reason"] = ""
    return row


def slug(name: str) -> str:
    """A file name for any text."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def _keep_recipes(
    job: Job,
    settings: EditSettings,
    classifier: Artifact,
    autoencoder: Any,
    targets: Sequence[Target],
    summary: list[dict[str, Any]],
    folder: Path,
) -> None:
    model, site = job.model(classifier)
    model.cpu()
    (folder / "recipes").mkdir()
    for number, (target, row) in enumerate(zip(targets, summary, strict=True)):
        edit = Edit(0, row["alpha_used"], "suppress", settings.scale, settings.channels)  # type: ignore[arg-type]
        edits = [replace(edit, latent=la, sign=s) for la, s in zip(target.latents, target.signs, strict=True)]
        recipe = make_recipe(model, site, autoencoder, edits, f"{job.backbone.library}/{job.backbone.name}")
        row["recipe"] = f"recipes/{number:02d}-{slug(target.name)}.json"
        save_recipe(recipe, folder / row["recipe"])
    write_table(folder / "summary.csv", pd.DataFrame(summary))


def _evaluate(
    job: Job,
    settings: EditSettings,
    classifier: Artifact,
    targets: Sequence[Target],
    summary: list[dict[str, Any]],
    curves: pd.DataFrame,
    folder: Path,
) -> None:
    """The slow path, for the first ``settings.evaluate`` targets: the edited network on every val image."""
    rows, edited, original = [], [], None
    chosen = list(range(min(settings.evaluate, len(targets))))
    for index in chosen:
        model, _ = job.model(classifier)
        model.cpu()
        recipe = load_recipe(folder / summary[index]["recipe"])
        module = EditEvaluation(model, apply_recipe(recipe, model.state_dict()), len(job.classes))
        found = job.test("control", module)
        alpha = summary[index]["alpha_used"]
        at = curves[
            (curves["mode"] == "suppress") & (curves["target"] == targets[index].name) & (curves["alpha"] == alpha)
        ]
        cached = at.set_index("class")["accuracy"]
        for k, name in enumerate(job.classes):
            rows.append(
                {
                    "target": targets[index].name,
                    "alpha": alpha,
                    "class": name,
                    "accuracy_original": float(found["original_accuracy"][k]),
                    "accuracy_edited": float(found["edited_accuracy"][k]),
                    "accuracy_cached": float(cached[name]),
                    "kl": float(found["drift"][k]),
                }
            )
        original = found["original_confusion"]
        edited.append(found["edited_confusion"])
    if original is not None:
        write_table(folder / "evaluation.csv", pd.DataFrame(rows))
        stacked = {"original": original, "edited": torch.stack(edited), "targets": torch.tensor(chosen)}
        save_tensors(folder / "confusion.safetensors", stacked)
