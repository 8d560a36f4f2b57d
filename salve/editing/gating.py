# SPDX-License-Identifier: MIT
"""The permanent edit as arithmetic (docs/method.md, Flovik 2025): a gate on the activation's channels.

Scaling input channel ``j`` of every reader by ``s_j`` equals gating the activation by ``s_j`` (Law 1).
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from salve.backbones.tail import LinearTail
from salve.edit_settings import Channels, Mode, Scale
from salve.types import Activations, Contribution, UserError


def contribution(
    decoder: Float[Tensor, "M d"], latent: int, scale: Scale = "unit", channels: Channels = "all", sign: int = 1
) -> Contribution:
    """The contribution vector ``c`` of a latent.

    Args:
        decoder: ``[M, d]`` with unit-norm columns.
        latent: its index ``l``.
        scale: ``unit`` keeps ``c = D[:, l]``; ``max`` divides by ``max_j |c_j|``, so that α = 1 just closes the
            strongest channel.
        channels: ``all`` keeps every channel, as published; ``aligned`` keeps only channels where ``c_j`` has the sign
            of the latent for the class, which makes sense only if activations are not negative.
        sign: +1 or −1, the sign of the latent's mean over the class; for ``aligned``.

    Returns:
        ``[M]``.

    Raises:
        UserError: there is no such latent.
    """
    if not 0 <= latent < decoder.shape[1]:
        raise UserError(f"Latent {latent} does not exist; this SAE has latents 0 to {decoder.shape[1] - 1}.")
    column = decoder[:, latent]
    if channels == "aligned":
        column = (sign * column).clamp_min(0)
    if scale == "max" and (strongest := column.abs().max()) > 0:
        column = column / strongest
    return column


def gates(
    contributions: Contribution | Float[Tensor, "S M"], alphas: Float[Tensor, " K"], mode: Mode = "suppress"
) -> Float[Tensor, "K M"]:
    """The gate at each of several strengths.

    ``suppress``: ``s_j = max(0, 1 − α |c_j|)``; ``enhance``: ``s_j = 1 + α |c_j|``. The gate of a set of latents is the
    product of their gates.

    Args:
        contributions: ``[M]``, or ``[S, M]`` for a set of latents edited together.
        alphas: ``[K]`` strengths ≥ 0; +inf closes every channel with ``c_j ≠ 0``, and is not allowed for ``enhance``.
        mode: ``suppress`` or ``enhance``.

    Returns:
        ``[K, M]``, in the dtype of the contributions.

    Raises:
        UserError: a negative or NaN strength, an unknown mode, or an infinite strength for ``enhance``.
    """
    _check(alphas, mode)
    push = _push(contributions.reshape(-1, contributions.shape[-1]), alphas)  # [S, K, M]
    each = (1 - push).clamp_min(0) if mode == "suppress" else 1 + push
    return each.prod(dim=0)


def _check(alphas: Tensor, mode: str) -> None:
    if mode not in ("suppress", "enhance"):
        raise UserError(f"mode={mode} is unknown; choose suppress or enhance.")
    if bool((alphas < 0).any() | alphas.isnan().any()):
        raise UserError("A strength α must not be negative or NaN.")
    if mode == "enhance" and bool(alphas.isinf().any()):
        raise UserError("A strength α may be infinite only for mode=suppress, not for enhance.")


def check_finite(logits: Tensor, alpha: Tensor) -> None:
    """Refuse logits that overflow: enhancing may make them larger than their dtype can hold."""
    if not bool(logits.isfinite().all()):
        raise UserError(
            f"Enhanced at α = {float(alpha):g}, the logits are larger than {str(logits.dtype).removeprefix('torch.')} "
            "can hold; choose smaller strengths in edit.alpha."
        )


def _push(contributions: Float[Tensor, "S M"], alphas: Float[Tensor, " K"]) -> Float[Tensor, "S K M"]:
    """``α |c_j|``, with 0 · inf = 0: a channel with ``c_j = 0`` stays open at every strength."""
    size = contributions.abs()[:, None]
    return torch.where(size > 0, alphas.to(size.dtype)[None, :, None] * size, torch.zeros_like(size))


def gate(contribution: Contribution | Float[Tensor, "S M"], alpha: float, mode: Mode = "suppress") -> Contribution:
    """The gate ``s`` ``[M]`` of a latent, or of a set of latents, at one strength; see :func:`gates`."""
    return gates(contribution, torch.tensor([alpha], dtype=contribution.dtype, device=contribution.device), mode)[0]


def edited_logits(
    tail: LinearTail,
    activations: Activations,
    contribution: Contribution | Float[Tensor, "S M"],
    alphas: Float[Tensor, " K"] | Sequence[float],
    mode: Mode = "suppress",
) -> Float[Tensor, "K N C"]:
    """Logits of the edited head at every strength: ``y(α) = (W ⊙ s(α)) a + b``.

    For one latent a logit is ``P − α Q`` with ``P = Σ w_j a_j`` and ``Q = Σ w_j |c_j| a_j`` over the channels that are
    open at α (docs/method.md, Law 2). So all strengths share two matrix products of ``2·N·M·C`` flops: each strength
    adds only the channels that open below the next larger one. ``N·K·C`` numbers are written. For a set of latents the
    gates are not linear in α, which takes ``2·N·M·K·C`` flops.

    Args:
        tail: the linear reader.
        activations: ``[N, M]`` at the site.
        contribution: ``[M]`` of a latent, or ``[S, M]`` of a set (see :func:`gates`).
        alphas: ``[K]`` strengths, in any order.
        mode: ``suppress`` or ``enhance``.

    Returns:
        ``[K, N, C]``, in the dtype of the weights.

    Raises:
        UserError: as :func:`gates`, or enhanced logits overflow.
    """
    weight = tail.weight
    strengths = torch.as_tensor(alphas, dtype=weight.dtype, device=weight.device)
    found = activations.new_empty((len(strengths), len(activations), len(weight)), dtype=weight.dtype)
    for k, logits in logits_by_strength(tail, activations, contribution, strengths, mode):
        found[k] = logits
    return found


def logits_by_strength(
    tail: LinearTail,
    activations: Activations,
    contribution: Contribution | Float[Tensor, "S M"],
    alphas: Float[Tensor, " K"],
    mode: Mode = "suppress",
) -> Iterator[tuple[int, Tensor]]:
    """As :func:`edited_logits`, one strength at a time, to save memory.

    Yields:
        The index of each strength once, in the order that is fastest, and the logits ``[N, C]`` at it.

    Raises:
        UserError: as :func:`edited_logits`.
    """
    _check(alphas, mode)
    weight, bias = tail.weight, tail.bias
    rows = contribution.to(weight.dtype).reshape(-1, weight.shape[1])  # [S, M]
    # The two products below cost as much as two strengths one by one.
    if len(rows) > 1 or len(alphas) <= 2:
        for k, gate_ in enumerate(gates(rows, alphas, mode)):
            logits = torch.addmm(bias, activations, (weight * gate_).T)
            if mode == "enhance":
                check_finite(logits, alphas[k])
            yield k, logits
        return
    both = torch.cat([weight, weight * rows.abs()]).T  # [M, 2C]
    if mode == "enhance":
        level, slope = (activations @ both).split(len(weight), dim=1)  # [N, C]
        level = level + bias
        check_finite(torch.addcmul(level, alphas.max(), slope), alphas.max())  # logits at other strengths lie between
        for k, alpha in enumerate(alphas):
            yield k, torch.addcmul(level, alpha, slope)
        return
    order = rows[0].abs().argsort()  # at every strength, the open channels come first in this order
    activations, both = activations[:, order], both[order]
    counts = (_push(rows, alphas)[0] < 1).sum(dim=1)  # [K], open channels
    # Channels that are open at an infinite strength have c_j = 0, so that Q is zero there.
    finite = torch.where(alphas.isinf(), 0, alphas)
    total, done = torch.cat([bias, torch.zeros_like(bias)]).repeat(len(activations), 1), 0  # [N, 2C]
    for k in counts.argsort().tolist():
        if (count := int(counts[k])) > done:
            total = total.addmm_(activations[:, done:count], both[done:count])
            done = count
        level, slope = total.split(len(weight), dim=1)
        yield k, torch.addcmul(level, finite[k], slope, value=-1)
