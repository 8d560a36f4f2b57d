"""What every stage works with: the store, the data, the backbone, and how to train."""

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from salve.activations import Captured, load_captured
from salve.artifacts import Artifact, Store
from salve.backbones import Site, find_site, load_backbone
from salve.data.base import ImageData
from salve.sae import SAE, load_sae
from salve.settings import BackboneSettings
from salve.stages.training import MakeTrainer, Training, alone, fit_here, not_finite, resumable, test_here
from salve.types import Diverged, UserError

log = logging.getLogger(__name__)


class Ranks(Protocol):
    """Calls a function on every rank at once; see :class:`salve.processes.ranks.Ranks`."""

    @property
    def several(self) -> bool: ...

    def __call__(self, work: Callable[..., Any], /, *args: Any) -> Any: ...


@dataclass(frozen=True)
class StageContext:
    """The surroundings of a stage.

    Attributes:
        store: where artifacts live. data: bound to the backbone's preprocessing.
        backbone, layer, seed: what is studied.
        trainer: ``trainer(stage, max_epochs, callbacks)`` makes a Trainer with the context's devices and logger.
        device: where forward passes outside a Trainer run. progress: see :func:`salve.activations.captured`.
        ranks: the processes that train and test; only this one does anything else.
        memory: GiB that a process may hold of activations while it trains on them.
        precision: that fine-tuning computes in, as Lightning names it; part of what a classifier depends on.
        preprocessing: of the images, in words. remarks: what a reader must know of data and weights, in sentences.
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

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.data.classes

    def output_order(self, model: nn.Module) -> Tensor:
        """The network's output unit for each label: those of the data's classes, then all others ``[outputs]``."""
        return output_order(self.data.outputs, _reader(model, find_site(model, "last")).out_features)

    def build(self) -> tuple[nn.Module, bool]:
        """The backbone with the weights that the user named, and whether its head fits the data."""
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

    def model(self, classifier: Artifact) -> tuple[nn.Module, Site]:
        """The classifier of an artifact, frozen and in eval mode on the context's device, and its site."""
        backbone, path = self.backbone, str(classifier.file("model.safetensors"))
        outputs = self.data.outputs
        model = load_backbone(backbone.library, backbone.name, path, len(self.classes), backbone.args, outputs).model
        return model.eval().requires_grad_(False).to(self.device), find_site(model, self.layer)

    def head(self, classifier: Artifact) -> tuple[Tensor, Tensor]:
        """Weight ``[outputs, M]`` and bias ``[outputs]`` of the linear reader behind the site, indexed by label.

        The first rows are those of the data's classes; a network may have further outputs.

        Raises:
            UserError: some of these numbers are NaN or infinite, and with them every logit would be.
        """
        model, site = self.model(classifier)
        reader, order = _reader(model, site), self.output_order(model)
        bias = torch.zeros(reader.out_features) if reader.bias is None else reader.bias.cpu()
        if not (reader.weight.isfinite().all() and bias.isfinite().all()):
            raise UserError(
                f"The classifier's head ({site.readers[0]}) holds NaN or infinite weights: nothing that it says of an "
                "image means anything; check backbone.weights."
            )
        return reader.weight.cpu()[order], bias[order]

    def activations(self, activations: Artifact, split: str) -> Captured:
        """Captured activations of a split."""
        return load_captured(activations.path, split)

    def sae(self, sae: Artifact, activations: Artifact) -> SAE:
        """The SAE of an artifact; refused unless it was made for this backbone, site and width of activations."""
        width = activations.record("activations.json")["width"]
        return load_sae(sae.file("sae.safetensors"), width=width, backbone=self.backbone.name, site=self.layer)

    def shuffled_within(self, images: int, width: int, batch_size: int) -> int | None:
        """How many rows a training shuffles at a time that reads its activations from disk.

        Args:
            images: of all splits together. width: ``M``. batch_size: what the rows are a multiple of.

        Returns:
            None if all activations fit into memory, twice: there are two copies while they are scaled. Otherwise rows
            that take a third of it: two such blocks may be there at once, and the rest is for what comes besides.
        """
        memory, row = self.memory * 2**30, 4 * width
        if 2 * images * row <= memory:
            return None
        return batch_size * max(1, int(memory // (3 * row * batch_size)))

    def fit(
        self,
        stage: str,
        module: pl.LightningModule,
        data: Any,
        scratch: Path,
        *,
        epochs: int,
        best: str | None = None,
        patience: int | None = None,
    ) -> pd.DataFrame:
        """``Trainer.fit`` that continues where a killed one stopped; the module ends with its best or last weights.

        Args:
            stage: names the logger's section. module: what is trained. data: a DataModule or dict of loaders.
            scratch: where checkpoints live until the artifact is whole.
            epochs: passes over the data. best: the metric (larger is better) whose best epoch's weights are kept;
                None keeps the last ones. patience: epochs without improvement of ``best`` before it stops.

        Returns:
            One row per epoch with every logged metric.

        Raises:
            Diverged: a metric became NaN or infinite; no checkpoint of that training is left.
        """
        checkpoints = scratch / "checkpoints"
        training = Training(stage, self.seed, checkpoints, resumable(checkpoints, best), epochs, best, patience)
        rows = self._ranks_for(stage, module)(fit_here, self.trainer, training, module, data)
        if bad := not_finite(rows):
            # Else the next attempt, with whatever is better, would go on from them.
            shutil.rmtree(checkpoints, ignore_errors=True)
            half = stage == "finetune" and self.precision.startswith("16")
            advice = "set trainer.precision=32-true or lower" if half else "lower"
            raise Diverged(
                f"The training of stage {stage} diverged: {', '.join(bad)} became NaN or infinite; {advice} its "
                "learning rate."
            )
        if best is not None:
            checkpoint = torch.load(checkpoints / "best.ckpt", "cpu", weights_only=True)
            module.load_state_dict(checkpoint["state_dict"])
        return pd.DataFrame(rows)

    def test(self, stage: str, module: pl.LightningModule) -> Any:
        """``Trainer.test`` over the test split; what the module's ``measures()`` then gives."""
        return self.ranks(test_here, self.trainer, stage, module, self.data)

    def _ranks_for(self, stage: str, module: nn.Module) -> Callable[..., Any]:
        """All ranks, unless batches must be normalised as a whole and cannot be."""
        normalises = any(isinstance(part, _BatchNorm) for part in module.modules())
        if self.ranks.several and self.device.type == "cpu" and normalises:
            log.warning("%s: BatchNorm cannot be shared by processes on the CPU; one of them trains alone.", stage)
            return alone
        return self.ranks


def output_order(outputs: Sequence[int] | None, total: int) -> Tensor:
    """A network's ``total`` output units, first the given ones: ``[total]``; None stands for the units' own order."""
    first = list(outputs or ())
    seen = set(first)
    return torch.tensor(first + [unit for unit in range(total) if unit not in seen])


def _reader(model: nn.Module, site: Site) -> nn.Linear:
    reader = model.get_submodule(site.readers[0])
    assert isinstance(reader, nn.Linear)
    return reader


def settings_of_key(settings: Mapping[str, Any], *inputs: Artifact) -> dict[str, Any]:
    """What a stage's artifact depends on: its settings, and the content of the artifacts it is made from."""
    return {"settings": dict(settings), **{artifact.kind: artifact.digest for artifact in inputs}}
