# SPDX-License-Identifier: MIT
"""What an edit does to the images: computed by the page behind a linear tail, looked up elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from salve.backbones.site import Reader
from salve.report.tables import class_names, critical, records
from salve.report.text import is_missing, yes_no
from salve.results import Artifacts
from salve.untrusted import parse_json

#: Numbers of a head, at most: with more there would be no room for images.
MOST_WEIGHTS = 600_000
#: Logits of all images, at most: with more a slider would not be followed within a frame.
MOST_LOGITS = 200_000


@dataclass(frozen=True, eq=False)
class LiveTail:
    """What the page needs to edit the last site itself.

    Attributes:
        weight: ``[C, M]``, the head as it is in the network, float32; its outputs in the network's order.
        bias: ``[C]``. order: ``[C]``, the outputs, those of the data's classes first.
        activations: ``[N, M]`` of the test images. labels: ``[N]``.
        edit_file: what every edit file of this network has.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    order: NDArray[np.int64]
    activations: NDArray[np.float32]
    labels: NDArray[np.int64]
    edit_file: dict[str, Any]

    def sample(self, most: int) -> NDArray[np.int64]:
        """So many images at most, rising: spread evenly over each class, and as many of each as there are of all."""
        if len(self.labels) <= most:
            return np.arange(len(self.labels))
        share = most / len(self.labels)
        chosen = []
        for label in np.unique(self.labels):
            own = np.flatnonzero(self.labels == label)
            count = max(1, int(len(own) * share))
            chosen.append(own[np.linspace(0, len(own) - 1, count).round().astype(int)])
        return np.sort(np.concatenate(chosen))


def linear_tail(artifacts: Artifacts) -> LiveTail | str:
    """The tail of a run whose edits are gates of the last site; else why the page cannot compute them."""
    verdict = artifacts.record("control", "verdict.json")
    if not verdict:
        return "What edits do was not measured, since the stage control did not run; name it in stages, too."
    if verdict.get("method"):
        return (
            f"This run's edits were made by {verdict['method']}, not by gates. What they do was measured at some "
            "strengths, of one target at a time."
        )
    if verdict.get("images_sampled") is not None:
        return (
            "Behind this site the network is not linear, so that a page cannot compute what an edit does. It was "
            "measured at some strengths, of one target at a time."
        )
    file = _edit_file(artifacts)
    known = artifacts.record("classifier", "classifier.json")
    if file is None or not known:
        return "The run's edit files are not there, so that the page does not know the head."
    (reader,) = (Reader(name, groups) for name, groups in file["readers"].items())
    weight = artifacts.tensors("control", f"edits/{file['originals']}")[reader.weight]
    flat = weight.reshape(len(weight), -1)
    if flat.size > MOST_WEIGHTS:
        return f"The head has {len(flat)} outputs of {flat.shape[1]} channels, which is too large for a page."
    bias = artifacts.tensors("classifier", "model.safetensors").get(reader.bias, np.zeros(len(flat), np.float32))
    first = [int(unit) for unit in known.get("outputs") or ()]
    rest = [unit for unit in range(len(flat)) if unit not in set(first)]
    shards = [
        artifacts.tensors(kind, path.name)
        for kind, path in artifacts.files("test-*.safetensors")
        if kind == "activations"
    ]
    if not shards:
        return "The activations of the test images are not there."
    return LiveTail(
        weight=flat.astype(np.float32),
        bias=bias.astype(np.float32),
        order=np.array(first + rest),
        activations=np.concatenate([shard["activations"] for shard in shards]),
        labels=np.concatenate([shard["labels"] for shard in shards]),
        edit_file={**file, "shape": list(weight.shape)},
    )


def _edit_file(artifacts: Artifacts) -> dict[str, Any] | None:
    """What the run's edit files have in common, and the checksums of the network's tensors."""
    from safetensors import safe_open

    for kind, path in artifacts.files("edits/*.json"):
        if kind != "control":
            continue
        record = parse_json(path.read_text(encoding="utf-8"))
        with safe_open(path.with_name(record["originals"]), framework="numpy") as file:
            header = parse_json(dict(file.metadata() or {})["salve"])
        kept = ("format", "backbone", "site", "before", "sae", "readers", "originals")
        one = record["edits"][0]
        return {
            **{name: record[name] for name in kept},
            "scale": one["scale"],
            "channels": one["channels"],
            "weights": header["weights"],
        }
    return None


def measured_grid(artifacts: Artifacts) -> dict[str, Any]:
    """What was measured of edits on test images: curves of each target, its images' critical strengths, and confusion
    matrices without an edit and at the strength chosen.
    """
    curves, images = artifacts.table("control", "curves.csv"), artifacts.table("diagnose", "images.csv")
    if not {"split", "mode", "target", "alpha"} <= set(curves.columns):
        return {}
    classes = class_names(artifacts)
    test = curves[curves["split"] == "test"]
    columns = ("accuracy", "others_accuracy", "others_lowest", "others_highest")
    matrices = _matrices(artifacts.table("control", "confusion.csv"), classes)
    used = artifacts.table("control", "summary.csv")
    used_of = dict(zip(used["target"], used["alpha_used"], strict=True)) if "alpha_used" in used else {}
    targets: list[dict[str, Any]] = []
    for (target, mode), rows in test.groupby(["target", "mode"], sort=False):
        strengths = [float(alpha) for alpha in rows["alpha"]]
        found = {name: [float(value) for value in rows[name]] for name in columns if name in rows}
        infinite = [alpha == float("inf") for alpha in strengths]
        finite = [0.0 if at_end else alpha for alpha, at_end in zip(strengths, infinite, strict=True)]
        one: dict[str, Any] = {"target": str(target), "mode": str(mode), "alpha": finite, "infinite": infinite, **found}
        if mode == "suppress" and target in matrices and target in used_of:
            # Both tables round their strengths, and not alike.
            apart = [0.0 if at == used_of[target] else abs(at - used_of[target]) for at in strengths]
            one["chosen"] = int(np.argmin(apart))
        targets.append(one)
    return {"targets": targets, "images": _crossings(images, classes), "matrices": matrices}


def _matrices(table: pd.DataFrame, classes: Sequence[str]) -> dict[str, list[list[int]]]:
    """By target, and by "" without an edit, what is not 0: true class, output predicted, images.

    All outputs that are no class count as one, after the classes.
    """
    if not {"target", "true", "predicted", "images"} <= set(table.columns):
        return {}
    numbered = {name: k for k, name in enumerate(classes)}
    found: dict[str, list[list[int]]] = {}
    for row in records(table):
        target = "" if is_missing(row["target"]) else str(row["target"])
        predicted = numbered.get(str(row["predicted"]), len(classes))
        found.setdefault(target, []).append([numbered[str(row["true"])], predicted, int(row["images"])])
    return found


def _crossings(images: pd.DataFrame, classes: Sequence[str]) -> dict[str, list[list[float | int | None]]]:
    """By class, the image and its critical strength for the class's latent, of images that were right."""
    if "class" not in images or "correct" not in images:
        return {}
    found: dict[str, list[list[float | int | None]]] = {}
    strengths = critical(images, "flip")
    for row, strength in zip(records(images), strengths, strict=True):
        if yes_no(row["correct"]) == "yes" and row["class"] in classes and np.isfinite(strength):
            found.setdefault(str(row["class"]), []).append([int(row["image"]), float(strength)])
    return found
