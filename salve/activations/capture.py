# SPDX-License-Identifier: MIT
"""Capture the activations at a site to disk, in bounded memory, on one rank or several."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, distributed, nn

from salve.activations.shards import Shards
from salve.artifacts import Artifact, Store, digest_of_tensors, is_kept, keep, load_tensors, save_tensors, write_record
from salve.backbones.cut import Cut
from salve.data.base import ImageData
from salve.distributed import OnLeader, Ranks, alone, rank_and_world_size
from salve.types import Images, Split, UserError

log = logging.getLogger(__name__)

#: Images per file, at most: so many are lost when a capture is killed.
SHARD_ROWS = 2048
#: Bytes of rows per file at a map, about: so many are in memory, twice while they are written.
SHARD_BYTES = 32 * 2**20

#: How long ranks wait for each other: one may find its shard there while another captures it. A dead one ends the wait.
_WAIT = timedelta(hours=6)

SPLITS: tuple[Split, ...] = get_args(Split)

#: ``read(images)`` gives the activations ``[n, P, M]`` of images ``[n, 3, H, W]``, on their device.
Read = Callable[[Images], Tensor]


def sampled_positions(seed: int, split: str, positions: int, sampled: int, images: Iterable[int]) -> Tensor:
    """Positions ``[n, p]`` of images, drawn without replacement and in increasing order.

    Those of an image depend on nothing but the seed, the split and the image's index in it.

    Args:
        seed: of the draws. split: its name.
        positions: ``P``, of which there are ``sampled``, ``p``, to draw.
        images: ``n`` indices.
    """

    def drawn(image: int) -> Tensor:
        digest = hashlib.sha256(f"{seed} {split} {image}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.randperm(positions, generator=generator)[:sampled].sort().values

    return torch.stack([drawn(image) for image in images])


def shard_images(positions: int, sampled: int, width: int) -> int:
    """Images per file of a site with ``P`` positions, of which ``p`` are kept, and ``M`` channels."""
    return SHARD_ROWS if positions == 1 else min(SHARD_ROWS, max(1, SHARD_BYTES // (4 * sampled * width)))


@torch.inference_mode()
def capture(
    read: Read,
    name: str,
    count: int,
    batches: Callable[[Sequence[int]], Iterable[tuple[Tensor, Tensor]]],
    folder: Path,
    split: str,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
    sample: Callable[[Iterable[int]], Tensor] | None = None,
    images_per_shard: int | None = None,
) -> None:
    """Write the activations of a split as ``<split>-00000.safetensors``, … into ``folder``.

    Shards of an earlier call are kept if they are intact by the digest beside them, and captured again if not. With W
    ranks, rank r makes the shards ``r::W``, and all meet after each round of W.

    Args:
        read: gives activations ``[n, P, M]`` of images on ``device``. name: of the site, for errors.
        count: ``N``, images of the split.
        batches: yields ``(images, labels)`` batches of the given image indices, in their order.
        folder: of the shards. split: its name. device: where images go.
        advance: called with the number of images done, on all ranks together, for a progress bar.
        sample: the positions ``[n, p]`` to keep of images with the given indices; None keeps all.
        images_per_shard: of each file; None for :data:`SHARD_ROWS`.

    Raises:
        UserError: an activation is NaN or infinite; the message names the image. Or there is no such folder.
    """
    rank, ranks = rank_and_world_size()
    if not folder.is_dir():
        raise UserError(f"Rank {rank} does not see {folder}: all nodes need a disk that they share (output_dir).")
    size = images_per_shard or SHARD_ROWS
    # NCCL would need a GPU to meet.
    group: Any = distributed.new_group(backend="gloo", timeout=_WAIT) if ranks > 1 else None
    for start in range(0, count, ranks * size):
        of_round, own = (
            range(at, min(at + n, count)) for at, n in ((start, ranks * size), (start + rank * size, size))
        )
        if len(own):
            path = folder / f"{split}-{own.start // size:05d}.safetensors"
            if is_kept(path):
                advance(len(own))
            else:
                if os.path.lexists(path):
                    log.warning("%s is damaged and is captured again.", path)
                with alone():
                    tensors = _of_shard(read, name, own, batches(own), split, device, advance, sample)
                    unfinished = path.with_suffix(".unfinished")
                    save_tensors(unfinished, tensors)
                    del tensors
                    keep(unfinished, path)
        if group is not None:
            distributed.barrier(group)
            advance(len(of_round) - len(own))


def _of_shard(
    read: Read,
    name: str,
    indices: range,
    batches: Iterable[tuple[Tensor, Tensor]],
    split: str,
    device: torch.device,
    advance: Callable[[int], None],
    sample: Callable[[Iterable[int]], Tensor] | None,
) -> dict[str, Tensor]:
    """Rows ``[n p, M]`` and labels ``[n]`` of the images with these indices."""
    rows, of_images, done = torch.empty(0), list[Tensor](), 0
    for images, labels in batches:
        activations = read(images.to(device, memory_format=torch.channels_last))
        bad = (~activations.isfinite()).flatten(1).any(dim=1).nonzero()
        if len(bad):
            raise UserError(
                f"The activations at {name} are NaN or infinite for image {indices[done + int(bad[0])]} of the {split} "
                "split; check the weights and the image."
            )
        if sample is not None:
            chosen = sample(indices[done : done + len(labels)])
            activations = activations.take_along_dim(chosen.to(device)[:, :, None], dim=1)
        if not done:
            # All at once: joining batches would take the memory of a shard a second time.
            rows = torch.empty(len(indices), *activations.shape[1:])
        rows[done : done + len(labels)] = activations
        of_images.append(labels)
        done += len(labels)
        advance(len(labels))
    assert done == len(indices), "the batches hold other images"
    return {Shards.NAME: rows.flatten(0, 1), "labels": torch.cat(of_images)}


def captured(
    store: Store,
    cut: Cut,
    data: ImageData,
    ranks: Ranks,
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]],
    sampled: int = 1,
    seed: int = 0,
) -> Artifact:
    """Capture the activations of all splits as an artifact, once per (weights, site, data, preprocessing).

    Weights that the activations do not depend on are not part of the key: after the head is trained or edited, the same
    activations are found.

    Args:
        store: of the artifacts.
        cut: the network and the site that is read; it can be pickled.
        data: bound to the backbone's preprocessing.
        ranks: what captures; each has a part of the shards.
        progress: ``progress(what, total)`` opens a progress bar and returns the function that advances it.
        sampled: positions to keep of each image at most. seed: of their choice. Both are idle at a vector site, and the
            seed where all positions are kept.

    Returns:
        An artifact of kind ``activations``: shards of each split, and ``activations.json``.
    """
    model, site, total = cut.model, cut.site, cut.site.count
    sampled, before = min(sampled, total), cut.weights_before()
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in before}
    key_settings = {
        "weights": digest_of_tensors(weights),
        "site": site.name,
        "data": data.fingerprint(),
        "preprocess": asdict(data.preprocess) if data.preprocess else None,
    }
    if total > 1:
        key_settings["positions"] = {"sampled": sampled, "seed": seed if sampled < total else None}

    def make(folder: Path, scratch: Path) -> None:
        # The files of a vector site are as they were before there were maps.
        of_map = {"positions": list(site.positions), "sampled": sampled} if total > 1 else {}
        record: dict[str, object] = {"site": site.name, "width": site.width, **of_map}
        shards = scratch / "shards"
        if not shards.is_dir():
            shards.unlink(missing_ok=True)  # a link to nowhere
            shards.mkdir()
        if ranks.several:
            model.cpu()  # a rank would take the weights for those on its own GPU
        size = shard_images(total, sampled, site.width)
        names: list[str] = []
        for split in SPLITS:
            count = len(data.labels(split))
            sample = partial(sampled_positions, seed, split, total, sampled) if sampled < total else None
            with progress(f"capturing {site.name} ({split})", count) as advance:
                work = partial(
                    capture,
                    *(cut.read, site.name, count, partial(_in_order, data, split), shards, split),
                    advance=OnLeader(advance),
                    sample=sample,
                    images_per_shard=size,
                )
                ranks(_on_rank, model, ranks.devices, work)
            record[split] = count
            names += [f"{split}-{number:05d}.safetensors" for number in range(-(-count // size))]
        lowest = 0.0
        for name in names:
            lowest = min(lowest, float(load_tensors(shards / name)["activations"].min()))
            os.replace(shards / name, folder / name)
        write_record(folder / "activations.json", {**record, "nonnegative": lowest >= 0})

    return store.get_or_make("activations", key_settings, make)


def _on_rank(model: nn.Module, devices: Sequence[torch.device], work: Callable[..., None]) -> None:
    """Do this rank's part of a capture on its device; the devices are those of a node."""
    rank, _ = rank_and_world_size()
    device = devices[rank % len(devices)]
    # Channels last makes convolutions 1.2 to 1.4 times as fast on the CPU, and is no slower elsewhere.
    model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    work(device=device)


def _in_order(data: ImageData, split: Split, rows: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
    return data.loader(split, indices=rows)
