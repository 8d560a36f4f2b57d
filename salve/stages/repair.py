# SPDX-License-Identifier: MIT
"""Stage ``repair``: take suspects out of the weights, set biases anew, and report what the network then relies on."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, save_tensors, write_record, write_table
from salve.backbones.cut import Cut
from salve.editing import Edit, EditFile, NewWeights, apply_edit_files, make_additions, make_edit_files, save_edit_file
from salve.editing.files import metadata_with
from salve.editing.gains import ERRORS
from salve.editing.recalibrate import group_accuracies, with_shifted_bias
from salve.editing.verdict import RESAMPLES, percentile_interval, wilson
from salve.integrity import USES
from salve.repair_settings import RETRAINED, RepairSettings
from salve.report.grouped import REPAIRED_FILE
from salve.sae import SAE
from salve.stages.candidates import Candidate, best_of_each, beyond_budget, chosen_of, table_of
from salve.stages.context import StageContext, settings_of_key
from salve.stages.counterfactuals import flip_rate
from salve.stages.grouped import Grouped, Running, attribute_of, group_name, grouped, of_split, train_shares
from salve.stages.repair_suspects import suspects_of
from salve.stages.repairing import Search
from salve.stages.retraining import Retraining
from salve.types import Split

#: What is reported on test images, in this order: the network as it was, with new biases alone, with the edit alone,
#: and with both, as the file of weights has it.
STATES = ("before", "recalibrated", "edited", "after")
#: The table of all methods and rivals, each at its best candidate.
RIVALRY = "rivals.csv"
#: Groups with fewer test images are named, since their accuracy is rough.
FEW = 25
#: Ends of an interval.
_ENDS = ("_low", "_high")


def repair(
    context: StageContext,
    settings: RepairSettings,
    labels: int,
    retraining: Retraining,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    audit: Artifact,
) -> Artifact:
    """Choose a repair on select images, write its weights, and measure it on test images.

    Args:
        context, settings: of the run. labels: images of each group whose attribute chooses, as in the audit.
        retraining: trains rivals. classifier, activations, sae, audit: what was made before.

    Returns:
        Artifact ``repair``: ``repaired.safetensors``, a plain ``state_dict``; the edit files that make it, under
        ``edits/``; ``repair.json``, the measures of :data:`STATES`; ``groups.csv``, accuracies of each group;
        ``candidates.csv``, what was tried; ``changed.csv``, the test images whose prediction is another one;
        ``images.csv``, which images chose and which were measured; and where there are rivals ``rivals.csv``, each
        method's best candidate on test images.
    """
    attribute = attribute_of(context)
    labels = labels if grouped(context, "select") is not None else 0
    used = {**asdict(settings), "labels": labels, "seed": context.seed, "attribute": attribute}
    used |= {
        "kept": f"mean over groups beyond {ERRORS:g} errors",
        "budget": "also of the average",
        "judged": "by halves",
    }
    key_settings = settings_of_key(used, classifier, activations, sae, audit)

    def make(folder: Path, _: Path) -> None:
        cut, autoencoder = context.cut(classifier), context.sae(sae, activations)
        suspects = suspects_of(context, settings, audit, autoencoder.dictionary_size)
        search = Search(context, settings, cut, activations, autoencoder, suspects, labels)
        untouched, alone, tried = search.untouched(), search.alone(), []
        edits = [name for name in settings.rivals if name not in RETRAINED]
        count = search.tries(settings.methods) + search.tries(edits)
        with context.progress("trying repairs", count) as advance:
            for candidate in search.candidates(settings.methods):
                tried.append(candidate)
                advance(1)
            chosen = chosen_of([*tried, alone], untouched)
            forgone = beyond_budget([*tried, alone], chosen)
            for candidate in search.candidates(edits, permanent=False):
                tried.append(candidate)
                advance(1)
        tried += search.retrained([name for name in settings.rivals if name in RETRAINED], retraining)
        if retraining.keys:
            write_record(folder / USES, {"classifier": list(dict.fromkeys(retraining.keys))})
        write_table(folder / "candidates.csv", table_of([*tried, alone, untouched], chosen))
        compared = best_of_each(tried) if settings.rivals else {}
        state = _write_weights(context, cut, autoencoder, chosen, suspects.name, folder)
        repaired = context.cut(classifier)
        repaired.model.load_state_dict(state)
        repaired = context.cut_of(repaired.model)
        grouped_test, plain = grouped(context, "test"), of_split(context, "test")

        def logits_of(images: Grouped) -> dict[str, Tensor]:
            running = Running(context, cut, images)
            before, edited = running.logits(), running.logits(chosen.change)
            after = Running(context, repaired, images, room=0).logits()  # of the weights that are written
            found = dict(zip(STATES, (before, before.double() + alone.shifts, edited, after), strict=True))
            for name, one in compared.items():
                if one.network is None:
                    found[name] = running.logits(one.change).double() + one.shifts
                else:
                    found[name] = Running(context, context.cut(one.network), images, room=0).logits()
            return found

        on_plain = logits_of(plain)
        if grouped_test is None:
            images, found = plain, on_plain
        else:
            images, found = grouped_test, logits_of(grouped_test)
        record = {
            **_choice(context, chosen, forgone, alone, search, suspects.name, suspects.classes, labels),
            **{"attribute": images.name, "pairs": images.paired, "test_images": len(images)},
            **{"left_out": search.left_out, "groups_without_images": groups_without_images(context, images)},
            **{"small_groups": small_groups(context, images), "max_accuracy_loss": settings.max_accuracy_loss},
            **{"few_objects": few_objects(context, search.chosen_by)},
        }
        measures = {name: _measures(context, images, found[name], plain, on_plain[name]) for name in found}
        for name in STATES:
            record |= {_of_state(measure, name): value for measure, value in measures[name].items()}
        if compared:
            rows = [{**one.row(), **measures[name]} for name, one in compared.items()]
            write_table(folder / RIVALRY, pd.DataFrame(rows))
        write_table(folder / "groups.csv", _groups(context, images, found))
        write_table(folder / "changed.csv", _changed(context, images, found))
        write_table(folder / "images.csv", _images(context, search.labelled_images))
        write_record(folder / "repair.json", record)

    return context.store.get_or_make("repair", key_settings, make)


def _write_weights(
    context: StageContext, cut: Cut, sae: SAE, chosen: Candidate, name: str, folder: Path
) -> dict[str, Tensor]:
    """Write the edit files and the weights with both; returns these weights."""
    backbone = f"{context.backbone.library}/{context.backbone.name}"
    files: list[EditFile] = []
    if chosen.method == "gate":
        edits = [Edit(latent, chosen.alpha, "suppress", "unit", "all", 1) for latent in chosen.latents]
        files += make_edit_files(cut.model, cut.site, sae, [(name, edits)], backbone)
    elif chosen.change is not None:
        assert chosen.change.weights is not None, "only permanent edits are tried"
        new = NewWeights(chosen.change.weights(), name, chosen.method, chosen.alpha, cut.site.name)
        files += make_additions(cut.model, [new], backbone)
    if bool(chosen.shifts.any()):
        biases = with_shifted_bias(cut.model, cut.order, chosen.shifts, {})
        files += make_additions(cut.model, [NewWeights(biases, name, "recalibration", 1.0, "")], backbone)
    (folder / "edits").mkdir()
    names = [chosen.method, "recalibration"] if chosen.change is not None else ["recalibration"]
    for number, (file, what) in enumerate(zip(files, names, strict=False)):
        save_edit_file(file, folder / "edits" / f"{number:02d}-{what}.json")
    state = {name: tensor.cpu() for name, tensor in cut.model.state_dict().items()}
    if files:
        state = apply_edit_files(files, state)
    save_tensors(folder / REPAIRED_FILE, state, metadata_with({}, files))
    return state


def _choice(
    context: StageContext,
    chosen: Candidate,
    forgone: Candidate | None,
    alone: Candidate,
    search: Search,
    name: str,
    classes: Sequence[int],
    labels: int,
) -> dict[str, Any]:
    """What was chosen, for the record."""
    return {
        "suspects": name,
        "classes": [context.classes[k] for k in classes],
        "labels": labels,
        "labelled": search.labelled,
        "could_be_labelled": search.could_be_labelled,
        "method": chosen.method,
        "latents": list(chosen.latents),
        "alpha": chosen.alpha,
        "shifts": {context.classes[k]: float(chosen.shifts[k]) for k in classes},
        "shifts_alone": {context.classes[k]: float(alone.shifts[k]) for k in classes},
        "select_score": list(chosen.score),
        "select_score_alone": list(alone.score),
        "beyond_budget": None if forgone is None else {"method": forgone.method, "select_score": forgone.score[0]},
        "select_accuracy": chosen.accuracy,
        "select_accuracy_before": search.accuracy_before,
    }


def groups_without_images(context: StageContext, images: Grouped) -> list[str]:
    """Names of the groups that have no image, of which the worst group cannot tell."""
    counts = torch.bincount(images.group, minlength=len(context.classes) * len(images.values))
    return [group_name(context, images, group) for group in (counts == 0).nonzero()[:, 0].tolist()]


def small_groups(context: StageContext, images: Grouped) -> dict[str, int]:
    """By name how many images a group has, of those that have some and fewer than :data:`FEW`."""
    counts = torch.bincount(images.group).tolist()
    return {group_name(context, images, group): count for group, count in enumerate(counts) if 0 < count < FEW}


def few_objects(context: StageContext, images: Grouped | None) -> dict[str, int]:
    """By class how many objects the images show, where several show one and they are fewer than :data:`FEW`."""
    if images is None:
        return {}
    found = {}
    for label in images.labels.unique().tolist():
        own = images.labels == label
        objects, pictures = (len(of[own].unique()) for of in (images.object, images.numbers))
        if objects < min(FEW, pictures):
            found[context.classes[label]] = objects
    return found


def _of_state(measure: str, state: str) -> str:
    """The name in the record of a measure in a state: the end of an interval stays last."""
    end = next((one for one in _ENDS if measure.endswith(one)), "")
    return f"{measure.removesuffix(end)}_{state}{end}"


def _measures(
    context: StageContext, images: Grouped, logits: Tensor, plain: Grouped, on_plain: Tensor
) -> dict[str, Any]:
    """Measures of one network on test images, with 95 % intervals.

    The average weighs groups by their shares of the train images. Intervals of it and of the worst group are of
    draws from Jeffreys' posterior of each group's accuracy (Brown et al. 2001); that of flips is Wilson's.

    Args:
        context: of the run. images: in groups. logits: of these. plain: the test images as they are. on_plain: logits.
    """
    groups = len(context.classes) * len(images.values)
    counts = torch.bincount(images.group, minlength=groups)
    has, rng = (counts > 0).numpy(), np.random.default_rng(0)
    shares = train_shares(context, images)
    share = (counts if shares is None else shares).double().numpy() * has
    share /= share.sum()
    accuracy = group_accuracies(logits.argmax(dim=1) == images.labels, images.group, groups).nan_to_num(0.0).numpy()
    # Of a group, Jeffreys' posterior: unlike resampled images it is not sure of a group that is always wrong, or right.
    right = accuracy * counts.numpy()
    resampled = rng.beta(right + 0.5, counts.numpy() - right + 0.5, (RESAMPLES, groups))
    at = int(np.where(has, accuracy, np.inf).argmin())
    found: dict[str, Any] = {
        "worst_group_of": group_name(context, images, at),
        **_with_interval("worst_group", accuracy[at], resampled[:, has].min(axis=1)),
        **_with_interval("average", accuracy @ share, resampled @ share),
        "accuracy": float((on_plain.argmax(dim=1) == plain.labels).double().mean()),
    }
    if images.paired:
        pairs, rate = len(images) // 2, flip_rate(logits)
        low, high = wilson(rate * pairs, pairs)
        found |= {"counterfactual_flips": rate} | _ends("counterfactual_flips", low, high)
    return found


def _ends(name: str, low: Any, high: Any) -> dict[str, float]:
    return {name + end: float(value) for end, value in zip(_ENDS, (low, high), strict=True)}


def _with_interval(name: str, value: float, resampled: Any) -> dict[str, float]:
    low, high = percentile_interval(resampled, np.asarray(value))
    return {name: float(value)} | _ends(name, low, high)


def _groups(context: StageContext, images: Grouped, found: Mapping[str, Tensor]) -> pd.DataFrame:
    """Each group's accuracy in each state, with Wilson's intervals."""
    groups = len(context.classes) * len(images.values)
    counts = torch.bincount(images.group, minlength=groups)
    accuracy = {
        state: group_accuracies(found[state].argmax(dim=1) == images.labels, images.group, groups) for state in STATES
    }
    rows = []
    for group in counts.nonzero()[:, 0].tolist():
        label, value = divmod(group, len(images.values))
        row: dict[str, Any] = {"class": context.classes[label], "value": images.values[value]}
        row["images"] = int(counts[group])
        for state in STATES:
            share = float(accuracy[state][group])
            low, high = wilson(share * row["images"], row["images"])
            row |= {state: share, f"{state}_low": float(low), f"{state}_high": float(high)}
        rows.append(row)
    return pd.DataFrame(rows)


def _changed(context: StageContext, images: Grouped, found: Mapping[str, Tensor]) -> pd.DataFrame:
    """The test images whose prediction the repair changes."""
    before, after = (found[state].argmax(dim=1) for state in ("before", "after"))
    files = context.data.files("test")
    names = [*context.classes, *["other output"] * (found["before"].shape[1] - len(context.classes))]
    rows = [
        {
            "image": int(images.numbers[at]),
            "file": "" if files is None else files[int(images.numbers[at])],
            "value": images.values[int(images.value[at])],
            "class": context.classes[int(images.labels[at])],
            "before": names[int(before[at])],
            "after": names[int(after[at])],
            "right_before": bool(before[at] == images.labels[at]),
            "right_after": bool(after[at] == images.labels[at]),
        }
        for at in (before != after).nonzero()[:, 0].tolist()
    ]
    columns = ["image", "file", "value", "class", "before", "after", "right_before", "right_after"]
    return pd.DataFrame(rows, columns=columns)


def _images(context: StageContext, labelled: set[int]) -> pd.DataFrame:
    """All select and test images, the attribute's value, and whether it was looked at to choose (``labelled``)."""
    tables = []
    splits: tuple[Split, Split] = ("select", "test")
    for split in splits:
        labels, groups, files = context.data.labels(split), context.data.groups(split), context.data.files(split)
        table = pd.DataFrame({"split": split, "image": range(len(labels))})
        table["file"] = "" if files is None else list(files)
        table["class"] = [context.classes[int(label)] for label in labels]
        if groups is not None:
            table["value"] = [groups.values[value] if value >= 0 else "" for value in groups.of_image.tolist()]
        table["labelled"] = table["image"].isin(labelled) if split == "select" else False
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
