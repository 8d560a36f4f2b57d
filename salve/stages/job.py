"""What every stage works with: the store, the data, the backbone, and how to train."""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from salve.artifacts import Artifact, Store
from salve.backbones import Captured, Site, find_site, load_backbone, load_captured
from salve.data.base import ImageData
from salve.types import UserError


@dataclass
class PreprocessSettings:
    """Overrides of a backbone's preset; None keeps what the preset says.

    Attributes:
        size: side in pixels. squash: resize to the square without a crop. interpolation: bilinear or bicubic.
        mean, std: of the three channels, on the 0..1 scale.
    """

    size: int | None = None
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


@dataclass(frozen=True)
class Job:
    """The surroundings of a stage.

    Attributes:
        store: where artifacts live. data: bound to the backbone's preprocessing.
        backbone, layer, seed: what is studied.
        trainer: ``trainer(stage, max_epochs, callbacks)`` makes a Trainer with the job's devices and logger.
        device: where forward passes outside a Trainer run. progress: see :func:`salve.backbones.captured`.
    """

    store: Store
    data: ImageData
    backbone: BackboneSettings
    layer: str
    seed: int
    trainer: Callable[[str, int, list[Callback]], pl.Trainer]
    device: torch.device
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.data.classes

    def build(self) -> tuple[nn.Module, bool]:
        """The backbone with the weights that the user named, and whether its head fits the data."""
        backbone = self.backbone
        return load_backbone(
            backbone.library,
            backbone.name,
            backbone.weights,
            len(self.classes),
            backbone.args,
        )

    def model(self, classifier: Artifact) -> tuple[nn.Module, Site]:
        """The classifier of an artifact, frozen and in eval mode on the job's device, and its site."""
        backbone, path = self.backbone, str(classifier.file("model.safetensors"))
        model, _ = load_backbone(backbone.library, backbone.name, path, len(self.classes), backbone.args)
        return model.eval().requires_grad_(False).to(self.device), find_site(model, self.layer)

    def head(self, classifier: Artifact) -> tuple[Tensor, Tensor]:
        """Weight ``[C, M]`` and bias ``[C]`` of the linear reader behind the site."""
        model, site = self.model(classifier)
        reader = model.get_submodule(site.readers[0])
        assert isinstance(reader, nn.Linear)
        bias = torch.zeros(reader.out_features) if reader.bias is None else reader.bias.cpu()
        return reader.weight.cpu(), bias

    def activations(self, activations: Artifact, split: str) -> Captured:
        """Captured activations of a split."""
        return load_captured(activations.path, split)

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
        history = _History(self.seed)
        last = ModelCheckpoint(scratch / "checkpoints", filename="last", every_n_epochs=1, enable_version_counter=False)
        callbacks: list[Callback] = [history, last]
        if best is not None:
            kept = ModelCheckpoint(
                scratch / "checkpoints", filename="best", monitor=best, mode="max", enable_version_counter=False
            )
            callbacks.append(kept)
            if patience is not None:
                callbacks.append(EarlyStopping(best, mode="max", patience=patience))
        resume = scratch / "checkpoints" / "last.ckpt"
        trainer = self.trainer(stage, epochs, callbacks)
        with quiet_lightning():
            trainer.fit(module, **data, ckpt_path=resume if resume.is_file() else None)
        if best is not None:
            checkpoint = torch.load(scratch / "checkpoints" / "best.ckpt", "cpu", weights_only=True)
            module.load_state_dict(checkpoint["state_dict"])
        if bad := {name for row in history.rows for name, value in row.items() if not math.isfinite(value)}:
            raise UserError(
                f"The training of stage {stage} diverged: {', '.join(sorted(bad))} became NaN or infinite; lower its "
                "learning rate."
            )
        return pd.DataFrame(history.rows)


def recipe_of(settings: Mapping[str, Any], *inputs: Artifact) -> dict[str, Any]:
    """What a stage's artifact depends on: its settings, and the content of the artifacts it is made from."""
    return {"settings": dict(settings), **{artifact.kind: artifact.digest for artifact in inputs}}


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
    """Without Lightning's advice that does not apply: no workers are a choice, a resumed folder is not empty."""

    def __enter__(self) -> None:
        super().__enter__()
        for advice in (
            "does not have many workers",
            "exists and is not empty",
            "The number of training batches",
            "LeafSpec",
        ):
            warnings.filterwarnings("ignore", f".*{advice}.*")
