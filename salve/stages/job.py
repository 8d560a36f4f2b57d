"""What every stage works with: the store, the data, the backbone, and how to train."""

import logging
import math
import os
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from salve.artifacts import Artifact, Store
from salve.backbones import Captured, Site, find_site, load_backbone, load_captured
from salve.data.base import ImageData
from salve.sae import SAE, load_sae
from salve.types import UserError

log = logging.getLogger(__name__)

MakeTrainer = Callable[[str, int, list[Callback]], pl.Trainer]


#: Of a training: an ensemble's holds all its SAEs, and would take longer to write than some epochs take.
CHECKPOINTS = 20


@dataclass
class PreprocessSettings:
    """Overrides of a backbone's preset; None keeps what the preset says.

    Attributes:
        size: side in pixels of the square that the backbone reads. resize: pixels of the shorter side before the crop
            of that square. squash: true resizes to the square without a crop, false crops.
        interpolation: bilinear or bicubic.
        mean, std: of the three channels, on the 0..1 scale.
    """

    size: int | None = None
    resize: int | None = None
    squash: bool | None = None
    interpolation: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None


@dataclass
class BackboneSettings:
    """Which backbone, with which weights.

    Attributes:
        library: torchvision or timm. name: the library's name of the model. weights: random, imagenet, or a path.
        args: further arguments of the library's constructor.
        preprocess: overrides of the preset.
    """

    library: str
    name: str
    weights: str
    args: dict[str, Any] = field(default_factory=dict)
    preprocess: PreprocessSettings = field(default_factory=PreprocessSettings)

    def __post_init__(self) -> None:
        # Once, so that keys and records see the same file as what reads it.
        self.weights = os.path.expanduser(self.weights)


class Ranks(Protocol):
    """Calls a function on every rank at once; see :class:`salve.run.ranks.Ranks`."""

    @property
    def several(self) -> bool: ...

    def __call__(self, work: Callable[..., Any], /, *args: Any) -> Any: ...


@dataclass(frozen=True)
class Job:
    """The surroundings of a stage.

    Attributes:
        store: where artifacts live. data: bound to the backbone's preprocessing.
        backbone, layer, seed: what is studied.
        trainer: ``trainer(stage, max_epochs, callbacks)`` makes a Trainer with the job's devices and logger.
        device: where forward passes outside a Trainer run. progress: see :func:`salve.backbones.captured`.
        ranks: the processes that train and test; only this one does anything else.
        memory: GiB that a process may hold of activations while it trains on them.
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
        )
        return loaded.model, loaded.fits

    def model(self, classifier: Artifact) -> tuple[nn.Module, Site]:
        """The classifier of an artifact, frozen and in eval mode on the job's device, and its site."""
        backbone, path = self.backbone, str(classifier.file("model.safetensors"))
        model = load_backbone(backbone.library, backbone.name, path, len(self.classes), backbone.args).model
        return model.eval().requires_grad_(False).to(self.device), find_site(model, self.layer)

    def head(self, classifier: Artifact) -> tuple[Tensor, Tensor]:
        """Weight ``[outputs, M]`` and bias ``[outputs]`` of the linear reader behind the site, indexed by label.

        The first rows are those of the data's classes; a network may have further outputs.
        """
        model, site = self.model(classifier)
        reader, order = _reader(model, site), self.output_order(model)
        bias = torch.zeros(reader.out_features) if reader.bias is None else reader.bias.cpu()
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
        """
        checkpoints = scratch / "checkpoints"
        training = _Training(stage, self.seed, checkpoints, _resumable(checkpoints, best), epochs, best, patience)
        rows = self._ranks_for(stage, module)(_fit, self.trainer, training, module, data)
        if best is not None:
            checkpoint = torch.load(checkpoints / "best.ckpt", "cpu", weights_only=True)
            module.load_state_dict(checkpoint["state_dict"])
        if bad := {name for row in rows for name, value in row.items() if not math.isfinite(value)}:
            raise UserError(
                f"The training of stage {stage} diverged: {', '.join(sorted(bad))} became NaN or infinite; lower its "
                "learning rate."
            )
        return pd.DataFrame(rows)

    def test(self, stage: str, module: pl.LightningModule) -> Any:
        """``Trainer.test`` over the test split; what the module's ``measures()`` then gives."""
        return self.ranks(_test, self.trainer, stage, module, self.data)

    def _ranks_for(self, stage: str, module: nn.Module) -> Callable[..., Any]:
        """All ranks, unless batches must be normalised as a whole and cannot be."""
        normalises = any(isinstance(part, _BatchNorm) for part in module.modules())
        if self.ranks.several and self.device.type == "cpu" and normalises:
            log.warning("%s: BatchNorm cannot be shared by processes on the CPU; one of them trains alone.", stage)
            return _alone
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


def recipe_of(settings: Mapping[str, Any], *inputs: Artifact) -> dict[str, Any]:
    """What a stage's artifact depends on: its settings, and the content of the artifacts it is made from."""
    return {"settings": dict(settings), **{artifact.kind: artifact.digest for artifact in inputs}}


@dataclass(frozen=True)
class _Training:
    """Arguments of :meth:`Job.fit`, for every rank."""

    stage: str
    seed: int
    folder: Path
    resume: Path | None
    epochs: int
    best: str | None
    patience: int | None


def _fit(
    make_trainer: MakeTrainer, training: _Training, module: pl.LightningModule, data: Mapping[str, Any]
) -> list[dict[str, float]]:
    """Train on this rank; every epoch's metrics."""
    history = _History(training.seed)
    callbacks: list[Callback] = [history]
    if training.best is not None:
        # Before the last one's: a kill between the two must not leave an epoch that is done without its weights.
        best = ModelCheckpoint(
            training.folder, filename="best", monitor=training.best, mode="max", enable_version_counter=False
        )
        callbacks.append(best)
        if training.patience is not None:
            callbacks.append(EarlyStopping(training.best, mode="max", patience=training.patience))
    every = max(1, training.epochs // CHECKPOINTS)
    last = ModelCheckpoint(training.folder, filename="last", every_n_epochs=every, enable_version_counter=False)
    callbacks.append(last)
    with quiet_lightning():
        trainer = make_trainer(training.stage, training.epochs, callbacks)
        trainer.fit(module, **data, ckpt_path=training.resume)
    _forget_trainer(data.get("datamodule"))
    return history.rows


def _test(make_trainer: MakeTrainer, stage: str, module: pl.LightningModule, data: pl.LightningDataModule) -> Any:
    """Test on this rank."""
    with quiet_lightning():
        make_trainer(stage, 1, []).test(module, datamodule=data, verbose=False)
    _forget_trainer(data)
    return module.measures()  # type: ignore[operator]


def _forget_trainer(data: pl.LightningDataModule | None) -> None:
    """A DataModule keeps its Trainer, with which it could not be sent to another rank."""
    if data is not None:
        data.trainer = None


def _alone(work: Callable[..., Any], /, *args: Any) -> Any:
    """On this process only."""
    return work(*args)


def _resumable(folder: Path, best: str | None) -> Path | None:
    """The checkpoint to go on from, if it and what belongs to it can be read."""
    last = folder / "last.ckpt"
    if not last.is_file():
        return None
    for path in (last, folder / "best.ckpt") if best is not None else (last,):
        try:
            torch.load(path, "cpu", weights_only=True)
        # A damaged file makes the unpickler raise almost anything.
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, AttributeError, pickle.UnpicklingError) as error:
            reason = " ".join(str(error).split()).split(". ")[0]
            log.warning("%s cannot be read (%s): this training starts again.", path, reason)
            return None
    return last


class _History(Callback):
    """What makes a resumed training the same as one that was never interrupted.

    Every epoch's metrics are kept through checkpoints, and every epoch starts from its own random state, which a
    checkpoint does not hold.
    """

    def __init__(self, seed: int) -> None:
        self.rows: list[dict[str, float]] = []
        self._seed = seed
        self._first = True

    def _start_epoch(self) -> None:
        torch.manual_seed(self._seed * 100_003 + len(self.rows))

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._start_epoch()

    def on_train_epoch_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        # Lightning draws the first epoch's order while it sets up, and every later one's after this hook.
        if not self._first:
            self._start_epoch()
        self._first = False

    def on_train_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.rows.append({"epoch": trainer.current_epoch, **metrics})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])
        self._start_epoch()


class quiet_lightning(warnings.catch_warnings):
    """Without Lightning's advice that does not apply: no workers are a choice, a resumed folder is not empty, and not
    everything on a cluster's machine is a SLURM step."""

    def __enter__(self) -> None:
        super().__enter__()
        for advice in (
            "does not have many workers",
            "exists and is not empty",
            "The number of training batches",
            "LeafSpec",
            "`srun` command is available",
        ):
            warnings.filterwarnings("ignore", f".*{advice}.*")
