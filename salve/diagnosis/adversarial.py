# SPDX-License-Identifier: MIT
"""How small a change of an image's pixels makes it lose its class, by projected gradient descent with restarts.

The package adversarial-robustness-toolbox attacks (salve[robustness]); the search for the smallest norm is ours. What
an attack finds is an upper bound: a better one may need less.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from salve.types import Images, Labels, Logits, UserError

#: Whether each of some images ``[n]``, given by number, loses its class within its own norm ``[n]``.
Breaks = Callable[[Tensor, Tensor], Tensor]


def smallest_norms(breaks: Breaks, count: int, smallest: float, largest: float, halvings: int) -> Float[Tensor, " N"]:
    """The smallest norm within which each image is broken, by bisection on a logarithmic scale.

    An attack need not be monotone: the norm returned is one at which it succeeded.

    Args:
        breaks: the attack. count: ``N`` images.
        smallest, largest: between which norms to look, above 0.
        halvings: of this interval. The result is at most ``(largest / smallest) ** 2 ** −halvings`` times too large.

    Returns:
        ``[N]`` float64: +inf for an image that is not broken at ``largest``.

    Raises:
        UserError: the norms do not rise from above 0.
    """
    if not 0 < smallest < largest:
        raise UserError(f"Norms must rise from above 0, but are {smallest:g} and {largest:g}.")
    low = torch.full((count,), float(smallest), dtype=torch.float64)
    high = torch.full((count,), float(largest), dtype=torch.float64)
    every = torch.arange(count)
    found = torch.where(breaks(every, high), high, torch.inf)
    for _ in range(halvings):
        rows = found.isfinite().nonzero()[:, 0]
        if not len(rows):
            break
        middle = (low[rows] * found[rows]).sqrt()
        broken = breaks(rows, middle)
        found[rows] = torch.where(broken, middle, found[rows])
        low[rows] = torch.where(broken, low[rows], middle)
    return found


class Attack:
    """Projected gradient descent with restarts, in the maximum norm, each image within its own.

    Args:
        logits: from pixels ``[n, 3, S, S]`` in 0 … 1 to logits ``[n, C]``.
        pixels: ``[N, 3, S, S]`` in 0 … 1. labels: ``[N]``, the class that each is to lose.
        classes: ``C``.
        steps: of the descent. restarts: from random points. seed: of these.
        batch_size: images at a time.

    Raises:
        UserError: adversarial-robustness-toolbox is not installed.
    """

    def __init__(
        self,
        logits: Callable[[Images], Logits],
        pixels: Float[Tensor, "N 3 S S"],
        labels: Labels,
        classes: int,
        *,
        steps: int = 10,
        restarts: int = 2,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        self._classifier, self._descent = _library()
        self._logits, self.pixels, self.labels, self.classes = logits, pixels, labels, classes
        self.steps, self.restarts, self.seed, self.batch_size = steps, restarts, seed, batch_size

    def __call__(self, rows: Tensor, norms: Float[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Whether each of these images loses its class within its norm. Images of one norm are attacked together."""
        broken = torch.zeros(len(rows), dtype=torch.bool)
        for norm in norms.unique().tolist():
            of_it = (norms == norm).nonzero()[:, 0]
            broken[of_it] = self._together(rows[of_it], norm)
        return broken

    def _together(self, rows: Tensor, norm: float) -> Bool[Tensor, " n"]:
        pixels, labels = self.pixels[rows], self.labels[rows].cpu()
        device = pixels.device
        estimator = self._classifier(
            _Module(self._logits), nn.CrossEntropyLoss(), tuple(pixels.shape[1:]), self.classes, clip_values=(0.0, 1.0),
            device_type="cpu" if device.type == "cpu" else "gpu",
        )  # fmt: skip
        descent = self._descent(
            estimator, norm=np.inf, eps=norm, eps_step=norm * min(1.0, 2.5 / self.steps), max_iter=self.steps,
            num_random_init=self.restarts, batch_size=self.batch_size, verbose=False,
        )  # fmt: skip
        before = np.random.get_state()  # noqa: NPY002 - it is the one that the package draws from
        np.random.seed(self.seed)  # noqa: NPY002
        try:
            with torch.enable_grad(), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)  # in the package
                changed = torch.from_numpy(descent.generate(pixels.cpu().numpy(), labels.numpy()))
        finally:
            np.random.set_state(before)  # noqa: NPY002
        with torch.no_grad():
            parts = [self._logits(part.to(device)).argmax(dim=1).cpu() for part in changed.split(self.batch_size)]
        return torch.cat(parts) != labels


class _Module(nn.Module):
    """The package wants a module."""

    def __init__(self, logits: Callable[[Images], Logits]) -> None:
        super().__init__()
        self._logits = logits

    def forward(self, pixels: Tensor) -> Tensor:
        return self._logits(pixels)


def check_installed() -> None:
    """Check that the package is there.

    Raises:
        UserError: it is not installed.
    """
    _library()


def _library() -> tuple[Any, Any]:
    """The package's classifier and attack.

    Raises:
        UserError: it is not installed.
    """
    try:
        from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch import (
            ProjectedGradientDescentPyTorch,
        )
        from art.estimators.classification import PyTorchClassifier
    except ImportError as error:
        raise UserError(
            f"Adversarial images need the package adversarial-robustness-toolbox ({error}): pip install "
            "'salve[robustness]'."
        ) from error
    return PyTorchClassifier, ProjectedGradientDescentPyTorch
