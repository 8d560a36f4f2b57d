"""Class vectors: how fine-tuning moved a class's mean activation, and the edit that moves it back."""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from salve.artifacts import digest_of_tensors
from salve.backbones.adapt import adapted
from salve.backbones.cut import Cut
from salve.backbones.sites import head_site
from salve.backbones.weights import read_checkpoint, read_tensors
from salve.editing.fine_tuning import numbers_of, train_images
from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Affine, Change
from salve.types import UserError
from salve.untrusted import some


@dataclass(frozen=True)
class ClassVector(Method):
    """Latent-space injection of ``−α κ``, with the class vector ``κ = z_ft − z_pre``.

    ``z_ft`` is the mean activation of the class's train images, and ``z_pre`` the same in the network before it was
    fine-tuned. An activation is moved only where it looks like the class's:

        a' = a − α 1[cos(a, z_ft) > γ] κ

    The paper does so at the last site; here it is done at any, at every position by itself. No weights can hold the
    condition. Without it (``threshold=null``) every activation is moved, which a bias can hold. The paper's other form,
    which trains the last block until it gives ``z_ft − κ``, is not here. Several classes are several such steps.

    It costs two passes over the class's train images.

    Attributes:
        before: file of weights from before fine-tuning. Only what lies in front of the site is read.
        threshold: γ; null moves every activation.
    """

    before: str = ""
    threshold: float | None = 0.5

    source: ClassVar[str] = "Kim & Do 2025 (arXiv 2510.11268), algorithm 1"
    full_size: ClassVar[str] = "the class's mean activation is where it was before fine-tuning"
    needs_images: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.threshold is not None and not -1 <= self.threshold < 1:
            raise UserError(f"threshold={self.threshold:g} must be a cosine from -1 to below 1, or null.")

    def settings(self) -> dict[str, Any]:
        """The settings by name, with the content of the file in the place of its path."""
        content = {"before": digest_of_tensors(read_tensors(self.before)[0])} if self.before else {}
        return super().settings() | content

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        fitting.uses(_numbers(fitting, target))
        former = fitting.cut.of(_former(fitting.cut, self.before))
        one_by_one = [target._replace(classes=(label,)) for label in target.classes]
        centres = torch.stack([_centre(fitting, fitting.cut, one) for one in one_by_one])  # [K, M]
        vectors = centres - torch.stack([_centre(fitting, former, one) for one in one_by_one])

        def at(alpha: float) -> Change:
            if self.threshold is None:
                shift = Affine(shift=-alpha * vectors.sum(dim=0))
                return shift.change(fitting.cut.model, fitting.cut.site)
            step = _Gated(alpha, self.threshold, centres, vectors)
            return Change(step, None, "it moves only activations that look like the class's")

        return FittedEdit(at)


@dataclass(frozen=True, eq=False)
class _Gated:
    """``a' = a − α Σ_k 1[cos(a, z_k) > γ] κ_k`` with ``z`` and ``κ`` ``[K, M]``."""

    alpha: float
    threshold: float
    centres: Float[Tensor, "K M"]
    vectors: Float[Tensor, "K M"]

    def __call__(self, activations: Float[Tensor, "*N M"]) -> Float[Tensor, "*N M"]:
        centres, vectors = self.centres.to(activations), self.vectors.to(activations)
        similar = F.normalize(activations, dim=-1) @ F.normalize(centres, dim=-1).T  # [*N, K]
        return activations - self.alpha * (similar > self.threshold).to(activations) @ vectors


def _former(cut: Cut, path: str) -> torch.nn.Module:
    """A copy of the network, with the weights of a file in front of the site.

    Raises:
        UserError: no file is named, or it lacks a tensor, or has one of another shape.
    """
    if not path:
        raise UserError("The edit method class_vector needs before=FILE, the weights from before fine-tuning.")
    model = copy.deepcopy(cut.model)
    state, _ = adapted(read_checkpoint(path)[0], model, head_site(model).readers[0].path)
    own, wanted = model.state_dict(), sorted(cut.weights_before())
    if unlike := [name for name in wanted if name not in state or state[name].shape != own[name].shape]:
        raise UserError(
            f"{path} does not hold the network before fine-tuning: it lacks {some(unlike, 3)} of its shape."
        )
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)
    return model


def _numbers(fitting: Fitting, target: Target) -> Int[Tensor, " n"]:
    """The numbers of the target's train images."""
    return numbers_of(train_images(fitting, "The edit method class_vector")[1], target)


@torch.no_grad()
def _centre(fitting: Fitting, cut: Cut, target: Target) -> Float[Tensor, " M"]:
    """The mean activation of the target's train images, each position counted alike, float64 on the CPU."""
    assert fitting.images is not None, "the method needs them"
    total, count = torch.zeros(()).double(), 0
    for batch, _ in fitting.images(_numbers(fitting, target).tolist()):
        rows = cut.read(batch).flatten(0, 1)
        total, count = total + rows.double().sum(dim=0).cpu(), count + len(rows)
    return total / count
