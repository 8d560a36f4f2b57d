# SPDX-License-Identifier: MIT
"""Fine-tune a copy of a network's weights for a few steps: what edit methods and relearning share."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from salve.backbones.cut import Cut
from salve.editing.methods.base import Fitting, Target, TrainImages
from salve.editing.methods.change import Weights
from salve.types import Diverged, Images, UserError

#: ``all`` parameters, or those ``behind`` the site: all that the site's activations do not depend on.
Where: TypeAlias = Literal["all", "behind"]
Optimiser: TypeAlias = Literal["adam", "sgd"]
#: The loss of one batch, as a function of the network.
Loss: TypeAlias = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class FineTuning:
    """How a copy of a network's weights is trained. The network stays in eval mode: BatchNorm's statistics, like all
    buffers, do not move, and the given network is not changed.

    Attributes:
        batch_size: images of a step. learning_rate: constant.
        optimiser: ``adam`` or ``sgd``, both without weight decay and momentum.
        where: see :data:`Where`.

    Raises:
        UserError: a setting is outside its range.
    """

    batch_size: int = 32
    learning_rate: float = 1e-4
    optimiser: str = "adam"
    where: str = "all"

    def __post_init__(self) -> None:
        check_whole("batch_size", self.batch_size, 1)
        if not 0 < self.learning_rate < float("inf"):
            raise UserError(f"learning_rate={self.learning_rate:g} must be above 0.")
        for name, choices in (("optimiser", Optimiser), ("where", Where)):
            if (value := getattr(self, name)) not in get_args(choices):
                raise UserError(f"{name}={value} is unknown; choose {' or '.join(get_args(choices))}.")

    @property
    def everywhere(self) -> bool:
        """Whether weights in front of the site are trained, too."""
        return self.where == "all"

    @property
    def of_site(self) -> bool:
        """What lies behind the site depends on it."""
        return self.where == "behind"

    @property
    def draws(self) -> bool:
        """The images of each batch are drawn."""
        return True

    def copy_of(self, cut: Cut) -> nn.Module:
        """A copy of the network, of which the parameters that are trained require a gradient."""
        net, fixed = copy.deepcopy(cut.model), cut.weights_before() if self.where == "behind" else set[str]()
        names: dict[nn.Parameter, list[str]] = {}  # several where modules share one
        for name, parameter in net.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        for parameter, own in names.items():
            parameter.requires_grad_(parameter.is_floating_point() and fixed.isdisjoint(own))
        return net

    def train(self, net: nn.Module, losses: Iterable[Loss], masks: Weights | None = None) -> Iterator[None]:
        """Train a network in place; yields after the optimiser's step for each loss.

        Args:
            net: of :meth:`copy_of`. losses: of a batch each.
            masks: by name, 1 where a weight may move and 0 where it may not; None lets all move.

        Raises:
            Diverged: a weight became NaN or infinite.
        """
        trained = {name: one for name, one in net.named_parameters() if one.requires_grad}
        kind = torch.optim.Adam if self.optimiser == "adam" else torch.optim.SGD
        optimiser = kind(list(trained.values()), lr=self.learning_rate)
        for number, loss in enumerate(losses):
            for name, gradient in gradients(net, loss).items():
                trained[name].grad = gradient if masks is None else gradient * masks[name]
            optimiser.step()
            if not all(bool(one.isfinite().all()) for one in trained.values()):
                rate = f"learning_rate={self.learning_rate:g}"
                raise Diverged(f"Fine-tuning for an edit diverged at step {number + 1}; lower its {rate}.")
            yield

    def tuned(self, cut: Cut, losses: Iterable[Loss], masks: Weights | None = None) -> Weights:
        """The tensors of the ``state_dict`` that differ when a copy of the network has been trained."""
        net, start = self.copy_of(cut), cut.model.state_dict()
        for _ in self.train(net, losses, masks):
            pass
        return {name: one for name, one in net.state_dict().items() if not torch.equal(one, start[name])}


def check_whole(name: str, value: int, least: int) -> None:
    """Raises UserError unless a setting is a whole number and at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value} must be a whole number, at least {least}.")


def between(cut: Cut, end: Weights, share: float) -> Weights:
    """``θ + share (end − θ)``, with the network's weights θ; at 0 and 1 exact in every bit."""
    start = cut.model.state_dict()
    if share == 0:
        return {name: start[name].clone() for name in end}
    return {name: torch.lerp(start[name], tensor, share) for name, tensor in end.items()}


def gradients(net: nn.Module, loss: Loss) -> Weights:
    """The gradient of a loss, by name, for the parameters that require one; the same bits in every run on a device."""
    trained = {name: one for name, one in net.named_parameters() if one.requires_grad}
    with _same_every_time(), torch.enable_grad():
        found = torch.autograd.grad(loss(net), list(trained.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


@contextmanager
def _same_every_time() -> Iterator[None]:
    """Let cuDNN choose only algorithms that give the same bits in every run."""
    kept = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept


def cross_entropies(order: Int[Tensor, " C"], batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Loss]:
    """The mean cross-entropy of each batch. order: the outputs, those of the data's classes first."""
    return (partial(_cross_entropy, order, images, labels) for images, labels in batches)


def _cross_entropy(order: Tensor, images: Images, labels: Int[Tensor, " N"], net: nn.Module) -> Float[Tensor, ""]:
    return F.cross_entropy(net(images)[:, order.to(images.device)], labels.to(images.device))


def train_images(fitting: Fitting, what: str) -> tuple[TrainImages, Int[Tensor, " N"]]:
    """What gives the train images, and their labels; ``what`` needs them, for the message.

    Raises:
        UserError: there are none.
    """
    if fitting.images is None or fitting.image_labels is None:
        raise UserError(f"{what} needs the train images.")
    return fitting.images, fitting.image_labels


def numbers_of(labels: Int[Tensor, " N"], target: Target) -> Int[Tensor, " n"]:
    """The numbers of the target's train images.

    Raises:
        UserError: some class of the target has none.
    """
    if not target.classes or any(not bool((labels == label).any()) for label in target.classes):
        raise UserError(f"{target.name} has no train images, so that no edit can be fitted to it.")
    return torch.isin(labels, torch.tensor(target.classes)).nonzero()[:, 0]


def numbers_beside(labels: Int[Tensor, " N"], target: Target) -> Int[Tensor, " n"]:
    """The numbers of all other train images.

    Raises:
        UserError: there are none.
    """
    found = (~torch.isin(labels, torch.tensor(target.classes))).nonzero()[:, 0]
    if not len(found):
        raise UserError(f"All train images are of {target.name}, so that there are none to keep right.")
    return found


def drawn(pools: Sequence[Tensor], count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Draw numbers from several pools in turn.

    A pool is gone through in a random order, and then again in another one, as often as needed. The first numbers are
    the same however many are drawn.

    Args:
        pools: ``[n]`` each; none is empty. count: numbers drawn. generator: on the CPU.
    """
    each, columns = -(-count // len(pools)), list[Tensor]()
    for pool, seed in zip(pools, torch.randint(2**62, (len(pools),), generator=generator).tolist(), strict=True):
        own, passes = torch.Generator().manual_seed(seed), -(-each // len(pool))
        columns.append(torch.cat([pool[torch.randperm(len(pool), generator=own)] for _ in range(passes)])[:each])
    return torch.stack(columns, dim=1).flatten()[:count]


def batches_of(
    images: TrainImages, numbers: Int[Tensor, " count"], size: int
) -> Iterator[tuple[Images, Int[Tensor, " size"]]]:
    """Train images in the order of their numbers, in batches of ``size``; the last may be smaller."""
    held: list[tuple[Tensor, Tensor]] = []
    for batch in images(numbers.tolist()):
        held.append(batch)
        while (count := sum(len(labels) for _, labels in held)) >= size:
            some, labels = (torch.cat(parts) for parts in zip(*held, strict=True))
            yield some[:size], labels[:size]
            held = [(some[size:], labels[size:])] if count > size else []
    if held:
        some, labels = (torch.cat(parts) for parts in zip(*held, strict=True))
        yield some, labels
