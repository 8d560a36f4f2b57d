# SPDX-License-Identifier: MIT
"""Stage ``validate``: saliency maps of the classes' latents, scores of the maps, and maximised images."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch
from torch import Tensor

from salve.artifacts import Artifact, digest_of_tensors, save_tensors, write_record, write_table
from salve.distributed import OnLeader, divided, rank_and_world_size
from salve.saliency import maximise
from salve.settings import ValidateSettings
from salve.stages.context import StageContext, settings_of_key
from salve.stages.latents import latents_of
from salve.stages.localise import PREFIX, Seen, localise
from salve.stages.targets import Target, targets_of
from salve.stages.tcav import concept_digests, concept_table

T = TypeVar("T")
R = TypeVar("R")

#: Images optimised in one batch: bounds memory however many classes there are.
MAXIMISED_TOGETHER = 5


def validate(
    context: StageContext,
    settings: ValidateSettings,
    pool: str,
    classifier: Artifact,
    activations: Artifact,
    sae: Artifact,
    features: Artifact,
) -> Artifact:
    """Validate each class's latent on the test split.

    Where the site is a map, a latent has a map of its own beside that of Grad-FAM; the names of its scores begin with
    ``own_``. Without any map of the image, all is done that needs none.

    Args:
        context, settings: of the run.
        pool: at a map, how the latents at an image's positions become the image's; see :class:`SAESettings`.
        classifier, activations, sae, features: what was made before.

    Returns:
        Artifact ``validate``: ``top.csv``; ``localisation.csv``, with scores against masks or else boxes where the data
        have them; ``maps.json``, which kinds of maps there are, and why not the others; of the first
        ``validate.pictures`` classes ``saliency.safetensors``, ``maximisation.csv`` and ``.safetensors``; with
        concepts, ``tcav.csv`` (:func:`salve.stages.tcav.concept_table`).
    """
    used = asdict(settings)
    if folders := used.pop("concepts"):  # left out where there are none, so that old artifacts stay valid
        used["concepts"] = concept_digests(folders)
    key_settings = settings_of_key(used, classifier, activations, sae, features) | {"seed": context.seed}
    if (boxes := context.data.boxes("test")) is not None:
        key_settings["boxes"] = digest_of_tensors({str(image): box for image, box in boxes.of_image.items()})

    def make(folder: Path, _: Path) -> None:
        cut = context.cut(classifier)
        test = context.activations(activations, "test")
        autoencoder = context.sae(sae, activations)
        targets = targets_of(context.classes, features, [])
        latents = latents_of(context, cut, autoencoder, test, "test", pool)
        values = torch.stack([target.signs[0] * latents[:, target.latents[0]] for target in targets])
        pictured = min(settings.pictures, len(context.classes))
        inputs = Seen(
            *(context.data, context.device, context.seed, cut.model, cut.site),
            *(autoencoder.to(context.device), pool, values, test.labels, pictured),
        )
        why = inputs.why_none()
        kinds = [kind for kind in why if not why[kind]]
        write_record(folder / "maps.json", {"site": cut.site.name, "kinds": kinds, "why_none": why})
        _top_images(inputs, settings, targets, kinds, folder)
        shown = [target for target in targets if target.classes[0] < pictured]
        if settings.maximisation_steps and shown:
            batches = [shown[i : i + MAXIMISED_TOGETHER] for i in range(0, len(shown), MAXIMISED_TOGETHER)]
            maximised = _on_ranks(context, "maximising activations", inputs, partial(_maximise, settings), batches)
            _write_maximised(inputs, maximised, folder)
        work = partial(localise, settings, features.table("latents.csv"), kinds)
        rows = _on_ranks(context, "scoring saliency maps", inputs, work, list(enumerate(targets)))
        write_table(folder / "localisation.csv", pd.DataFrame(rows))
        if settings.concepts:
            write_table(folder / "tcav.csv", concept_table(context, settings, cut))

    return context.store.get_or_make("validate", key_settings, make)


def _top_images(
    inputs: Seen, settings: ValidateSettings, targets: Sequence[Target], kinds: Sequence[str], folder: Path
) -> None:
    """Write ``top.csv``, the images that excite each class's latent most, and pictures of them with their maps."""
    rows: list[dict[str, object]] = []
    preprocess, count = inputs.preprocess, min(settings.top_images, len(inputs.labels))
    # One row per pictured class; that of a class without a latent stays blank.
    images = torch.zeros(inputs.pictured, count, 3, preprocess.size, preprocess.size, dtype=torch.uint8)
    maps = {f"{PREFIX[kind]}maps": torch.zeros(inputs.pictured, count, *images.shape[3:]) for kind in kinds}
    for target, values in zip(targets, inputs.values, strict=True):
        latent, sign = target.latents[0], target.signs[0]
        top = values.topk(count)
        indices = top.indices.tolist()
        if target.classes[0] < inputs.pictured:
            shown = preprocess.denormalise(inputs.images(indices).cpu())
            images[target.classes[0]] = (shown * 255).round().to(torch.uint8)
            for kind in kinds:
                maps[f"{PREFIX[kind]}maps"][target.classes[0]] = inputs.maps(kind, indices, [latent], [sign])[:, 0]
        rows += [
            {
                "class": target.name,
                "rank": rank + 1,
                "latent": latent,
                "image": index,
                "label": inputs.data.classes[int(inputs.labels[index])],
                "value": value * sign,
            }
            for rank, (index, value) in enumerate(zip(indices, top.values.tolist(), strict=True))
        ]
    write_table(folder / "top.csv", pd.DataFrame(rows))
    save_tensors(folder / "saliency.safetensors", {"images": images, **maps})


def _on_ranks(
    context: StageContext, what: str, inputs: Seen, work: Callable[[Seen, T], R], parts: Sequence[T]
) -> list[R]:
    """Do some work for each part, the parts divided among the ranks; no result depends on how many there are."""
    with context.progress(what, len(parts)) as advance:
        if context.ranks.several:
            inputs = inputs.on(torch.device("cpu"))  # a rank would take the weights for those on its own GPU
        found: list[R] = context.ranks(_on_rank, context.ranks.devices, inputs, work, parts, OnLeader(advance))
    return found


def _on_rank(
    devices: Sequence[torch.device],
    inputs: Seen,
    work: Callable[[Seen, T], R],
    parts: Sequence[T],
    advance: Callable[[int], None],
) -> list[R]:
    """Do this rank's parts on its device; the devices are those of a node."""
    rank, _ = rank_and_world_size()
    return divided(partial(work, inputs.on(devices[rank % len(devices)])), parts, advance)


def _maximise(
    settings: ValidateSettings, inputs: Seen, targets: Sequence[Target]
) -> list[tuple[Target, Tensor, float, float]]:
    """For each target, an image optimised to excite its latent, and the values before and after."""
    found = maximise(
        inputs.model,
        inputs.site.name,
        inputs.sae,
        torch.tensor([target.latents[0] for target in targets], device=inputs.device),
        inputs.preprocess,
        size=inputs.preprocess.size,
        steps=settings.maximisation_steps,
        signs=torch.tensor([target.signs[0] for target in targets], device=inputs.device),
        pool=inputs.pool,
        seed=inputs.seed,
    )
    images = (found.images.cpu() * 255).round().to(torch.uint8)
    return list(zip(targets, images, found.start_values.tolist(), found.final_values.tolist(), strict=True))


def _write_maximised(
    inputs: Seen, batches: Sequence[Sequence[tuple[Target, Tensor, float, float]]], folder: Path
) -> None:
    """Write ``maximisation.csv`` and ``maximisation.safetensors``."""
    size, rows = inputs.preprocess.size, []
    images = torch.zeros(inputs.pictured, 3, size, size, dtype=torch.uint8)
    for target, image, before, after in (found for batch in batches for found in batch):
        images[target.classes[0]] = image
        row = {"class": target.name, "latent": target.latents[0], "start_value": before, "final_value": after}
        rows.append(row)
    save_tensors(folder / "maximisation.safetensors", {"images": images})
    write_table(folder / "maximisation.csv", pd.DataFrame(rows))
