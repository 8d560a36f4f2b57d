"""SAEs of every variant with something in each of their tensors."""

from collections.abc import Sequence
from typing import Any

import jaxtyping
import pytorch_lightning as pl
import torch
from torch import Tensor

from salve.sae import SAE, VARIANTS, make_sae
from salve.stages.training import quiet_lightning

#: For a dictionary of a handful of latents.
SMALL: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "matryoshka": {"k": 3, "prefixes": [0.25, 0.5, 1.0]},
    "jumprelu": {"bandwidth": 0.4},
}


def drawn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def example(variant: str, width: int = 6, size: int = 9, dtype: torch.dtype = torch.float64, **settings: Any) -> SAE:
    """In train mode, with an encoder that is not the decoder's transpose, and no tensor left at its start."""
    sae = make_sae(variant, width, size, torch.Generator().manual_seed(0), **(SMALL.get(variant, {}) | settings))
    sae = sae.to(dtype)
    with torch.no_grad():
        sae.encoder.add_(0.3 * drawn(size, width, seed=2, dtype=dtype))
        sae.b_dec.copy_(torch.linspace(-1, 1, width))
        for name, tensor in sae.named_parameters():
            if tensor.shape == (size,) and tensor.requires_grad:
                tensor.copy_(torch.linspace(-0.5, 0.5, size).roll(len(name)))
        for name, buffer in sae.named_buffers():
            if name == "threshold":
                buffer.fill_(0.7)
    return sae


ALL = list(VARIANTS)


class _OneEpochChecked(pl.Callback):
    """No shapes are checked after a training's first epoch, whose steps are like all: they take half of the time."""

    def setup(self, *_: Any, **__: Any) -> None:
        self._before = jaxtyping.config.jaxtyping_disable

    def on_train_epoch_end(self, *_: Any) -> None:
        jaxtyping.config.update("jaxtyping_disable", True)

    def teardown(self, *_: Any, **__: Any) -> None:
        jaxtyping.config.update("jaxtyping_disable", self._before)

    def on_exception(self, *_: Any) -> None:
        self.teardown()


def plain_trainer(epochs: int, callbacks: Sequence[pl.Callback] = (), **options: Any) -> pl.Trainer:
    """A Trainer on the CPU that logs and shows nothing."""
    return pl.Trainer(
        callbacks=[*callbacks, _OneEpochChecked()],
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def fit(module: pl.LightningModule, epochs: int, *loaders: Any, **options: Any) -> None:
    """Train and keep nothing; loaders or ``datamodule=`` go to Lightning, the rest to its Trainer."""
    data = {name: options.pop(name) for name in ("datamodule",) if name in options}
    with quiet_lightning():
        plain_trainer(epochs, enable_checkpointing=False, **options).fit(module, *loaders, **data)
