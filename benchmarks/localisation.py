"""Scores of maps against masks, and imputed pixels, beside quantus: how far apart, and the times.

    python benchmarks/localisation.py [--quick] [--images 64] [--size 160] [--rounds 5]

Maps are smooth noise, so that no two pixels are equal (where pixels are, quantus counts any maximum on the object as a
hit, and takes the first of equal pixels; ``salve`` takes the expected score of choosing at random). Masks are boxes.
quantus 0.6.0 gets an environment of its own, in which everything runs.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environments import environment
from measure import Way, interleaved, machine, table
from rich.console import Console
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SCORES = ("pointing game", "relevance mass", "relevance rank")
#: Shares of pixels that are imputed.
REMOVED = (0.1, 0.5, 0.9)


def drawn(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Maps ``[N, S, S]`` ≥ 0 without equal pixels, and boxes ``[N, S, S]``."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 1, 7, 7, generator=generator)
    maps = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")[:, 0].clamp_min(0)
    maps += 1e-4 * torch.rand(maps.shape, generator=generator)
    masks = torch.zeros(count, size, size, dtype=torch.bool)
    for mask in masks:
        (y0, x0), (height, width) = torch.randint(size // 2, (2, 2), generator=generator).tolist()
        mask[y0 : y0 + height + 1, x0 : x0 + width + 1] = True
    return maps, masks


def ours(maps: Tensor, masks: Tensor) -> dict[str, Way]:
    """By score, what computes it with ``salve``."""
    from salve.saliency import pointing_game, relevance_mass, relevance_rank

    functions = (pointing_game, relevance_mass, relevance_rank)
    return {name: partial(one, maps, masks) for name, one in zip(SCORES, functions, strict=True)}


def theirs(maps: Tensor, masks: Tensor) -> dict[str, Way]:
    """The same with quantus."""
    import quantus

    given: dict[str, Any] = {
        "x_batch": np.zeros((len(maps), 1, *maps.shape[1:])),
        "y_batch": np.zeros(len(maps), dtype=int),
    }
    given |= {"a_batch": maps[:, None].numpy(), "s_batch": masks[:, None].numpy(), "model": None, "device": "cpu"}
    as_they_are = {"abs": False, "normalise": False, "disable_warnings": True}
    metrics = (quantus.PointingGame, quantus.RelevanceMassAccuracy, quantus.RelevanceRankAccuracy)
    return {name: partial(one(**as_they_are), **given) for name, one in zip(SCORES, metrics, strict=True)}


def imputing(size: int, share: float) -> dict[str, Way]:
    """Impute the most salient pixels of an image, without noise, with either library."""
    from quantus.functions.perturb_func import noisy_linear_imputation

    from salve.saliency import imputed

    maps, _ = drawn(1, size)
    image = torch.randn(3, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    removed = maps[0] > maps[0].flatten().quantile(1 - share)
    indices = removed.flatten().nonzero()[:, 0].numpy()
    return {
        "salve": partial(imputed, image, removed, noise=0),
        "quantus": partial(noisy_linear_imputation, image.numpy(), indices, noise=0),
    }


def apart(one: object, other: object) -> float:
    """The largest difference of two results."""
    return float(np.abs(np.asarray(one, dtype=float) - np.asarray(other, dtype=float)).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 images of 32 pixels, one round")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.child:
        python = environment("quantus", ["scikit-image", "cachetools"], alone=["quantus==0.6.0"])
        settings = os.environ | {"PYTHONPATH": str(ROOT)}
        sys.exit(subprocess.run([python, __file__, *sys.argv[1:], "--child"], env=settings).returncode)
    count, size, rounds = (4, 32, 1) if given.quick else (given.images, given.size, given.rounds)
    maps, masks = drawn(count, size)
    mine, other = ours(maps, masks), theirs(maps, masks)
    cases = {f"{name}, {count} maps": {"salve": mine[name], "quantus": other[name]} for name in SCORES}
    cases |= {f"{share:.0%} of the pixels imputed": imputing(size, share) for share in REMOVED}
    found = table(f"{size} pixels", ["", "salve (ms)", "quantus (ms)", "times as fast", "largest difference"])
    for name, ways in cases.items():
        seconds = interleaved(ways, rounds)
        difference = apart(ways["salve"](), ways["quantus"]())
        times = [f"{1000 * seconds[library]:.3g}" for library in ("salve", "quantus")]
        found.add_row(name, *times, f"{seconds['quantus'] / seconds['salve']:.1f}", f"{difference:.1g}")
    console = Console()
    console.print(found, machine("cpu"))


if __name__ == "__main__":
    main()
