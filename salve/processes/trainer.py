# SPDX-License-Identifier: MIT
"""Make Lightning's Trainer, the same on every rank."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.plugins import LayerSync, TorchCheckpointIO
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from salve.artifacts import keep
from salve.distributed import rank_and_world_size
from salve.ending import others_handle_sigterm
from salve.processes.progress import ProgressLines
from salve.system import refused_by_system
from salve.timm_alone import timm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainerFactory:
    """Makes Trainers: for the ranks of the process group that it is called in, or for this process alone.

    Attributes:
        accelerator: ``cpu`` or ``cuda``.
        gpus: indices of a node's GPUs that may be used; None for the first ones.
        local_size: the number of ranks on a node.
        precision: of fine-tuning.
        logger: makes the logger of a stage, by name. Followers get a copy of this factory without it.
        bar: whether to show a progress bar.
        lines: whether to log lines of progress.
        arguments: the user's own arguments of the Trainer, by the name of the stage; for training, not for testing.
        callbacks: likewise makers of the user's callbacks.
    """

    accelerator: str
    gpus: list[int] | None
    local_size: int
    precision: Any  # Lightning's own type is a long Literal
    logger: Callable[[str], Logger] | None
    bar: bool
    lines: bool = False
    arguments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    callbacks: Mapping[str, Sequence[Callable[[], Callback]]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "logger": None, "bar": False, "lines": False}

    def __call__(self, stage: str, max_epochs: int, callbacks: list[Callback]) -> pl.Trainer:
        """Make the Trainer of a stage.

        Args:
            stage: ``finetune`` or ``discover``.
            max_epochs: passes over the data.
            callbacks: what the training needs; none for testing. Lightning saves checkpoints only if there are some.
        """
        _, ranks = rank_and_world_size()
        here = self.local_size if ranks > 1 else 1
        plugins: list[Any] = [_Ranks(here), _Checkpoints()]
        if ranks > 1 and self.accelerator == "cuda":
            plugins.append(_SharedBatchNorm())
        shown: list[Callback] = [_Bar()] if self.bar else []
        if self.lines:
            shown.append(ProgressLines(stage, log.info))
        own = [make() for make in self.callbacks.get(stage, ())] if callbacks else []
        arguments = self.arguments.get(stage, {}) if callbacks else {}
        logger: Logger | bool = self.logger(stage) if self.logger else False
        if own and not logger:
            logger = DummyLogger()  # some callbacks refuse to work without a logger, also on a follower
        trainer = pl.Trainer(
            accelerator=self.accelerator,
            devices=here if self.gpus is None else self.gpus[:here],
            num_nodes=ranks // here,
            # A static graph, because some timm models have parameters that no output depends on.
            strategy=DDPStrategy(static_graph=True) if ranks > 1 else "auto",
            plugins=plugins,
            # salve.distributed splits batches over ranks; Lightning's sampler would repeat rows.
            use_distributed_sampler=False,
            # SAEs and measurements stay in float32, since sizes of edits are compared across them.
            precision=self.precision if stage == "finetune" else "32-true",
            max_epochs=max_epochs,
            callbacks=[*callbacks, *own, *shown],
            logger=logger,
            enable_checkpointing=bool(callbacks),
            enable_progress_bar=self.bar,
            num_sanity_val_steps=0,
            **{"enable_model_summary": False, "log_every_n_steps": 1_000_000, **arguments},
        )
        if not others_handle_sigterm():
            # salve.ending handles signals. On SIGTERM, Lightning would end after the batch, with status 0, and with
            # several ranks its handler would wait for ranks that are still computing.
            trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        return trainer


class _Ranks(ClusterEnvironment):
    """Tells Lightning which rank this is, so that it does not read the variables of SLURM or torchrun."""

    def __init__(self, local_size: int) -> None:
        super().__init__()
        self._local_size = local_size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return "127.0.0.1"  # not used: the process group exists before a Trainer does

    @property
    def main_port(self) -> int:
        return 0

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return rank_and_world_size()[1]

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return rank_and_world_size()[0]

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return rank_and_world_size()[0] % self._local_size

    def node_rank(self) -> int:
        return rank_and_world_size()[0] // self._local_size


class _Checkpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, even if the process is killed or the disk is full."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        # Lightning writes to the system's temporary folder first, which may be on another disk.
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        try:
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
            keep(unfinished, path)
        except (RuntimeError, OSError) as error:  # torch raises RuntimeError from the system's error
            if (refused := refused_by_system(error, path)) is None:
                raise
            raise refused from error
        finally:
            with suppress(FileNotFoundError):
                unfinished.unlink()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        # Whatever Lightning asks for: nothing is unpickled but tensors and plain values.
        return torch.load(path, map_location or "cpu", weights_only=True)


class _SharedBatchNorm(LayerSync):
    """Makes BatchNorm use the rows of all ranks. timm's function keeps the activation inside timm's BatchNorm."""

    def apply(self, model: nn.Module) -> nn.Module:
        synchronised: nn.Module = timm.layers.convert_sync_batchnorm(model)
        return synchronised

    def revert(self, model: nn.Module) -> nn.Module:
        return model  # its state_dict is the same, and nothing else is read


class _Bar(RichProgressBar):
    """Lightning's progress bar without ``v_num``, the logger's version."""

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}
