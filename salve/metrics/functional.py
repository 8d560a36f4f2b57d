# SPDX-License-Identifier: MIT
"""The measures as pure functions of tensors; dtypes are kept."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from salve.types import Activations, Labels, Latents, Logits

#: Shares of images below which a latent that fires is almost dead, and above which it is dense.
ALMOST_DEAD, DENSE = 1e-3, 0.5


def fraction_of_variance_explained(x: Activations, x_hat: Activations) -> Float[Tensor, ""]:
    """FVE: ``1 − Σ (x − x̂)² / Σ (x − x̄)²`` with the mean ``x̄`` taken per dimension.

    Args:
        x: ``[N, M]`` activations. x_hat: ``[N, M]`` their reconstructions.

    Returns:
        Scalar; 1 when perfect, 0 for the per-dimension mean, below 0 for worse. Activations without any variance
        give 1 when reconstructed perfectly and 0 otherwise, as in scikit-learn's variance-weighted ``r2_score``.
    """
    residual = (x - x_hat).square().sum()
    variance = (x - x.mean(dim=0, keepdim=True)).square().sum()
    return explained(residual, variance)


def explained(residual: Tensor, variance: Tensor) -> Float[Tensor, ""]:
    """``1 − residual / variance``; without variance 1 for a residual of 0, else 0."""
    flat = (residual == 0).to(residual.dtype)
    return torch.where(variance > 0, 1 - residual / variance.clamp_min(torch.finfo(variance.dtype).tiny), flat)


def reconstruction_cosine(x: Activations, x_hat: Activations) -> Float[Tensor, " N"]:
    """Cosine between each activation and its reconstruction, ``x · x̂ / (‖x‖ ‖x̂‖)``, ``[N]``; 0 where either is zero.

    It ignores length and does not centre: where activations share a large mean, the mean alone has a cosine near 1.
    Read it together with the FVE.
    """
    return F.cosine_similarity(x, x_hat, dim=1)


def firing(latents: Latents, activations: Activations, firing_threshold: float = 0.0) -> Bool[Tensor, "N d"]:
    """Which latents fire for which image: ``|z_l| > firing_threshold · ‖a‖``.

    The decoder's columns have unit norm, so ``|z_l|`` is the length of what latent ``l`` adds to the reconstruction.
    Linear latents are never exactly zero: they fire when this length exceeds a share of the activation's norm.
    """
    return latents.abs() > firing_threshold * activations.norm(dim=1, keepdim=True)


def per_class_accuracy(predictions: Labels, labels: Labels, num_classes: int) -> Float64[Tensor, " C"]:
    """Each class's accuracy ``[C]``; NaN for a class without images.

    In float64, in which 2 of 40 images are the number that 0.05 is; in float32 they are more.
    """
    right = torch.bincount(labels[predictions == labels], minlength=num_classes)
    return right.double() / torch.bincount(labels, minlength=num_classes)


def kl_divergence(original: Logits, edited: Logits) -> Float[Tensor, " N"]:
    """``KL(p_original ‖ p_edited)`` of the predictive distributions, in nats, per image ``[N]``."""
    p, q = original.log_softmax(dim=1), edited.log_softmax(dim=1)
    return (p.exp() * (p - q)).sum(dim=1)


def usage_fractions(
    frequency: Float[Tensor, " d"], almost_dead: float = ALMOST_DEAD, dense: float = DENSE
) -> dict[str, Float[Tensor, ""]]:
    """Shares of latents that never, hardly ever or very often fire; the three do not overlap.

    Args:
        frequency: ``[d]``, the share of images for which each latent fires; NaN if there were no images.
        almost_dead: a latent that fires for a smaller share of images is almost dead. Default: 1 in 1000.
        dense: a latent that fires for a larger share is dense. Default: half of the images, well above the share of one
            class in a small data set.

    Returns:
        ``dead_fraction`` (never fired), ``almost_dead_fraction`` and ``dense_fraction``; NaN without images.
    """
    fractions = {
        "dead_fraction": frequency == 0,
        "almost_dead_fraction": (frequency > 0) & (frequency < almost_dead),
        "dense_fraction": frequency > dense,
    }
    unknown = frequency.isnan()
    return {
        name: torch.where(unknown, torch.nan, which.to(frequency.dtype)).mean() for name, which in fractions.items()
    }


def relative_magnitude_histogram(
    latents: Latents, activations: Activations, edges: Float[Tensor, " E"], firing_threshold: float = 0.0
) -> Int[Tensor, "d E+1"]:
    """Histogram of each latent's size where it fires, ``|z_l| / ‖a‖``.

    It is relative to the activation, so that the same edges suit every backbone.

    Args:
        latents: ``[N, d]``. activations: ``[N, M]``. edges: ``[E]``, increasing; a value on an edge counts above it.
        firing_threshold: see :func:`firing`.

    Returns:
        ``[d, E + 1]`` int64: below the first edge, between each edge and the next, and from the last edge on. A row
        sums to the number of images for which the latent fires.
    """
    image, latent = firing(latents, activations, firing_threshold).nonzero(as_tuple=True)
    size = latents[image, latent].to(edges.dtype).abs() / activations.to(edges.dtype).norm(dim=1)[image]
    bins = len(edges) + 1
    index = latent * bins + torch.bucketize(size, edges, right=True)
    return torch.bincount(index, minlength=latents.shape[1] * bins).reshape(latents.shape[1], bins)


def recovered_share(
    value: Float[Tensor, "*s"], original: Float[Tensor, "*s"], ablated: Float[Tensor, "*s"]
) -> Float[Tensor, "*s"]:
    """``(value − ablated) / (original − ablated)``: the share of an ablation's loss that is recovered.

    Returns:
        1 is as good as the original, 0 as bad as the ablation; below 0 is worse than it, above 1 better than the
        original. NaN where the ablation loses nothing. Where it loses little the share is unstable: report original
        and ablated beside it.
    """
    cost = original - ablated
    return torch.where(cost == 0, torch.nan, (value - ablated) / cost)


def downstream_totals(
    labels: Labels, original: Logits, reconstructed: Logits, zero: Float[Tensor, "#N C"], mean: Float[Tensor, "#N C"]
) -> tuple[Float[Tensor, "4"], Float[Tensor, "3"]]:
    """The sums over images behind :func:`downstream`, in float64; they add up over batches and ranks.

    Returns:
        Number of correctly classified images ``[4]`` (original, reconstructed, zero, mean), and the summed KL from the
        original's predictive distribution ``[3]`` (reconstructed, zero, mean).
    """
    original = original.double()
    others = [logits.double().expand_as(original) for logits in (reconstructed, zero, mean)]
    right = torch.stack([(logits.argmax(dim=1) == labels).double().sum() for logits in (original, *others)])
    return right, torch.stack([kl_divergence(original, logits).sum() for logits in others])


def downstream_measures(
    count: Float[Tensor, ""], right: Float[Tensor, "4"], kl: Float[Tensor, "3"]
) -> dict[str, Float[Tensor, ""]]:
    """The result of :func:`downstream` from the sums of :func:`downstream_totals` over ``count`` images."""
    original, accuracy, zero, mean = (right / count).unbind()
    kl_reconstructed, kl_zero, kl_mean = (kl / count).unbind()
    nothing_lost = torch.zeros_like(kl_zero)
    return {
        "original_accuracy": original,
        "downstream_accuracy": accuracy,
        "zero_accuracy": zero,
        "mean_accuracy": mean,
        "accuracy_recovered_from_zero": recovered_share(accuracy, original, zero),
        "accuracy_recovered_from_mean": recovered_share(accuracy, original, mean),
        "downstream_kl": kl_reconstructed,
        "zero_kl": kl_zero,
        "mean_kl": kl_mean,
        "kl_recovered_from_zero": recovered_share(kl_reconstructed, nothing_lost, kl_zero),
        "kl_recovered_from_mean": recovered_share(kl_reconstructed, nothing_lost, kl_mean),
    }


def downstream(
    labels: Labels, original: Logits, reconstructed: Logits, zero: Float[Tensor, "#N C"], mean: Float[Tensor, "#N C"]
) -> dict[str, Float[Tensor, ""]]:
    """What a classifier loses when its head reads reconstructions, on a scale between two ablations.

    Zero-ablation feeds zeros to the head, mean-ablation the mean activation of the train split for every image. The
    second is stricter, since it knows the class prior.

    Args:
        labels: ``[N]``.
        original: ``[N, C]``, logits of the untouched classifier. reconstructed: ``[N, C]``, its logits when fed ``â``.
        zero, mean: ``[N, C]``, logits of the ablations, or ``[1, C]`` if they are the same for all images.

    Returns:
        Accuracies [fraction] ``original_``, ``downstream_`` (fed ``â``), ``zero_`` and ``mean_accuracy``; mean KL from
        the original's predictive distribution [nats] ``downstream_``, ``zero_`` and ``mean_kl``; and the recovered
        shares ``accuracy_recovered_from_zero``, ``accuracy_recovered_from_mean``, ``kl_recovered_from_zero`` and
        ``kl_recovered_from_mean`` (see :func:`recovered_share`; the original's KL from itself is 0).
    """
    right, kl = downstream_totals(labels, original, reconstructed, zero, mean)
    return downstream_measures(torch.tensor(float(len(labels)), dtype=kl.dtype, device=kl.device), right, kl)
