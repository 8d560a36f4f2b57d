# SPDX-License-Identifier: MIT
"""TCAV of a user's concepts: folders of images, against images drawn from the data."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from salve.backbones.cut import Cut
from salve.data.base import RawImages, TransformedImages
from salve.data.digests import file_digests
from salve.data.files import FileData, FileImages, ImageFile
from salve.data.walk import find_images
from salve.features.tcav import concept_test, concept_vector, tcav_scores
from salve.settings import ValidateSettings
from salve.stages.context import StageContext
from salve.stages.targets import balanced
from salve.types import UserError

#: Draws of counter-images for each concept, and of pairs of random sets; the train images that they are drawn from.
DRAWS, POOL = 20, 400
#: The fewest images of a concept.
LEAST = 10


def concept_files(concepts: Mapping[str, str]) -> dict[str, list[str]]:
    """By concept, the paths of its images, from its folder.

    Raises:
        UserError: a folder is not there, cannot be read, or has fewer than :data:`LEAST` images.
    """
    found = {}
    for name, folder in concepts.items():
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UserError(f"validate.concepts names the folder {folder} for {name!r}, which is not there.")
        found[name] = find_images(path.absolute().parent, [path.absolute().name]).images[0]
        if len(found[name]) < LEAST:
            raise UserError(
                f"validate.concepts names the folder {folder} for {name!r}, which has {len(found[name])} images; "
                f"a concept needs at least {LEAST}."
            )
    return found


def concept_digests(concepts: Mapping[str, str]) -> dict[str, str]:
    """By concept, the hex SHA-256 of its images' bytes, independent of where they lie."""
    digests = {}
    for name, files in concept_files(concepts).items():
        parent = Path(concepts[name]).expanduser().absolute().parent
        digests[name] = hashlib.sha256(json.dumps(sorted(file_digests(parent, files))).encode()).hexdigest()
    return digests


def concept_table(context: StageContext, settings: ValidateSettings, cut: Cut) -> pd.DataFrame:
    """Whether each class's logit depends on each concept; on test images of the class.

    Returns:
        One row per ``concept`` and ``class``: ``tcav``, the share of the class's ``images`` whose logit grows towards
        the concept's ``examples``, mean over draws, and ``tcav_random`` along random vectors; ``sensitivity``, the mean
        derivative along the concept's unit vectors; ``t`` and ``p`` of a two-sided test over draws, and ``p_all``, the
        same for all tests of the table together (Bonferroni).
    """
    files, classes = concept_files(settings.concepts), context.classes
    gradients, labels = _gradients(context, settings, cut)
    pool = _pool(context, cut)
    generator = torch.Generator().manual_seed(context.seed)
    rows: list[dict[str, object]] = []
    for name, paths in files.items():
        examples = _examples(context, cut, settings.concepts[name], paths)
        count = min(len(examples), len(pool) // 2)
        vectors, random = [], []
        for _ in range(DRAWS):
            order = torch.randperm(len(pool), generator=generator)
            vectors.append(concept_vector(examples, pool[order[:count]]))
            random.append(concept_vector(pool[order[:count]], pool[order[count : 2 * count]]))
        along, by_chance = torch.stack(vectors), torch.stack(random)
        scores, controls = (tcav_scores(gradients, labels, one, len(classes)) for one in (along, by_chance))
        slopes = (gradients.double() @ along.T).mean(dim=1)
        for k, of_class in enumerate(classes):
            test = concept_test(scores[k], controls[k])
            row = {"concept": name, "class": of_class, "examples": len(examples), "images": int((labels == k).sum())}
            row |= {"tcav": float(scores[k].mean()), "tcav_random": float(controls[k].mean())}
            row |= {"sensitivity": float(slopes[labels == k].mean()), "t": test.t, "p": test.p}
            rows.append(row | {"p_all": min(1.0, test.p * len(files) * len(classes))})
    return pd.DataFrame(rows)


def _gradients(context: StageContext, settings: ValidateSettings, cut: Cut) -> tuple[Tensor, Tensor]:
    """Of test images' class logits by their activations ``[n, M]``, summed over positions, and their labels ``[n]``."""
    every = torch.as_tensor(context.data.labels("test"))
    numbers = balanced(every, settings.localise_images)
    labels = every[numbers]
    if cut.linear is not None:
        return cut.linear.weight[labels], labels
    found = []
    for images, own in context.data.loader("test", indices=numbers):
        tail = cut.tail(context.on_device(images))
        with torch.enable_grad():
            activations = tail.activations.detach().requires_grad_()
            logits = tail(activations).gather(1, own[:, None].to(context.device))
            (gradient,) = torch.autograd.grad(logits.sum(), activations)
        found.append(gradient.sum(dim=1).cpu())
    return torch.cat(found), labels


def _pool(context: StageContext, cut: Cut) -> Tensor:
    """Mean activations ``[n, M]`` of train images drawn at random."""
    count = len(context.data.labels("train"))
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(context.seed))[:POOL].tolist()
    return _means(context, cut, context.data.loader("train", indices=drawn))


def _examples(context: StageContext, cut: Cut, folder: str, paths: list[str]) -> Tensor:
    """Mean activations ``[n, M]`` of a concept's images."""
    home, data, preprocess = Path(folder).expanduser().absolute().parent, context.data, context.data.preprocess
    assert preprocess is not None, "the data are bound to the backbone before any stage runs"
    white = data.white if isinstance(data, FileData) else None
    raw: RawImages = FileImages(home, ".", tuple(ImageFile(path, 0) for path in paths), white)
    images = TransformedImages(raw, preprocess.eval_transform())
    return _means(context, cut, DataLoader(images, batch_size=data.batch_size))


@torch.no_grad()
def _means(context: StageContext, cut: Cut, loader: DataLoader) -> Tensor:
    return torch.cat([cut.read(context.on_device(images)).float().mean(dim=1).cpu() for images, _ in loader])
