# SPDX-License-Identifier: MIT
"""Stage ``audit``: latents that push images towards a class which they are not of, for a person to judge."""

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, digest_of_tensors, save_tensors, write_record, write_table
from salve.backbones.cut import Cut
from salve.data.transforms import Preprocess
from salve.features.suspects import labelled_score, unlabelled_score
from salve.repair_settings import AuditSettings
from salve.report.audited import poor_suspects
from salve.results import Artifacts
from salve.sae import SAE
from salve.stages.context import StageContext, settings_of_key
from salve.stages.counterfactuals import Counterfactuals
from salve.stages.evidence import Attribute, Evidence
from salve.stages.grouped import attribute_of, grouped
from salve.stages.localise import PREFIX, Seen
from salve.types import Labels

log = logging.getLogger(__name__)

#: Images of a class, at most, on which it is measured where a suspect's map lies.
LOCATED = 16
#: Kinds of maps, the first that there is counts.
KINDS = ("own", "grad_fam")


def audit(
    context: StageContext,
    settings: AuditSettings,
    pool: str,
    pictures: int,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
) -> Artifact:
    """Rank the latents that each class should perhaps not rely on, on select images, and describe them on test images.

    Args:
        context, settings: of the run.
        pool: at a map, how the latents at an image's positions become the image's; see :class:`SAESettings`.
        pictures: classes of whose suspects images are shown, the first ones.
        classifier, activations, sae: what was made before.

    Returns:
        Artifact ``audit``: ``suspects.csv``, ``audit.json``, ``signs.safetensors``, of every latent for every class,
        and ``pictures.safetensors`` with ``pictures.csv``.
    """
    labels = settings.labels if grouped(context, "select") is not None else 0
    used = {**asdict(settings), "labels": labels, "pool": pool, "pictures": pictures, "seed": context.seed}
    used["writes"] = "signs and files"
    if (boxes := context.data.boxes("test")) is not None:
        used["boxes"] = digest_of_tensors({str(image): box for image, box in boxes.of_image.items()})
    key_settings = settings_of_key({**used, "attribute": attribute_of(context)}, classifier, activations, sae)

    def make(folder: Path, _: Path) -> None:
        cut = context.cut(classifier)
        autoencoder = context.sae(sae, activations)
        chosen_on = Evidence(context, cut, autoencoder, pool, "select")
        told_by = Evidence(context, cut, autoencoder, pool, "test")
        for caution in filter(None, (chosen_on.caution(), poor_suspects(Artifacts({"sae": sae.path})))):
            log.warning("Caution: %s", caution)  # before a repair, which takes longer
        attribute = None if not labels else Attribute.of(chosen_on, labels)
        score = unlabelled_score(chosen_on.effects, chosen_on.lifts)
        if attribute is not None:
            score = labelled_score(chosen_on.effects, attribute.separation)
        rows = _rows(context, settings, score, chosen_on, told_by, attribute)
        seen = _seen(context, cut, autoencoder, pool)
        kinds = [kind for kind in KINDS if not seen.why_none()[kind]]
        _locate(rows, seen, told_by, kinds)
        pairs = grouped(context, "test")
        flipped: dict[str, float] = {}
        if pairs is not None and pairs.paired:
            found = Counterfactuals(context, cut, autoencoder, pairs)
            flipped = {name: found.share(k) for k, name in enumerate(context.classes)}
            for row in rows:
                row["counterfactual"] = found.undone(int(row["label"]), int(row["latent"]))
        for row in rows:
            row["turned"] = flipped.get(str(row["class"]), float("nan"))
        _pictures(context, settings, seen, told_by, rows, kinds, pictures, folder)
        write_table(folder / "suspects.csv", pd.DataFrame(rows).drop(columns="label"))
        save_tensors(folder / "signs.safetensors", {"signs": chosen_on.signs.to(torch.int8)})
        write_record(folder / "audit.json", _record(labels, attribute, chosen_on))

    return context.store.get_or_make("audit", key_settings, make)


def _rows(
    context: StageContext,
    settings: AuditSettings,
    score: Tensor,
    chosen_on: Evidence,
    told_by: Evidence,
    attribute: Attribute | None,
) -> list[dict[str, Any]]:
    """One row per class and suspect: chosen by its score on select, with the numbers of test images."""
    told = None if attribute is None else Attribute.of(told_by, like=attribute)
    dead = ~chosen_on.read[0].any(dim=0)  # a latent that never fires comes last, where all scores are 0, too
    best = score.masked_fill(dead, -1.0).topk(min(settings.suspects, score.shape[1]), dim=1)
    rows = []
    for k, name in enumerate(context.classes):
        for rank, latent in enumerate(best.indices[k].tolist()):
            row = {
                "class": name,
                "label": k,
                "rank": rank + 1,
                "latent": latent,
                "sign": int(chosen_on.signs[k, latent]),
                "score": float(score[k, latent]),
                "effect": float(told_by.effects[k, latent]),
                "lift": float(told_by.lifts[k, latent]),
                "select_effect": float(chosen_on.effects[k, latent]),
                "select_lift": float(chosen_on.lifts[k, latent]),
            }
            if attribute is not None and told is not None:
                row["value"] = attribute.values[int(attribute.value[k])]
                row["pull"], row["select_pull"] = float(told.pull[k]), float(attribute.pull[k])
                row["separation"] = float(told.separation[k, latent])
                row["select_separation"] = float(attribute.separation[k, latent])
            rows.append(row)
    return rows


def _seen(context: StageContext, cut: Cut, sae: SAE, pool: str) -> Seen:
    """What makes maps of test images."""
    empty = torch.empty(0)
    given = (context.data, context.device, context.seed, cut.model, cut.site, deepcopy(sae).to(context.device), pool)
    return Seen(*given, empty, empty, 0)


def _locate(rows: Sequence[dict[str, Any]], seen: Seen, told_by: Evidence, kinds: Sequence[str]) -> None:
    """Add ``off_object``: the share of a suspect's map that lies off the object that defines its class.

    Measured on test images of the class that show the object, where the data have masks, or else boxes.
    """
    by_class: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        row["off_object"] = float("nan")
        by_class.setdefault(int(row["label"]), []).append(row)
    for k, own in by_class.items() if kinds else ():
        of_class, on = objects_shown(told_by.context.data, told_by.images.labels, seen.preprocess, k)
        if not of_class:
            continue
        maps = seen.maps(kinds[0], of_class, [row["latent"] for row in own], [row["sign"] for row in own])
        total = maps.sum(dim=(0, 2, 3))
        off = (maps * ~on[:, None]).sum(dim=(0, 2, 3)) / total
        for row, share in zip(own, off.tolist(), strict=True):
            row["off_object"] = share


def objects_shown(data: Any, labels: Labels, preprocess: Preprocess, label: int) -> tuple[list[int], Tensor]:
    """Test images that show a class's object, and where it is; none if the data know neither masks nor boxes.

    Args:
        data: the images. labels: of the test images. preprocess: of the backbone. label: the class.

    Returns:
        Numbers of the images, at most :data:`LOCATED`, and bool ``[n, S, S]``.
    """
    own = labels == label
    if (truth := data.truth("test")) is not None:
        concept = truth.class_concept[label]
        numbers = (own & truth.presence[:, concept]).nonzero()[:, 0][:LOCATED].tolist()
        return numbers, preprocess.moved_masks(truth.masks(numbers, concept)) if numbers else torch.empty(0)
    if (boxes := data.boxes("test")) is not None:
        numbers = [number for number in own.nonzero()[:, 0].tolist() if len(boxes.of_image.get(number, ()))][:LOCATED]
        return numbers, boxes.masks(numbers, preprocess)
    return [], torch.empty(0)


def _pictures(
    context: StageContext,
    settings: AuditSettings,
    seen: Seen,
    told_by: Evidence,
    rows: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
    pictures: int,
    folder: Path,
) -> None:
    """Write the test images of other classes that excite each suspect most, with its maps."""
    latents, logits = told_by.read
    labels, taken = told_by.images.labels, logits.argmax(dim=1)
    size, count = seen.preprocess.size, settings.top_images
    shown = [row for row in rows if int(row["label"]) < pictures]
    images = torch.zeros(len(shown), count, 3, size, size, dtype=torch.uint8)
    maps = {f"{PREFIX[kind]}maps": torch.zeros(len(shown), count, size, size) for kind in kinds}
    table, files = [], context.data.files("test")
    for at, row in enumerate(shown):
        k, latent, sign = int(row["label"]), int(row["latent"]), int(row["sign"])
        values = (latents[:, latent] * sign).masked_fill(labels == k, -torch.inf)
        top = values.topk(min(count, int((labels != k).sum()))).indices.tolist()
        images[at, : len(top)] = (seen.preprocess.denormalise(seen.images(top).cpu()) * 255).round().to(torch.uint8)
        for kind in kinds:
            maps[f"{PREFIX[kind]}maps"][at, : len(top)] = seen.maps(kind, top, [latent], [sign])[:, 0]
        for image in top:
            table.append(
                {
                    "class": row["class"],
                    "rank": row["rank"],
                    "latent": latent,
                    "image": image,
                    "file": "" if files is None else files[image],
                    "label": context.classes[int(labels[image])],
                    "taken_for": context.classes[int(taken[image])],
                    "value": float(latents[image, latent]),
                }
            )
    write_table(folder / "pictures.csv", pd.DataFrame(table))
    save_tensors(folder / "pictures.safetensors", {"images": images, **maps})


def _record(labels: int, attribute: Attribute | None, chosen_on: Evidence) -> dict[str, Any]:
    record: dict[str, Any] = {"labels": labels, "mistakes": chosen_on.mistakes().tolist()}
    if attribute is not None:
        record |= {"attribute": attribute.name, "values": list(attribute.values), "labelled": attribute.images}
        record["pull"] = attribute.pull.tolist()
        record["value"] = [attribute.values[v] for v in attribute.value.tolist()]
    return record
