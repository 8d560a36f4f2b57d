"""Rivals of the gate (docs/method.md): steering, directional ablation, and a rank-one edit of the head.

Behind a linear reader each of them moves every logit along a straight line, ``y(s) = y − s v``, so that all strengths
share one product with the activations. Their strengths have different units: compare the methods at the same effect.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from salve.backbones.tail import LinearTail
from salve.features import class_means
from salve.types import Activations, Contribution, Labels, UserError


def steered_logits(
    tail: LinearTail,
    activations: Activations,
    direction: Contribution,
    strengths: Float[Tensor, " K"] | Sequence[float],
) -> Float[Tensor, "K N C"]:
    """Logits under steering at inference time, ``a' = a − s u`` (activation addition, Turner et al. 2023).

    Behind a linear reader ``W a' + b = W a + (b − s W u)``: steering only changes the bias, and shifts the logits of
    every image equally. Only behind a nonlinear reader is it more than that.

    Args:
        tail: the linear reader.
        activations: ``[N, M]`` at the site.
        direction: ``u`` ``[M]``. To suppress a class it is ``sign · c``, with the decoder column ``c`` of its latent
            (steering with an SAE's decoder: Flovik 2025) and the sign of the latent for the class.
        strengths: ``[K]``, finite, in the unit of the activations if ``u`` has unit norm; negative ones steer the
            opposite way.

    Returns:
        ``[K, N, C]``, in the dtype of the weights; at strength 0 exactly the original logits.

    Raises:
        UserError: a strength is not finite.
    """
    return _lines(tail(activations), tail.weight @ direction.to(tail.weight.dtype), strengths)


def ablated_logits(
    tail: LinearTail,
    activations: Activations,
    direction: Contribution,
    strengths: Float[Tensor, " K"] | Sequence[float],
) -> Float[Tensor, "K N C"]:
    """Logits under directional ablation, ``a' = a − t u (uᵀ a)`` with ``u`` at unit norm (Arditi et al. 2024).

    It removes each image's own component along the direction: at ``t = 1``, ``u`` is projected out. It equals the
    permanent edit ``W' = W (I − t u uᵀ)``.

    Args:
        tail, activations: see :func:`steered_logits`.
        direction: ``[M]`` of any length and sign; a zero direction removes nothing.
        strengths: ``t`` ``[K]``, finite, without unit; above 1 the component changes sign, below 0 it grows.

    Returns:
        ``[K, N, C]``, in the dtype of the weights; at strength 0 exactly the original logits.

    Raises:
        UserError: a strength is not finite.
    """
    unit = F.normalize(direction.to(tail.weight.dtype), dim=0)
    return _lines(tail(activations), torch.outer(activations @ unit, tail.weight @ unit), strengths)


def rank_one_rows(
    activations: Activations, labels: Labels, num_classes: int, ridge: float = 1e-4
) -> Float[Tensor, "C M"]:
    """The row ``r_k`` of each class's rank-one edit of the head, ``W'(s) = W − s e_k r_kᵀ`` (ROME, Meng et al. 2022).

    ROME treats the reader as a memory of keys and values, and stores one new pair ``(k*, v*)``. Here ``k*`` is the
    class's mean activation, and ``v*`` are the logits there, with the class's own logit lowered by ``s``. Of all ``W'``
    that store the pair, the edit is the one that changes the outputs least,

        minimise E‖(W' − W) a‖² + ρ ‖W' − W‖²  subject to  W' k* = v*.

    Its solution is ``W' = W + (v* − W k*) (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*)``, with the second moment ``C = E[a aᵀ] + ρ I``. For
    this ``v*`` only the class's row changes, by ``−s r`` with ``r = C⁻¹ k* / (k*ᵀ C⁻¹ k*)``, so that ``rᵀ k* = 1``.

    Args:
        activations: ``[N, M]`` of the train split, for the keys and the second moment (not centred).
        labels: ``[N]``, each in ``0 … C−1``. num_classes: ``C``.
        ridge: ``ρ`` as a share of the mean diagonal of ``E[a aᵀ]``, the mean square of a channel; without unit. It
            keeps the problem well posed if there are more channels than images, or channels that never fire.

    Returns:
        ``[C, M]``, computed in float64 and returned in the dtype of the activations, in 1 / their unit; NaN for a class
        without images, or with a mean activation of zero.

    Raises:
        UserError: the ridge is not positive.
    """
    if not ridge > 0:
        raise UserError(f"ridge={ridge:g} of a rank-one edit must be above 0.")
    rows = activations.double()
    moment = rows.T @ rows / len(rows)  # [M, M]
    keys = class_means(rows, labels, num_classes)  # [C, M]
    moment.diagonal().add_(ridge * moment.diagonal().mean())
    known = keys.abs().sum(dim=1) > 0  # False for NaN, too
    found = torch.full_like(keys, torch.nan)
    if bool(known.any()):
        solved = torch.cholesky_solve(keys[known].T, torch.linalg.cholesky(moment)).T
        found[known] = solved / (solved * keys[known]).sum(dim=1, keepdim=True)
    return found.to(activations.dtype)


def rank_one_weight(
    weight: Float[Tensor, "C M"], row: Contribution, target: int, strength: float
) -> Float[Tensor, "C M"]:
    """The edited head ``W' = W − s e_k rᵀ`` ``[C, M]``, a new tensor.

    Args:
        weight: ``[C, M]``. row: ``r`` ``[M]``, see :func:`rank_one_rows`. target: the class ``k``.
        strength: ``s`` in logits: how much the class's logit falls at its mean activation.
    """
    edited = weight.clone()
    edited[target] -= strength * row.to(weight.dtype)
    return edited


def rank_one_logits(
    tail: LinearTail,
    activations: Activations,
    row: Contribution,
    target: int,
    strengths: Float[Tensor, " K"] | Sequence[float],
) -> Float[Tensor, "K N C"]:
    """Logits of the head under the rank-one edit at every strength: ``y_k − s (rᵀ a)``; the others do not change.

    Args:
        tail, activations: see :func:`steered_logits`. row, target: see :func:`rank_one_weight`.
        strengths: ``[K]``, finite, in logits.

    Returns:
        ``[K, N, C]``, in the dtype of the weights; at strength 0 exactly the original logits.

    Raises:
        UserError: a strength is not finite.
    """
    level = tail(activations)
    slope = torch.zeros_like(level)
    slope[:, target] = activations @ row.to(level.dtype)
    return _lines(level, slope, strengths)


def _lines(
    level: Float[Tensor, "N C"], slope: Float[Tensor, "*N C"], strengths: Float[Tensor, " K"] | Sequence[float]
) -> Float[Tensor, "K N C"]:
    """``y − s v`` for every ``s``; a slope ``[C]`` applies to every image."""
    given = torch.as_tensor(strengths, dtype=level.dtype, device=level.device)
    if not bool(given.isfinite().all()):
        raise UserError("The strengths of steering, ablation or a rank-one edit must be finite.")
    return torch.addcmul(level, given[:, None, None], slope, value=-1)
