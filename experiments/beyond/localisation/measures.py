"""Maps of images whose objects are boxed, their scores, and the intervals of these."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.runs import SAERun, Study
from salve.backbones.cut import Cut
from salve.sae import SAE
from salve.saliency import (
    box_hits,
    centred_gaussian,
    grad_cam,
    grad_fam,
    imputed,
    insertion_deletion_auc,
    map_correlation,
    own_maps,
    pointing_game,
    randomised,
    relevance_mass,
    relevance_rank,
)
from salve.stages.targets import balanced
from salve.types import Split, UserError

#: The map of the class's latent, and what it is compared with.
LATENT = "latent"
METHODS = (LATENT, "grad_cam", "random", "gaussian")
#: Scores of a map against boxes, and of what the network says while its pixels come and go; of deletion less is better.
MEASURES = ("box", "pointing", "mass", "rank")
FAITHFUL = ("insertion", "deletion")
#: Latents drawn for each class, of which each image gets one in turn.
RANDOM = 5
#: Test images of each class on which pixels are imputed and networks randomised; intervals of their curves.
FEW, STEPS = 4, 8
#: Images of each class and split where masks, of which there are as many as images, take the place of boxes.
MASKED = 20
#: Shares of the network's modules, the last first, that have forgotten what they learned; 0 is the head alone.
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Draws of the bootstrap over images, and its interval.
DRAWS, CONFIDENCE = 2000, 0.95


class Objects(NamedTuple):
    """Images of a split of which it is known where the object of their class is.

    Attributes:
        split: its name. indices: of the images. labels: theirs.
        boxes: of each image, in pixels of what the network reads. masks: ``[n, S, S]``, the object's pixels.
    """

    split: Split
    indices: list[int]
    labels: list[int]
    boxes: list[Float[Tensor, "B 4"]]
    masks: Bool[Tensor, "n S S"]

    def first_of_each(self, count: int) -> list[int]:
        """Positions of the first so many images of each class."""
        return [i for i, label in enumerate(self.labels) if self.labels[:i].count(label) < count]


def objects_of(study: Study, split: Split) -> Objects:
    """The objects of a split: boxed, or masked where the data know masks, whose boxes then lie around them.

    Raises:
        UserError: neither is known, or of no image of the split.
    """
    data, preprocess = study.context.data, study.context.data.preprocess
    assert preprocess is not None
    labels, boxes, truth = data.labels(split), data.boxes(split), data.truth(split)
    if boxes is not None:
        seen = {image: boxes.seen(image, preprocess) for image in sorted(boxes.of_image)}
        indices = [image for image, own in seen.items() if len(own)]
        found = [seen[image] for image in indices]
        masks = boxes.masks(indices, preprocess)
    elif truth is not None:
        of_class = torch.tensor(truth.class_concept)[labels]
        shown = truth.presence.gather(1, of_class[:, None])[:, 0]
        drawn = [image for image in balanced(labels, MASKED) if bool(shown[image])]
        every = torch.cat([preprocess.moved_masks(truth.masks([image], int(of_class[image]))) for image in drawn])
        kept = [i for i in range(len(drawn)) if every[i].any()]
        indices, masks = [drawn[i] for i in kept], every[kept]
        found = [_around(mask) for mask in masks]
    else:
        raise UserError(f"{study.testbed.title}: its data have neither boxes nor masks; give data.boxes=FILE.")
    if not indices:
        raise UserError(f"{study.testbed.title}: no {split} image has a box that its preprocessing leaves in sight.")
    return Objects(split, indices, [int(labels[image]) for image in indices], found, masks)


def _around(mask: Bool[Tensor, "S S"]) -> Float[Tensor, "1 4"]:
    rows, columns = (mask.any(dim=axis).nonzero()[:, 0] for axis in (1, 0))
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float64)


class Looks(NamedTuple):
    """What makes maps: a network, an SAE, and for each class its latents and their signs, its own first.

    Attributes:
        latents: by label; a class without a latent is missing.
    """

    cut: Cut
    sae: SAE
    pool: str
    latents: dict[int, tuple[list[int], list[int]]]

    def with_networks(self, model: nn.Module, sae: SAE) -> "Looks":
        """The same latents of a network and an SAE with other weights."""
        return self._replace(cut=self.cut.of(model), sae=sae)


def looks_of(study: Study, run: SAERun, cut: Cut) -> Looks:
    """Each class's latent, chosen by stage ``discover`` on train images, and random others that fire."""
    table, found = run.table("features", "latents.csv"), dict[int, tuple[list[int], list[int]]]()
    for k, name in enumerate(study.classes):
        chosen = run.selected.loc[name]
        others = table[(table["kind"] != "dead") & (table["latent"] != chosen["latent"])]
        if pd.isna(chosen["latent"]) or not len(others):
            continue
        drawn = others.iloc[torch.randperm(len(others), generator=torch.Generator().manual_seed(k))[:RANDOM].numpy()]
        latents = [int(chosen["latent"]), *drawn["latent"].tolist()]
        found[k] = (latents, [int(chosen["sign"]), *drawn["sign"].tolist()])
    return Looks(cut, run.sae.to(study.context.device), str(run.flat_settings["sae.pool"]), found)


def images_of(study: Study, objects: Objects, at: Sequence[int]) -> Tensor:
    """Preprocessed images ``[n, 3, S, S]`` at some positions."""
    dataset = study.context.data.dataset(objects.split)
    return torch.stack([dataset[objects.indices[i]][0] for i in at]).to(study.context.device)


def maps_of(
    study: Study, looks: Looks, objects: Objects, at: Sequence[int], methods: Sequence[str] = METHODS
) -> dict[str, Tensor]:
    """By method, the maps ``[n, S, S]`` of images at some positions, all at one place of the network."""
    model, site, size = looks.cut.model, looks.cut.site, study.context.size
    maps = {method: torch.zeros(len(at), size, size) for method in methods}
    for label in sorted({objects.labels[i] for i in at}):
        own = [row for row, i in enumerate(at) if objects.labels[i] == label]
        latents, signs = looks.latents[label]
        for rows in (
            own[i : i + study.context.data.batch_size] for i in range(0, len(own), study.context.data.batch_size)
        ):
            images = images_of(study, objects, [at[row] for row in rows])
            if set(methods) & {LATENT, "random"}:
                sign = torch.tensor(signs, device=images.device)
                if site.kind == "map":
                    found = own_maps(model, site.name, looks.sae, images, latents, signs=sign)
                else:
                    found = grad_fam(model, site.name, looks.sae, images, latents, signs=sign, pool=looks.pool)
                maps[LATENT][rows] = found[:, 0].cpu()
                if "random" in methods:
                    turns = 1 + torch.tensor(rows) % (len(latents) - 1)
                    maps["random"][rows] = found.cpu()[torch.arange(len(rows)), turns]
            if "grad_cam" in methods:
                maps["grad_cam"][rows] = grad_cam(model, site.name, images, [int(looks.cut.order[label])])[:, 0].cpu()
    if "gaussian" in methods:
        maps["gaussian"] = centred_gaussian(size).expand(len(at), -1, -1).clone()
    return maps


def scores_of(study: Study, looks: Looks) -> pd.DataFrame:
    """One row per test image and method: the scores :data:`MEASURES`, and of the first images of each class also those
    of :data:`FAITHFUL`.

    ``box`` is the share of the three overlaps of MaxBoxAccV2 at which a box around the map is a hit. The threshold of
    each method and overlap is the best one on train and select images.
    """
    chosen_on = [_known(objects_of(study, split), looks) for split in ("train", "select")]
    test = _known(objects_of(study, "test"), looks)
    best = {method: list[Tensor]() for method in METHODS}
    for objects in chosen_on:
        for method, found in maps_of(study, looks, objects, range(len(objects.indices))).items():
            best[method].append(box_hits(found, objects.boxes))
    maps = maps_of(study, looks, test, range(len(test.indices)))
    few = test.first_of_each(FEW)
    faithful = _faithful(study, looks, test, few, {method: maps[method][few] for method in METHODS})
    parts = []
    for method in METHODS:
        at = torch.cat(best[method]).double().mean(dim=0).argmax(dim=0)  # [overlaps]
        hits = box_hits(maps[method], test.boxes).gather(1, at.expand(len(test.indices), 1, -1))[:, 0]
        columns = {
            "box": hits.double().mean(dim=1),
            "pointing": pointing_game(maps[method], test.masks),
            "mass": relevance_mass(maps[method], test.masks),
            "rank": relevance_rank(maps[method], test.masks),
        }
        for name in FAITHFUL:
            columns[name] = torch.full((len(test.indices),), torch.nan)
            columns[name][few] = faithful[method][name]
        names = [study.classes[label] for label in test.labels]
        known = {"testbed": study.testbed.name, "image": test.indices, "class": names, "method": method}
        parts.append(pd.DataFrame(known | {name: values.numpy() for name, values in columns.items()}))
    return pd.concat(parts, ignore_index=True)


def _known(objects: Objects, looks: Looks) -> Objects:
    """Without the images of classes that have no latent."""
    kept = [i for i, label in enumerate(objects.labels) if label in looks.latents]
    indices, labels, boxes = ([own[i] for i in kept] for own in (objects.indices, objects.labels, objects.boxes))
    return Objects(objects.split, indices, labels, boxes, objects.masks[kept])  # type: ignore[arg-type]


@torch.no_grad()
def _faithful(
    study: Study, looks: Looks, objects: Objects, at: Sequence[int], maps: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """By method, areas under the curves of the class's probability while pixels are imputed, as in ROAD."""
    images = images_of(study, objects, at)
    found = {method: {name: torch.zeros(len(at)) for name in FAITHFUL} for method in maps}
    for row, i in enumerate(at):

        def probability(batch: Tensor, label: int = objects.labels[i]) -> Tensor:
            return looks.cut.logits(batch).softmax(dim=1)[:, label]

        for method, own in maps.items():
            one = own[row : row + 1].to(images.device)
            areas = insertion_deletion_auc(probability, images[row : row + 1], one, imputed, STEPS)
            for name in FAITHFUL:
                found[method][name][row] = getattr(areas, name).cpu()
    return found


def randomisation(study: Study, looks: Looks) -> pd.DataFrame:
    """One row per ``method`` (latent, Grad-CAM) and step of the cascade: ``correlation`` of test maps before and after
    by rank, mean over images with an interval, over those whose maps are ``known``, which are not blank.

    At every step what reads the map is random: the SAE's encoder for the latent, the head for Grad-CAM; and of the
    network a ``share`` of modules, the last ones first. In the last row of the latent the network is random, and the
    SAE is not (``sae`` False).
    """
    test = _known(objects_of(study, "test"), looks)
    few, methods = test.first_of_each(FEW), (LATENT, "grad_cam")
    before, shuffled, rows = maps_of(study, looks, test, few, methods), randomised(looks.sae), []
    steps = [*((share, True) for share in SHARES), (1.0, False)]
    for share, sae in steps:
        model = randomised(looks.cut.model, share)
        changed = looks.with_networks(model, shuffled if sae else looks.sae)  # type: ignore[arg-type]
        after = maps_of(study, changed, test, few, methods if sae else (LATENT,))
        for method, maps in after.items():
            values = map_correlation(before[method], maps).numpy()
            mean, low, high = bootstrap(values)
            known = {"testbed": study.testbed.name, "method": method, "share": share, "sae": sae}
            row = {
                "correlation": mean,
                "low": low,
                "high": high,
                "known": int(np.isfinite(values).sum()),
                "n": len(few),
            }
            rows.append(known | row)
    return pd.DataFrame(rows)


def bootstrap(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """The mean of the values that are known, and the ends of its percentile interval over :data:`DRAWS` of images.

    Differences of two methods on the same images are paired: they are values themselves.
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    if not len(known):
        return np.nan, np.nan, np.nan
    drawn = np.random.default_rng(seed).integers(len(known), size=(DRAWS, len(known)))
    ends = np.quantile(known[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(known.mean()), float(ends[0]), float(ends[1])


def summary_of(images: pd.DataFrame) -> pd.DataFrame:
    """One row per testbed, measure and method: ``mean`` with its interval, ``n`` images, and how far the class's latent
    is ``ahead`` of the method on the same images (behind for deletion, of which less is better, is ahead)."""
    rows = []
    for testbed, own in images.groupby("testbed", sort=False):
        for measure in (*MEASURES, *FAITHFUL):
            table = own.pivot(index="image", columns="method", values=measure)  # noqa: PD010
            for method in METHODS:
                values = table[method].to_numpy(float)
                ahead = (table[LATENT] - table[method]).to_numpy(float) * (-1 if measure == "deletion" else 1)
                row = dict(zip(("mean", "low", "high"), bootstrap(values), strict=True))
                row |= dict(zip(("ahead", "ahead_low", "ahead_high"), bootstrap(ahead), strict=True))
                known = {"testbed": testbed, "measure": measure, "method": method, "n": int(np.isfinite(values).sum())}
                rows.append(known | row)
    return pd.DataFrame(rows)
