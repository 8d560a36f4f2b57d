"""Stage ``validate``: saliency maps of the classes' latents, scores of the maps, and maximised images."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_auroc
from torchvision.transforms.v2 import functional as transforms

from salve.artifacts import Artifact, save_tensors, write_table
from salve.backbones import Site, site_activations
from salve.data.base import ConceptTruth
from salve.data.transforms import Preprocess
from salve.sae import SAE
from salve.saliency import grad_fam, insertion_deletion_auc, iou, maximise, pointing_game
from salve.settings import ValidateSettings
from salve.stages.context import StageContext, settings_of_key
from salve.stages.targets import Target, targets_of

#: Images optimised in one batch: bounds memory however many classes there are.
MAXIMISED_TOGETHER = 5


@dataclass(frozen=True)
class _Inputs:
    """What the parts of this stage share: the network, the SAE and the test split's latents."""

    context: StageContext
    model: nn.Module
    site: Site
    sae: SAE
    latents: Tensor  # [N, d] of the test split
    labels: Tensor  # [N]
    pictured: int  # classes of which pictures are made, the first ones

    def images(self, indices: Sequence[int]) -> Tensor:
        """Preprocessed test images ``[n, 3, H, W]``."""
        dataset = self.context.data.dataset("test")
        return torch.stack([dataset[i][0] for i in indices]).to(self.context.device)

    def maps(self, indices: Sequence[int], latents: Sequence[int], signs: Sequence[int]) -> Tensor:
        """Grad-FAM ``[n, L, H, W]``."""
        chosen, sign = (
            torch.tensor(latents, device=self.context.device),
            torch.tensor(signs, device=self.context.device),
        )
        size = self.context.data.batch_size
        parts = [
            grad_fam(self.model, self.site.name, self.sae, self.images(indices[i : i + size]), chosen, signs=sign).cpu()
            for i in range(0, len(indices), size)
        ]
        return torch.cat(parts)


def validate(
    context: StageContext,
    settings: ValidateSettings,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    features: Artifact,
) -> Artifact:
    """Validate each class's latent on the test split.

    Returns:
        Artifact ``validate``: ``top.csv``, and ``localisation.csv`` with scores against masks where the data has them;
        of the first ``validate.pictures`` classes ``saliency.safetensors``, ``maximisation.csv`` and ``.safetensors``.
    """
    key_settings = settings_of_key(asdict(settings), classifier, activations, sae, features) | {"seed": context.seed}

    def make(folder: Path, _: Path) -> None:
        cut = context.cut(classifier)
        model, site = cut.model, cut.site
        test = context.activations(activations, "test")
        autoencoder = context.sae(sae, activations)
        latents = autoencoder.encode(test.activations)
        pictured = min(settings.pictures, len(context.classes))
        inputs = _Inputs(context, model, site, autoencoder.to(context.device), latents, test.labels, pictured)
        targets = targets_of(context.classes, features, [])
        _top_images(inputs, settings, targets, folder)
        shown = [target for target in targets if target.classes[0] < pictured]
        if settings.maximisation_steps and shown:
            _maximise(inputs, settings, shown, folder)
        rows, table = [], features.table("latents.csv")
        with context.progress("scoring saliency maps", len(targets)) as advance:
            for target in targets:
                rows.append(_localise(inputs, settings, target, table))
                advance(1)
        write_table(folder / "localisation.csv", pd.DataFrame(rows))

    return context.store.get_or_make("validate", key_settings, make)


def _top_images(inputs: _Inputs, settings: ValidateSettings, targets: Sequence[Target], folder: Path) -> None:
    """Write ``top.csv``, the images that excite each class's latent most, and pictures of them with their maps."""
    rows: list[dict[str, object]] = []
    preprocess = _preprocess(inputs.context)
    count = min(settings.top_images, len(inputs.latents))
    # One row per pictured class; that of a class without a latent stays blank.
    images = torch.zeros(inputs.pictured, count, 3, preprocess.size, preprocess.size, dtype=torch.uint8)
    maps = torch.zeros(inputs.pictured, count, preprocess.size, preprocess.size)
    for target in targets:
        latent, sign = target.latents[0], target.signs[0]
        values = sign * inputs.latents[:, latent]
        top = values.topk(count)
        indices = top.indices.tolist()
        if target.classes[0] < inputs.pictured:
            shown = preprocess.denormalise(inputs.images(indices).cpu())
            images[target.classes[0]] = (shown * 255).round().to(torch.uint8)
            maps[target.classes[0]] = inputs.maps(indices, [latent], [sign])[:, 0]
        rows += [
            {
                "class": target.name,
                "rank": rank + 1,
                "latent": latent,
                "image": index,
                "label": inputs.context.classes[int(inputs.labels[index])],
                "value": value * sign,
            }
            for rank, (index, value) in enumerate(zip(indices, top.values.tolist(), strict=True))
        ]
    write_table(folder / "top.csv", pd.DataFrame(rows))
    save_tensors(folder / "saliency.safetensors", {"images": images, "maps": maps})


def _maximise(inputs: _Inputs, settings: ValidateSettings, targets: Sequence[Target], folder: Path) -> None:
    """Write ``maximisation.csv`` and ``maximisation.safetensors``: images optimised to excite each target's latent."""
    preprocess = _preprocess(inputs.context)
    images = torch.zeros(inputs.pictured, 3, preprocess.size, preprocess.size, dtype=torch.uint8)
    rows = []
    with inputs.context.progress("maximising activations", len(targets)) as advance:
        for start in range(0, len(targets), MAXIMISED_TOGETHER):
            part = targets[start : start + MAXIMISED_TOGETHER]
            found = maximise(
                inputs.model,
                inputs.site.name,
                inputs.sae,
                torch.tensor([target.latents[0] for target in part], device=inputs.context.device),
                preprocess,
                size=preprocess.size,
                steps=settings.maximisation_steps,
                signs=torch.tensor([target.signs[0] for target in part], device=inputs.context.device),
                seed=inputs.context.seed,
            )
            images[[target.classes[0] for target in part]] = (found.images.cpu() * 255).round().to(torch.uint8)
            values = zip(part, found.start_values.tolist(), found.final_values.tolist(), strict=True)
            rows += [
                {"class": target.name, "latent": target.latents[0], "start_value": before, "final_value": after}
                for target, before, after in values
            ]
            advance(len(part))
    save_tensors(folder / "maximisation.safetensors", {"images": images})
    write_table(folder / "maximisation.csv", pd.DataFrame(rows))


def _localise(inputs: _Inputs, settings: ValidateSettings, target: Target, table: pd.DataFrame) -> dict[str, object]:
    """One row of ``localisation.csv``: the scores of one class's latent and of its controls.

    Args:
        inputs, settings: of the stage. target: the class. table: ``latents.csv``.
    """
    latent, sign, k = target.latents[0], target.signs[0], target.classes[0]
    generator = torch.Generator().manual_seed(inputs.context.seed + k)
    alive = table[(table["kind"] != "dead") & (table["latent"] != latent)]
    drawn = torch.randperm(len(alive), generator=generator)[: settings.random_latents].tolist()
    others = [int(alive["latent"].iloc[i]) for i in drawn]
    # A random signed latent gets the sign of its strongest class mean.
    signs = [sign, *(int(alive["sign"].iloc[i]) for i in drawn)]
    value = sign * inputs.latents[:, latent]
    row: dict[str, object] = {"class": target.name, "latent": latent}
    truth = inputs.context.data.truth("test")
    own = (inputs.labels == k).nonzero()[:, 0].tolist()
    if truth is not None:
        row |= _against_truth(inputs, settings, truth, k, value, own, [latent, *others], signs)
    if settings.faithfulness_steps and own:
        row |= _faithfulness(inputs, settings, latent, sign, own, generator)
    return row


def _against_truth(
    inputs: _Inputs,
    settings: ValidateSettings,
    truth: ConceptTruth,
    k: int,
    value: Tensor,
    own: list[int],
    latents: list[int],
    signs: list[int],
) -> dict[str, object]:
    """Scores against the concept's presence and masks: AUROC, pointing game, IoU, and those of random latents."""
    concept = truth.class_concept[k]
    indices = [i for i in own if bool(truth.presence[i, concept])][: settings.localise_images]
    row: dict[str, object] = {
        "concept": truth.concepts[concept],
        "auroc": float(binary_auroc(value, truth.presence[:, concept].long())),
        "n": len(indices),
    }
    if not indices:
        return row
    preprocess = _preprocess(inputs.context)
    masks = masks_like(truth.masks(indices, concept), preprocess)
    maps = inputs.maps(indices, latents, signs)  # [n, 1 + random, H, W]
    each = [maps[:, j] for j in range(maps.shape[1])]
    near = settings.pointing_tolerance
    scores = {
        "pointing": [float(pointing_game(one, masks, near).nanmean()) for one in each],
        "pointing_strict": [float(pointing_game(one, masks).nanmean()) for one in each],
        "iou": [float(iou(one, masks).nanmean()) for one in each],
    }
    for name, (mine, *random) in scores.items():
        row[name] = mine
        row[f"random_{name}"] = sum(random) / len(random) if random else float("nan")
    # A random pixel hits with the share of the image that the object, widened by the tolerance, covers.
    wide = nn.functional.max_pool2d(masks.float()[:, None], 2 * near + 1, stride=1, padding=near)
    row["chance_pointing"] = float(wide.mean())
    return row


def masks_like(masks: Tensor, preprocess: Preprocess) -> Tensor:
    """Resize and crop masks ``[n, H, W]`` as preprocessing does images: bool ``[n, size, size]``."""
    side = preprocess.size if preprocess.resize is None else preprocess.resize
    height, width = masks.shape[1:]
    shape = (side, side)
    if preprocess.resize is not None:  # the shorter side becomes `resize`
        shape = (max(side, round(side * height / width)), max(side, round(side * width / height)))
    near = transforms.InterpolationMode.NEAREST_EXACT
    enlarged = transforms.resize(masks.to(torch.uint8), list(shape), interpolation=near)
    return transforms.center_crop(enlarged, [preprocess.size, preprocess.size]).bool()


def _faithfulness(
    inputs: _Inputs, settings: ValidateSettings, latent: int, sign: int, own: list[int], generator: torch.Generator
) -> dict[str, object]:
    """Areas under the insertion and deletion curves, relative to the whole image's value; also for a random map."""
    indices = own[: settings.top_images]
    images = inputs.images(indices)
    maps = inputs.maps(indices, [latent], [sign])[:, 0].to(inputs.context.device)

    @torch.no_grad()
    def score(batch: Tensor) -> Tensor:
        return sign * inputs.sae.pre_activations(site_activations(inputs.model, inputs.site, batch))[:, latent]

    blank = torch.zeros((), device=inputs.context.device)
    # Noise as coarse as the map; pixel noise would be too easy to beat.
    coarse = torch.rand(len(indices), 1, 7, 7, generator=generator)
    noise = nn.functional.interpolate(coarse, size=tuple(maps.shape[1:]), mode="bilinear")[:, 0].to(maps.device)
    mine = insertion_deletion_auc(score, images, maps, blank, steps=settings.faithfulness_steps)
    random = insertion_deletion_auc(score, images, noise, blank, steps=settings.faithfulness_steps)
    whole = score(images)

    def relative(area: Tensor) -> float:
        return float((area.mean() / whole.mean()).cpu())

    return {
        "insertion": relative(mine.insertion),
        "deletion": relative(mine.deletion),
        "random_insertion": relative(random.insertion),
        "random_deletion": relative(random.deletion),
    }


def _preprocess(context: StageContext) -> Preprocess:
    assert context.data.preprocess is not None, "the data are bound to the backbone before any stage runs"
    return context.data.preprocess
