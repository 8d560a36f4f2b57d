# SPDX-License-Identifier: MIT
"""What networks that differ in some weights say of an evaluation set, and how good it is."""

from collections.abc import Iterator, Mapping

import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader

from salve.backbones.cut import Cut
from salve.data.base import TransformedImages
from salve.data.evaluation import EvaluationSet
from salve.editing.methods.base import changed_head, head_weights
from salve.metrics.grouped import flip_rate, group_accuracy
from salve.stages.context import StageContext
from salve.types import Labels

#: Only the tensors of a ``state_dict`` that an edit changes.
Weights = Mapping[str, Tensor]


@torch.no_grad()
def predictions(
    context: StageContext, cut: Cut, networks: Mapping[str, Weights], images: EvaluationSet
) -> dict[str, Labels]:
    """What networks say of the images of a set: each image is loaded once.

    Args:
        context: of the run. cut: the original network. images: the set.
        networks: by name, the weights that differ from the original's; all others are its own.

    Returns:
        By name, predictions ``[N]`` on the CPU: an output of the network, those of the data's classes first.
    """
    said: dict[str, list[Tensor]] = {name: [] for name in networks}
    changed = {name: {key: one.to(context.device) for key, one in own.items()} for name, own in networks.items()}
    # Networks that differ in their heads alone read the same activations, which are made once.
    alike = [name for name, own in networks.items() if cut.linear is not None and own.keys() <= head_weights(cut)]
    heads = {name: changed_head(cut, dict(networks[name])) for name in alike}
    for batch in _batches(context, images):
        rows = cut.read(batch).float().cpu() if heads else None
        for name in networks:
            if rows is not None and name in heads:
                logits = heads[name](rows)
            else:
                logits = functional_call(cut.model, changed[name], (batch,))
                logits = logits[:, cut.order.to(logits.device)]
            said[name].append(logits.argmax(dim=1).cpu())
    return {name: torch.cat(parts) for name, parts in said.items()}


def measured_on(images: EvaluationSet, said: Mapping[str, Labels], classes: tuple[str, ...]) -> pd.DataFrame:
    """Measures of networks on a set.

    Args:
        images: the set. said: by the name of a network, its predictions ``[N]``. classes: names of the C classes.

    Returns:
        Columns ``set``; ``target``, the name of the network, "" for the original; ``class``, "" for all; ``attribute``
        and ``attribute_value``, "" for all; ``images``; ``accuracy``, missing where there are none; and ``flips``, the
        share of pairs whose prediction changes, in the rows of all images and of a class. Groups without an image have
        a row.
    """
    labels, groups, half = images.labels, images.groups, len(images.labels) // 2
    rows: list[tuple[str, str, str, str, str, int, float | None, float | None]] = []
    for target, predicted in said.items():

        def flips(own: Tensor, predicted: Labels = predicted) -> float | None:
            """Of the pairs ``own [N/2]``."""
            return float(flip_rate(predicted[:half][own], predicted[half:][own])) if images.paired else None

        head = (images.name, target)
        everything, counts = group_accuracy(predicted, labels, torch.zeros_like(labels), 1)
        all_of_them = torch.ones(half, dtype=torch.bool)
        rows.append((*head, "", "", "", *_known(everything, counts, 0), flips(all_of_them)))
        by_class, counts = group_accuracy(predicted, labels, labels, len(classes))
        for k, name in enumerate(classes):
            rows.append((*head, name, "", "", *_known(by_class, counts, k), flips(labels[:half] == k)))
        if groups is not None:
            named = groups.named(classes)
            by_group, counts = group_accuracy(predicted, labels, groups.numbered(labels), len(named))
            for g, (name, value) in enumerate(named):
                rows.append((*head, name, groups.name, value, *_known(by_group, counts, g), None))
    columns = ["set", "target", "class", "attribute", "attribute_value", "images", "accuracy", "flips"]
    return pd.DataFrame(rows, columns=columns).astype({"accuracy": float, "flips": float})  # also where all are missing


def _known(accuracy: Tensor, counts: Tensor, at: int) -> tuple[int, float | None]:
    """How many images there are, and their accuracy, which is missing where there are none."""
    return int(counts[at]), float(accuracy[at]) if counts[at] else None


def _batches(context: StageContext, images: EvaluationSet) -> Iterator[Tensor]:
    assert context.data.preprocess is not None, "the data are bound to the backbone before any stage runs"
    dataset = TransformedImages(images.raw, context.data.preprocess.eval_transform())
    for batch, _ in DataLoader(dataset, context.data.batch_size, num_workers=context.data.num_workers):
        yield context.on_device(batch)
