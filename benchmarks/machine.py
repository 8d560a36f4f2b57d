"""The machine's highest rates, and the operations and bytes that a training needs."""

from functools import partial
from typing import NamedTuple

import torch
from measure import best, copy_bandwidth

#: Bytes that Adam moves for one parameter in float32: it reads parameter, gradient and two moments, and writes three.
ADAM_BYTES = 28


class Machine(NamedTuple):
    """Highest rates for one size and batch: matrix products in FLOP/s, and copying in bytes/s, read and written."""

    fp32: float
    bf16: float
    bandwidth: float

    def peak(self, precision: str) -> float:
        """The rate of matrix products in a precision."""
        return self.bf16 if precision == "bf16" else self.fp32


def flops_per_sample(width: int, dictionary_size: int, kind: str, k: int) -> float:
    """Floating-point operations that a training step needs for each row.

    L1: five products of ``2 M d``: encoder and decoder forward, and backward to the latents and to both matrices.
    TopK: ``2 M d`` for the encoder forward, and ``2 M k`` for each of the other four, which need only the ``k``.
    """
    if kind == "l1":
        return 10 * width * dictionary_size
    return 2 * width * dictionary_size + 8 * width * k


def bytes_per_step(width: int, dictionary_size: int, batch: int, kind: str, precision: str) -> float:
    """The fewest bytes of memory that a training step moves if all that can be fused is fused into its products.

    Every product reads its inputs once and writes its result once:

    - parameters: Adam's 28 bytes, and 4 for the gradient that is written;
    - both matrices in float32: the encoder is read once, the decoder twice (forward, and backward to the latents);
    - unit norm of the decoder's columns: 12 bytes a number (read for the norm, read and written for the division);
    - latents ``[B, d]`` in the precision of the products. L1: written and read forward, read for the decoder's
      gradient, their own gradient written and read. TopK: pre-activations written, and read to choose;
    - rows ``[B, M]``, reconstructions and their gradient: 12 bytes a number.
    """
    matrix = width * dictionary_size
    parameters = 2 * matrix + dictionary_size
    passes = 5 if kind == "l1" else 2
    latents = passes * batch * dictionary_size * (2 if precision == "bf16" else 4)
    return (ADAM_BYTES + 4) * parameters + 12 * matrix + 12 * matrix + latents + 12 * batch * width


def most_samples(machine: Machine, precision: str, flops: float, width: int, dictionary_size: int, batch: int) -> float:
    """Rows per second with products at their peak, and then Adam's bytes at the bandwidth."""
    parameters = 2 * width * dictionary_size + dictionary_size
    adam = ADAM_BYTES * parameters / batch / machine.bandwidth
    return 1 / (flops / machine.peak(precision) + adam)


def measure_machine(width: int, dictionary_size: int, batch: int, device: str, matmul: str) -> Machine:
    """Measure the three products of a training step and a copy; the best of some runs each."""
    torch.set_float32_matmul_precision(matmul)
    shapes = ((batch, width, dictionary_size), (batch, dictionary_size, width), (dictionary_size, batch, width))
    peaks: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        peaks[dtype] = 0.0
        for rows, inner, columns in shapes:
            left = torch.randn(rows, inner, device=device, dtype=dtype)
            right = torch.randn(inner, columns, device=device, dtype=dtype)
            out = torch.empty(rows, columns, device=device, dtype=dtype)
            seconds = best(partial(torch.mm, left, right, out=out))
            peaks[dtype] = max(peaks[dtype], 2 * rows * inner * columns / seconds)
    return Machine(peaks[torch.float32], peaks[torch.bfloat16], copy_bandwidth(device))
