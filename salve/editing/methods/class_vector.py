# SPDX-License-Identifier: MIT
"""Class vectors: how fine-tuning moved a class's mean activation, and the edits that move it back."""

import copy
from dataclasses import dataclass
from functools import partial
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
from salve.editing.fine_tuning import FineTuning, batches_of, between, check_whole, drawn, numbers_of, train_images
from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Affine, Change
from salve.editing.methods.directions import drawing
from salve.types import Images, UserError
from salve.untrusted import some


@dataclass(frozen=True)
class ClassVector(Method):
    """Latent-space injection of ``−α κ``, with the class vector ``κ = z_ft − z_pre``.

    ``z_ft`` is the mean activation of the class's train images, and ``z_pre`` the same in the network before it was
    fine-tuned. An activation is moved only where it looks like the class's:

        a' = a − α 1[cos(a, z_ft) > γ] κ

    The paper does so at the last site; here it is done at any, at every position by itself. No weights can hold the
    condition. Without it (``threshold=null``) every activation is moved, which a bias can hold. Several classes are
    several such steps. :class:`MappedClassVector` is the paper's other form.

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
        return super().settings() | _content(self.before)

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        centres, vectors = _class_vectors(fitting, target, self.before, "class_vector")

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


@dataclass(frozen=True)
class MappedClassVector(Method):
    """Weight-space mapping of ``−κ``: a block in front of the site is trained until it gives what it gave before.

    With the mean ``r`` of the activations of ``references`` images of the class, the loss is ``‖a − (r − κ)‖²``, over
    images of the class alone; all other weights are frozen. An image's activation is its mean over positions, and the
    edit of another strength is ``θ + α (θ_edit − θ)``; the paper trains anew for each, at the last site.

    It costs a forward and a backward pass for ``steps × batch_size`` images, and two passes over the class's.

    Attributes:
        before: file of weights from before fine-tuning. Only what lies in front of the site is read.
        references: train images of the class, at most. steps, batch_size, learning_rate: of Adam.
        block: the module whose parameters are trained, such as ``layer4.1``; empty is the last one with parameters of
            its own in front of the site, as the network lists its modules.
    """

    before: str = ""
    references: int = 16
    steps: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    block: str = ""

    source: ClassVar[str] = "Kim & Do 2025 (arXiv 2510.11268), algorithm 2"
    full_size: ClassVar[str] = "the weights are those after the mapping"
    needs_images: ClassVar[bool] = True
    everywhere = draws = True

    def __post_init__(self) -> None:
        check_whole("references", self.references, 1)
        check_whole("steps", self.steps, 1)
        self._tuning()  # refuses its settings

    def _tuning(self) -> FineTuning:
        return FineTuning(self.batch_size, self.learning_rate)

    def settings(self) -> dict[str, Any]:
        """The settings by name, with the content of the file in the place of its path."""
        return super().settings() | _content(self.before)

    def fit(self, fitting: Fitting, target: Target) -> FittedEdit:
        """See :class:`Method`."""
        _, vectors = _class_vectors(fitting, target, self.before, "mapped_class_vector")
        cut, (images, labels) = fitting.cut, train_images(fitting, "The edit method mapped_class_vector")
        wanted = torch.full((fitting.classes, vectors.shape[1]), torch.nan, dtype=torch.float64)
        for label, vector in zip(target.classes, vectors, strict=True):
            wanted[label] = _centre(fitting, cut, target._replace(classes=(label,)), self.references) - vector
        numbers = drawn([numbers_of(labels, target)], self.steps * self.batch_size, drawing(fitting, target))
        tuning, trained = self._tuning(), self.parameters(cut)
        net = tuning.copy_of(cut)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name in trained)
        batches = batches_of(images, numbers, self.batch_size)
        for _ in tuning.train(net, (partial(_distance, cut, wanted, *batch) for batch in batches)):
            pass
        start = cut.model.state_dict()
        end = {name: one for name, one in net.state_dict().items() if not torch.equal(one, start[name])}

        def at(alpha: float) -> Change:
            return Change(weights=lambda: between(cut, end, alpha))

        return FittedEdit(at)

    def parameters(self, cut: Cut) -> list[str]:
        """Names of the parameters that are trained.

        Raises:
            UserError: the block has none in front of the site.
        """
        before = cut.weights_before()
        names = [name for name, _ in cut.model.named_parameters() if name in before]
        block = self.block or (names[-1].rpartition(".")[0] if names else "")
        found = [name for name in names if name.startswith(f"{block}.")]
        if not found:
            raise UserError(
                f"block={self.block} of mapped_class_vector has no parameters in front of the site {cut.site.name}; "
                f"choose a module there: {some(sorted({name.rpartition('.')[0] for name in names}), 20)}."
            )
        return found


def _distance(
    cut: Cut, wanted: Float[Tensor, "C M"], images: Images, labels: Int[Tensor, " N"], net: torch.nn.Module
) -> Float[Tensor, ""]:
    """``‖a − wanted‖²``, in the mean over images."""
    rows = cut.of(net).read(images).mean(dim=1)
    return (rows - wanted.to(rows)[labels.to(rows.device)]).square().sum(dim=1).mean()


def _class_vectors(
    fitting: Fitting, target: Target, before: str, method: str
) -> tuple[Float[Tensor, "K M"], Float[Tensor, "K M"]]:
    """``z_ft`` and ``κ`` of each of the target's classes, float64."""
    fitting.uses(numbers_of(train_images(fitting, f"The edit method {method}")[1], target))
    former = fitting.cut.of(_former(fitting.cut, before, method))
    one_by_one = [target._replace(classes=(label,)) for label in target.classes]
    centres = torch.stack([_centre(fitting, fitting.cut, one) for one in one_by_one])
    return centres, centres - torch.stack([_centre(fitting, former, one) for one in one_by_one])


def _content(path: str) -> dict[str, Any]:
    """A digest of the file's tensors, in the place of its path."""
    return {"before": digest_of_tensors(read_tensors(path)[0])} if path else {}


def _former(cut: Cut, path: str, method: str) -> torch.nn.Module:
    """A copy of the network, with the weights of a file in front of the site.

    Raises:
        UserError: no file is named, or it lacks a tensor, or has one of another shape.
    """
    if not path:
        raise UserError(f"The edit method {method} needs before=FILE, the weights from before fine-tuning.")
    model = copy.deepcopy(cut.model)
    state, _ = adapted(read_checkpoint(path)[0], model, head_site(model).readers[0].path)
    own, wanted = model.state_dict(), sorted(cut.weights_before())
    if unlike := [name for name in wanted if name not in state or state[name].shape != own[name].shape]:
        raise UserError(
            f"{path} does not hold the network before fine-tuning: it lacks {some(unlike, 3)} of its shape."
        )
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)
    return model


@torch.no_grad()
def _centre(fitting: Fitting, cut: Cut, target: Target, most: int | None = None) -> Float[Tensor, " M"]:
    """The mean activation of the target's (first so many) train images, each position counted alike, float64."""
    assert fitting.images is not None, "the method needs them"
    assert fitting.image_labels is not None
    total, count = torch.zeros(()).double(), 0
    for batch, _ in fitting.images(numbers_of(fitting.image_labels, target)[:most].tolist()):
        rows = cut.read(batch).flatten(0, 1)
        total, count = total + rows.double().sum(dim=0).cpu(), count + len(rows)
    return total / count
