# SPDX-License-Identifier: MIT
"""Maps of latents over test images, and their scores; stage ``validate`` divides the classes among the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc

from salve.backbones import Site
from salve.data.base import ConceptTruth, ImageData
from salve.data.transforms import Preprocess
from salve.sae import SAE
from salve.sae.positions import at_positions, pooled
from salve.saliency import grad_fam, insertion_deletion_auc, iou, own_maps, pointing_game
from salve.saliency.common import NoMap, activations_at
from salve.settings import ValidateSettings
from salve.stages.targets import Target

#: Kinds of maps, with the beginning of the names of their scores.
GRAD_FAM, OWN = "grad_fam", "own"
PREFIX = {GRAD_FAM: "", OWN: "own_"}


@dataclass(frozen=True)
class Seen:
    """What the parts of this stage share: the data, the network, the SAE and the latents of the targets."""

    data: ImageData
    device: torch.device
    seed: int
    model: nn.Module
    site: Site
    sae: SAE
    pool: str
    values: Tensor  # [T, N]: each target's latent of the test images, times its sign
    labels: Tensor  # [N]
    pictured: int  # classes of which pictures are made, the first ones

    def on(self, device: torch.device) -> "Seen":
        """The same on another device, to which the network and the SAE are moved."""
        return replace(self, device=device, model=self.model.to(device), sae=self.sae.to(device))

    @property
    def preprocess(self) -> Preprocess:
        assert self.data.preprocess is not None, "the data are bound to the backbone before any stage runs"
        return self.data.preprocess

    def images(self, indices: Sequence[int]) -> Tensor:
        """Preprocessed test images ``[n, 3, H, W]``."""
        dataset = self.data.dataset("test")
        return torch.stack([dataset[i][0] for i in indices]).to(self.device)

    def maps(self, kind: str, indices: Sequence[int], latents: Sequence[int], signs: Sequence[int]) -> Tensor:
        """Maps of a kind ``[n, L, H, W]``."""
        chosen, sign = torch.tensor(latents, device=self.device), torch.tensor(signs, device=self.device)
        parts, size = [], self.data.batch_size
        for i in range(0, len(indices), size):
            images = self.images(indices[i : i + size])
            if kind == OWN:
                found = own_maps(self.model, self.site.name, self.sae, images, chosen, signs=sign)
            else:
                found = grad_fam(self.model, self.site.name, self.sae, images, chosen, signs=sign, pool=self.pool)
            parts.append(found.cpu())
        return torch.cat(parts)

    def why_none(self) -> dict[str, str]:
        """By kind of map, why there is none; an empty text where there is one."""
        found = dict.fromkeys(PREFIX, "")
        for kind in found:
            try:
                self.maps(kind, [0], [0], [1])
            except NoMap as error:
                found[kind] = str(error)
        return found


def localise(
    settings: ValidateSettings, table: pd.DataFrame, kinds: Sequence[str], inputs: Seen, numbered: tuple[int, Target]
) -> dict[str, object]:
    """One row of ``localisation.csv``: the scores of one class's latent and of its controls.

    Args:
        settings, inputs: of the stage. table: ``latents.csv``. kinds: of maps. numbered: the class, and its number.
    """
    number, target = numbered
    latent, sign, k = target.latents[0], target.signs[0], target.classes[0]
    generator = torch.Generator().manual_seed(inputs.seed + k)
    alive = table[(table["kind"] != "dead") & (table["latent"] != latent)]
    drawn = torch.randperm(len(alive), generator=generator)[: settings.random_latents].tolist()
    others = [int(alive["latent"].iloc[i]) for i in drawn]
    # A random signed latent gets the sign of its strongest class mean.
    signs = [sign, *(int(alive["sign"].iloc[i]) for i in drawn)]
    row: dict[str, object] = {"class": target.name, "latent": latent}
    truth = inputs.data.truth("test")
    own = (inputs.labels == k).nonzero()[:, 0].tolist()
    boxes = inputs.data.boxes("test")
    if truth is not None:
        row |= _against_truth(inputs, settings, truth, k, inputs.values[number], own, [latent, *others], signs, kinds)
    elif boxes is not None:
        boxed = [i for i in own if len(boxes.of_image.get(i, ()))][: settings.localise_images]
        masks = boxes.masks(boxed, inputs.preprocess)
        row |= _against_masks(inputs, settings, boxed, masks, [latent, *others], signs, kinds)
    if settings.faithfulness_steps and own and kinds:
        row |= _faithfulness(inputs, settings, latent, sign, own, generator, kinds)
    return row


def _against_truth(
    inputs: Seen,
    settings: ValidateSettings,
    truth: ConceptTruth,
    k: int,
    value: Tensor,
    own: list[int],
    latents: list[int],
    signs: list[int],
    kinds: Sequence[str],
) -> dict[str, object]:
    """Scores against the concept's presence and masks: AUROC, pointing game, IoU, and those of random latents."""
    concept = truth.class_concept[k]
    indices = [i for i in own if bool(truth.presence[i, concept])][: settings.localise_images]
    row: dict[str, object] = {
        "concept": truth.concepts[concept],
        "auroc": float(binary_auroc(value, truth.presence[:, concept].long())),
    }
    masks = inputs.preprocess.moved_masks(truth.masks(indices, concept)) if indices else torch.empty(0)
    return row | _against_masks(inputs, settings, indices, masks, latents, signs, kinds)


def _against_masks(
    inputs: Seen,
    settings: ValidateSettings,
    indices: list[int],
    masks: Tensor,
    latents: list[int],
    signs: list[int],
    kinds: Sequence[str],
) -> dict[str, object]:
    """Pointing game and IoU of a latent, and of random ones, on images whose objects are masked ``[n, S, S]``."""
    row: dict[str, object] = {"n": len(indices)}
    if not (indices and kinds):
        return row
    near = settings.pointing_tolerance
    for kind in kinds:
        maps = inputs.maps(kind, indices, latents, signs)  # [n, 1 + random, H, W]
        each = [maps[:, j] for j in range(maps.shape[1])]
        scores = {
            "pointing": [float(pointing_game(one, masks, near).nanmean()) for one in each],
            "pointing_strict": [float(pointing_game(one, masks).nanmean()) for one in each],
            "iou": [float(iou(one, masks).nanmean()) for one in each],
        }
        for name, (mine, *random) in scores.items():
            row[f"{PREFIX[kind]}{name}"] = mine
            row[f"random_{PREFIX[kind]}{name}"] = sum(random) / len(random) if random else float("nan")
    # A random pixel hits with the share of the image that the object, widened by the tolerance, covers.
    wide = nn.functional.max_pool2d(masks.float()[:, None], 2 * near + 1, stride=1, padding=near)
    row["chance_pointing"] = float(wide.mean())
    return row


def _faithfulness(
    inputs: Seen,
    settings: ValidateSettings,
    latent: int,
    sign: int,
    own: list[int],
    generator: torch.Generator,
    kinds: Sequence[str],
) -> dict[str, object]:
    """Areas under the insertion and deletion curves, relative to the whole image's value; also for a random map.

    The value is the latent's pre-activation at a vector, where a latent may be silent, and the image's latent at a map.
    """
    indices = own[: settings.top_images]
    images = inputs.images(indices)
    encode = inputs.sae.pre_activations if inputs.site.kind == "vector" else inputs.sae.encode

    @torch.no_grad()
    def score(batch: Tensor) -> Tensor:
        rows = activations_at(inputs.model, inputs.site, batch)
        return sign * pooled(at_positions(encode, rows), inputs.pool)[:, latent]

    blank = torch.zeros((), device=inputs.device)
    # Noise as coarse as the map; pixel noise would be too easy to beat.
    coarse = torch.rand(len(indices), 1, 7, 7, generator=generator)
    noise = nn.functional.interpolate(coarse, size=tuple(images.shape[2:]), mode="bilinear")[:, 0].to(images.device)
    maps = {PREFIX[kind]: inputs.maps(kind, indices, [latent], [sign])[:, 0].to(images.device) for kind in kinds}
    whole, row = score(images), dict[str, object]()
    for prefix, one in {**maps, "random_": noise}.items():
        areas = insertion_deletion_auc(score, images, one, blank, steps=settings.faithfulness_steps)
        for name, area in areas._asdict().items():
            row[prefix + name] = float((area.mean() / whole.mean()).cpu())
    return row
