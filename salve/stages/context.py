# SPDX-License-Identifier: MIT
"""What every stage works with: store, data, backbone, devices and the Trainer's factory."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from salve.activations import Captured, load_captured
from salve.artifacts import Artifact, Store
from salve.backbones import LinearTail, find_site, graph_of, head_site, load_backbone
from salve.backbones.cut import Cut
from salve.backbones.graph import NetworkGraph
from salve.backbones.sites import adopt_graph
from salve.data.base import ImageData
from salve.data.evaluation import EvaluationSet
from salve.distributed import Ranks
from salve.sae import SAE, load_sae
from salve.settings import BackboneSettings

MakeTrainer = Callable[[str, int, list[Callback]], pl.Trainer]


@dataclass(frozen=True)
class StageContext:
    """What a stage works with.

    Attributes:
        store: of the artifacts.
        data: bound to the backbone's preprocessing.
        backbone, layer, seed: what is studied.
        trainer: ``trainer(stage, max_epochs, callbacks)`` makes a Trainer with the run's devices and logger.
        device: of forward passes outside a Trainer.
        progress: see :func:`salve.activations.captured`.
        ranks: the processes that capture, train, test and validate. Everything else runs on the first one only.
        memory: GiB of activations that a process may hold while it trains on them.
        precision: of fine-tuning, as Lightning names it; part of a classifier's key.
        preprocessing: of the images, in words.
        remarks: sentences that a reader must know about data and weights.
        trained_with: by stage, what the user adds to its training: arguments of the Trainer, and callbacks. Part of the
            key of what the stage trains.
        evaluation: the sets that networks are measured on besides the data's own splits.
        graphs: of the backbone, at most one: an export takes seconds, and stages build the network anew.
    """

    store: Store
    data: ImageData
    backbone: BackboneSettings
    layer: str
    seed: int
    trainer: MakeTrainer
    device: torch.device
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
    ranks: Ranks
    memory: float = math.inf
    precision: str = "32-true"
    preprocessing: str = ""
    remarks: tuple[str, ...] = ()
    trained_with: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluation: tuple[EvaluationSet, ...] = ()
    graphs: list[NetworkGraph] = field(default_factory=list, compare=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.data.classes

    def output_order(self, model: nn.Module) -> Tensor:
        """The network's output units ``[outputs]``: first those of the data's classes, then all others."""
        return output_order(self.data.outputs, len(model.get_parameter(head_site(model).readers[0].weight)))

    @property
    def size(self) -> int:
        """Side in pixels of the images that the backbone reads."""
        assert self.data.preprocess is not None, "the data are bound to the backbone before any stage runs"
        return self.data.preprocess.size

    def on_device(self, images: Tensor) -> Tensor:
        """Images on :attr:`device`, with channels last, in which convolutions are faster."""
        return images.to(self.device, memory_format=torch.channels_last)

    def build(self) -> tuple[nn.Module, bool]:
        """The backbone with the chosen weights, and whether its head fits the data."""
        backbone = self.backbone
        loaded = load_backbone(
            backbone.library,
            backbone.name,
            backbone.weights,
            len(self.classes),
            backbone.args,
            self.data.outputs,
        )
        return loaded.model, loaded.fits

    def cut(self, classifier: Artifact) -> Cut:
        """The classifier of an artifact, frozen and in eval mode on :attr:`device`, cut at the site."""
        backbone, path = self.backbone, str(classifier.file("model.safetensors"))
        outputs = self.data.outputs
        model = load_backbone(backbone.library, backbone.name, path, len(self.classes), backbone.args, outputs).model
        return self.cut_of(model.eval().requires_grad_(False).to(self.device))

    def cut_of(self, model: nn.Module) -> Cut:
        """The backbone in eval mode, with any weights, cut at the site."""
        for graph in self.graphs:
            adopt_graph(model, graph)
        site = find_site(model, self.layer, self.size)
        if site.in_graph is None:
            return Cut(model, site, self.output_order(model))
        graph = graph_of(model, self.size)
        if not self.graphs:
            self.graphs.append(graph)
        return Cut(model, site, self.output_order(model), graph)

    def tail(self, classifier: Artifact) -> LinearTail:
        """The tail of the last site on the CPU; its first outputs are those of the data's classes, by label.

        Raises:
            UserError: some of its weights are NaN or infinite.
        """
        linear = self.cut(classifier).linear
        assert linear is not None, "only the tail of the last site is one linear layer"
        return linear

    def activations(self, activations: Artifact, split: str) -> Captured:
        """Captured activations of a split."""
        return load_captured(activations.path, split)

    def sae(self, sae: Artifact, activations: Artifact) -> SAE:
        """The SAE of an artifact. Raises UserError unless it was trained for this backbone, site and width."""
        width = activations.record("activations.json")["width"]
        return load_sae(sae.file("sae.safetensors"), width=width, backbone=self.backbone.name, site=self.layer)

    def shuffled_within(self, count: int, width: int, batch_size: int) -> int | None:
        """Choose between training from memory and from disk.

        Args:
            count: rows of all splits together. width: ``M``. batch_size: rows of a batch.

        Returns:
            None if the activations fit into :attr:`memory` twice, since scaling them makes a copy. Otherwise the number
            of rows to read from disk and shuffle at a time, a multiple of ``batch_size``: a third of the memory, since
            two such blocks may be held at once.
        """
        memory, row = self.memory * 2**30, 4 * width
        if 2 * count * row <= memory:
            return None
        return batch_size * max(1, int(memory // (3 * row * batch_size)))


def output_order(outputs: Sequence[int] | None, total: int) -> Tensor:
    """Order a network's output units ``[total]``: first the given ones, then the others; None keeps their own order."""
    first = list(outputs or ())
    seen = set(first)
    return torch.tensor(first + [unit for unit in range(total) if unit not in seen])


def settings_of_key(settings: Mapping[str, Any], *inputs: Artifact) -> dict[str, Any]:
    """The settings of an artifact's key: the stage's settings and the digests of the artifacts it is made from."""
    return {"settings": dict(settings), **{artifact.kind: artifact.digest for artifact in inputs}}
