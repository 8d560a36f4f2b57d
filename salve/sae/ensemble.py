# SPDX-License-Identifier: MIT
"""Train many SAEs on the same activations as one batched computation."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from salve.activations.schedule import Schedule
from salve.sae.base import SAE, normalise_columns
from salve.sae.memory import give_freed_memory_back, keep_freed_memory
from salve.sae.module import Measures, Precision, adam_with_schedule
from salve.sae.objective import Objective
from salve.sae.topk import BatchTopK, learn_threshold
from salve.settings import DECAY, WARMUP
from salve.types import Activations, Latents

#: Columns of the history, in the order in which Lightning logs them for one SAE; without a head, the first is missing.
MEASURES = ("downstream_accuracy", "fve", "l0", "l1", "dead_fraction", "loss")


@dataclass(frozen=True)
class Member:
    """One SAE of an ensemble.

    Attributes:
        sae: untrained. sparsity: its λ. seed: of its order of rows.
    """

    sae: SAE
    sparsity: float
    seed: int


class Stack(nn.Module):
    """SAEs of one variant and shape, with each of their tensors stacked along a first axis of ``G`` members.

    Args:
        members: by their number in the ensemble. auxk, patience: see :class:`SparseAutoencoder`.
    """

    rows_since_fired: Tensor
    threshold: Tensor

    def __init__(self, members: dict[int, Member], auxk: int = 0, patience: int = 0) -> None:
        super().__init__()
        self.numbers = list(members)
        saes = [member.sae for member in members.values()]
        parameters, buffers = stack_module_state(list[nn.Module](saes))
        # Stored column by column, as in each member.
        columns = parameters["decoder"].detach().mT.contiguous().mT
        parameters["decoder"] = columns.requires_grad_(not saes[0].decoder_frozen)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=value.requires_grad))
        for name, value in buffers.items():
            self.register_buffer(name, value)
        self._names = (*parameters, *buffers)
        self.sparsity: Tensor
        prices = [member.sparsity for member in members.values()]
        self.register_buffer("sparsity", torch.tensor(prices), persistent=False)
        # Templates without numbers of their own; inside a partial they are not registered as submodules.
        self._objective = partial(functional_call, Objective(copy.deepcopy(saes[0]), auxk).to("meta").train())
        self._infer = partial(functional_call, copy.deepcopy(saes[0]).to("meta").eval())
        self._patience = patience
        self._learns_threshold = isinstance(saes[0], BatchTopK)
        # In checkpoints only where AuxK needs it.
        rows_since_fired = torch.zeros(len(saes), saes[0].dictionary_size, dtype=torch.long)
        self.register_buffer("rows_since_fired", rows_since_fired, persistent=bool(auxk))
        self._auxk = auxk

    def losses(self, activations: Float[Tensor, "G N M"], step: int) -> Float[Tensor, " G"]:
        """Each member's loss on its own training batch.

        Args:
            activations: one batch for each member. step: number of batches so far.
        """

        def loss(state: dict[str, Tensor], rows: Tensor, sparsity: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = self._objective(state, (rows, sparsity, dead))
            return result

        state = {f"sae.{name}": getattr(self, name) for name in self._names}
        dead = self.rows_since_fired >= self._patience
        losses, latents = torch.vmap(loss)(state, activations, self.sparsity, dead)
        if self._learns_threshold:
            self.threshold.copy_(learn_threshold(self.threshold, latents, step))
        if self._auxk:
            fired = (latents > 0).any(dim=1)
            self.rows_since_fired.copy_(torch.where(fired, 0, self.rows_since_fired + activations.shape[1]))
        return losses

    def state_of(self, index: int) -> dict[str, Tensor]:
        """The ``state_dict`` of the stack's member ``index``."""
        return {name: getattr(self, name).detach()[index] for name in self._names}

    def forward(self, index: int, activations: Activations) -> tuple[Activations, Latents]:
        """Reconstruction and latents of the stack's member ``index``."""
        result: tuple[Tensor, Tensor] = self._infer(self.state_of(index), (activations,))
        return result

    def normalise_decoders(self) -> None:
        """Scale the columns of all decoders to unit norm, in place; frozen ones stay as they are."""
        decoders = self.get_parameter("decoder")
        if decoders.requires_grad:
            normalise_columns(decoders)


class SAEEnsemble(pl.LightningModule):
    """Train SAEs together. Each equals the result of :class:`SparseAutoencoder` alone, up to float rounding.

    SAEs of one shape are stacked, and a step is one batched computation per stack. Every loss depends on one member
    only, so the gradient of their sum is each member's own, and Adam treats every number by itself.

    One Lightning training step runs all optimiser steps of an epoch, since Lightning's overhead per step would take
    longer than the step.

    Args:
        members: may differ in size, λ, seed and variant.
        schedule: shared by all members.
        learning_rate, head, auxk, patience, precision, warmup, decay: see :class:`SparseAutoencoder`.
    """

    def __init__(
        self,
        members: Sequence[Member],
        schedule: Schedule,
        learning_rate: float,
        head: Callable[[Tensor], Tensor] | None,
        *,
        auxk: int = 0,
        patience: int = 0,
        precision: Precision = "float32",
        warmup: float = WARMUP,
        decay: float = DECAY,
    ) -> None:
        super().__init__()
        self.precision = precision
        self.automatic_optimization = False
        self.schedule, self.learning_rate = schedule, learning_rate
        self.warmup, self.decay = warmup, decay
        self._members = tuple(members)
        self._columns = [name for name in MEASURES if head is not None or name != "downstream_accuracy"]
        shapes: dict[str, dict[int, Member]] = {}
        for number, member in enumerate(members):
            sae = member.sae
            shape = str((sae.variant, sae.dictionary_size, sae.settings(), sae.decoder_frozen))
            shapes.setdefault(shape, {})[number] = member
        self._stacks = [Stack(held, auxk, patience) for held in shapes.values()]
        self._measures = [Measures(member.sae, head) for member in members]
        # Registers them as submodules; the lists above keep their types.
        self.stacks, self.measures = nn.ModuleList(self._stacks), nn.ModuleList(self._measures)
        self._losses: Tensor
        self.register_buffer("_losses", torch.zeros(len(members)), persistent=False)
        self._history: list[Tensor] = []

    def on_fit_start(self) -> None:
        """Keep freed memory while training."""
        keep_freed_memory()

    def on_fit_end(self) -> None:
        """Return freed memory to the system."""
        give_freed_memory_back()

    def training_step(self, batch: Float[Tensor, "N M"], _: int) -> None:
        """Take all optimiser steps of the Trainer's epoch; ``batch`` holds all training rows."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        schedule, size = self.schedule, self.schedule.batch_size
        steps = schedule.part_after(self.global_step, int(self.trainer.max_epochs or 1))
        drawn = {seed: schedule.order(seed, steps) for seed in {member.seed for member in self._members}}
        orders = torch.stack([drawn[member.seed] for member in self._members]).to(batch.device)  # [members, n]
        order_of = [orders[stack.numbers] for stack in self._stacks]
        totals = [torch.zeros(len(stack.numbers), device=batch.device) for stack in self._stacks]
        for number, step in enumerate(steps):
            start, stop = number * size, (number + 1) * size
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                losses = [
                    stack.losses(batch[order[:, start:stop]], step)
                    for stack, order in zip(self._stacks, order_of, strict=True)
                ]
            optimizer.zero_grad()
            self.manual_backward(torch.cat(losses).sum())
            optimizer.step()
            scheduler.step()
            for stack, total, loss in zip(self._stacks, totals, losses, strict=True):
                stack.normalise_decoders()
                total += loss.detach()
        for stack, total in zip(self._stacks, totals, strict=True):
            self._losses[stack.numbers] = total / len(steps)

    def validation_step(self, batch: Sequence[Tensor], _: int) -> None:
        """Accumulate each member's measures."""
        activations, labels = batch
        for stack in self._stacks:
            for index, number in enumerate(stack.numbers):
                reconstruction, latents = stack(index, activations)
                self._measures[number].update(activations, reconstruction, latents, labels)

    def on_train_epoch_end(self) -> None:
        """Store the epoch's measures. ``self.log`` would stop all members when one diverges."""
        measured = [
            {**measures.compute(), "loss": loss} for measures, loss in zip(self._measures, self._losses, strict=True)
        ]
        self._history.append(torch.tensor([[float(row[name]) for name in self._columns] for row in measured]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the history."""
        checkpoint["history"] = torch.stack(self._history)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history."""
        self._history = list(checkpoint["history"])

    def configure_optimizers(self) -> Any:
        """Adam and its schedule, as for one SAE."""
        return adam_with_schedule(
            self.stacks.parameters(), self.learning_rate, self.schedule.steps, self.warmup, self.decay
        )

    def trained(self, number: int) -> tuple[SAE, list[dict[str, float]]]:
        """A member as it is now, and its history: one row of measures per Trainer epoch."""
        [stack] = [stack for stack in self._stacks if number in stack.numbers]
        sae = copy.deepcopy(self._members[number].sae)
        sae.load_state_dict(stack.state_of(stack.numbers.index(number)))
        history = [dict(zip(self._columns, measured[number].tolist(), strict=True)) for measured in self._history]
        return sae, [{"epoch": epoch, **row} for epoch, row in enumerate(history)]
