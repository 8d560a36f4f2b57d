# SPDX-License-Identifier: MIT
"""Pictures for the explorer: the test images that excite every latent most, small, with the latents' maps."""

import io
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from salve.activations import Captured
from salve.artifacts import Artifact, save_tensors, write_record, write_table
from salve.backbones.cut import Cut
from salve.features.shown import shown_latents
from salve.stages.context import StageContext, settings_of_key
from salve.stages.latents import latents_of
from salve.stages.localise import Seen
from salve.stages.measure import blocks

#: Images that are listed for each latent, and those of them that are shown under its map.
LISTED, MAPPED = 6, 3
#: Pixels of a picture's side, cells of a map's side, and pictures, at most.
SIDE, CELLS, MOST_PICTURES = 64, 12, 1200
#: Of WebP, at which a picture of this size takes about a kilobyte.
QUALITY = 55
#: Kinds of maps, the first that there is counts.
KINDS = ("own", "grad_fam")


def atlas(
    context: StageContext, pool: str, classifier: Artifact, activations: Artifact, sae: Artifact, features: Artifact
) -> Artifact:
    """Look for the test images that excite each latent most, with the sign of its largest class mean.

    Args:
        context: of the run. pool: at a map, how the latents at positions become the image's.
        classifier, activations, sae, features: what was made before.

    Returns:
        Artifact ``atlas``: ``top.csv``, the images of each latent; ``pictures.safetensors`` with the first of them in
        WebP, and their maps; ``atlas.json``, which kind of map it is.
    """
    used = {"pool": pool, "listed": LISTED, "mapped": MAPPED, "side": SIDE, "cells": CELLS, "most": MOST_PICTURES}
    key_settings = settings_of_key({**used, "quality": QUALITY}, classifier, activations, sae, features)

    def make(folder: Path, _: Path) -> None:
        cut, autoencoder = context.cut(classifier), context.sae(sae, activations)
        captured = context.activations(activations, "test")
        latents = latents_of(context, cut, autoencoder, captured, "test", pool)  # [N, d]
        table = features.table("latents.csv")
        chosen = features.table("selected.csv")["latent"].dropna().astype(int)
        shown = torch.from_numpy(shown_latents(table["mean"].to_numpy(), autoencoder.width, chosen))
        signs = torch.tensor(table["sign"].to_numpy())[shown]
        values, top = (
            one.T for one in (latents[:, shown] * signs).topk(min(LISTED, len(latents)), dim=0)
        )  # [L, LISTED]
        classes = [context.classes[label] for label in captured.labels.tolist()]
        write_table(folder / "top.csv", _listed(shown, top, values * signs[:, None], values > 0, classes))
        given = (context.data, context.device, context.seed, cut.model, cut.site)
        empty = torch.empty(0)
        seen = Seen(*given, deepcopy(autoencoder).to(context.device), pool, empty, empty, 0)
        why = seen.why_none()
        kind = next((kind for kind in KINDS if not why[kind]), "")
        # First the strongest image of every latent, then the second, and so on; then those that edits turn first.
        wanted = [*top.T.flatten().tolist(), *_nearly_turned(cut, captured)]
        numbers = list(dict.fromkeys(wanted))[:MOST_PICTURES]
        tensors = _pictures(seen, numbers) | _maps(context, seen, kind, shown, signs, top[:, :MAPPED])
        save_tensors(folder / "pictures.safetensors", tensors)
        write_record(folder / "atlas.json", {"kind": kind, "why_none": "" if kind else why[KINDS[-1]]})

    return context.store.get_or_make("atlas", key_settings, make)


def _nearly_turned(cut: Cut, captured: Captured) -> list[int]:
    """The images by the lead of their prediction, the narrowest first; behind other tails, by number."""
    if cut.linear is None:
        return list(range(len(captured)))
    two = torch.cat([cut.linear(rows).topk(min(2, len(cut.linear)), dim=1).values for rows, _ in blocks(captured, 1)])
    return (two[:, 0] - two[:, -1]).argsort(stable=True).tolist()


def _listed(shown: Tensor, top: Tensor, values: Tensor, excited: Tensor, classes: Sequence[str]) -> pd.DataFrame:
    """A row for each latent and image that excites it; all but ``shown`` are ``[L, LISTED]``, or of each image."""
    rows = [
        (int(shown[i]), rank + 1, int(top[i, rank]), classes[int(top[i, rank])], float(values[i, rank]))
        for i, rank in excited.nonzero().tolist()
    ]
    return pd.DataFrame(rows, columns=["latent", "rank", "image", "class", "value"])


def _pictures(seen: Seen, numbers: Sequence[int]) -> dict[str, Tensor]:
    """The images ``[P]`` as WebP: their ``bytes`` one after the other, and ``ends`` ``[P]``, where each ends."""
    written = []
    for number in numbers:
        pixels = (seen.preprocess.denormalise(seen.images([number]).cpu())[0] * 255).round().to(torch.uint8)
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        file = io.BytesIO()
        picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(file, "WEBP", quality=QUALITY, method=4)
        written.append(file.getvalue())
    joined = np.frombuffer(b"".join(written), np.uint8).copy()
    ends = torch.tensor([len(one) for one in written]).cumsum(0)
    return {"images": torch.tensor(numbers), "bytes": torch.from_numpy(joined), "ends": ends}


def _maps(context: StageContext, seen: Seen, kind: str, shown: Tensor, signs: Tensor, top: Tensor) -> dict[str, Tensor]:
    """The maps ``[L, MAPPED, CELLS, CELLS]`` of the latents over their strongest images, each as large as 255."""
    if not kind:
        return {}
    maps = torch.zeros(*top.shape, CELLS, CELLS, dtype=torch.uint8)
    by_image: dict[int, list[tuple[int, int]]] = {}
    for row, images in enumerate(top.tolist()):
        for rank, image in enumerate(images):
            by_image.setdefault(image, []).append((row, rank))
    with context.progress("mapping latents", len(by_image)) as advance:
        for image, places in by_image.items():
            rows = [row for row, _ in places]
            found = seen.maps(kind, [image], shown[rows].tolist(), signs[rows].tolist())  # [1, L', H, W]
            small = nn.functional.adaptive_avg_pool2d(found, CELLS)[0]
            large = small.flatten(1).max(dim=1).values.clamp_min(torch.finfo(small.dtype).tiny)
            for (row, rank), one in zip(places, small / large[:, None, None], strict=True):
                maps[row, rank] = (one * 255).round().to(torch.uint8)
            advance(1)
    return {"latents": shown, "maps": maps}
