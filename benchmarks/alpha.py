"""Strengths α: a whole sweep, and the exact critical strength, against running the edited head again and again.

    python benchmarks/alpha.py [--quick] [--rounds 5]

On drawn activations of the size of ResNet-18 on Imagenette's val folder, and with more channels and classes. On the
CPU, where the stages compute them.

**Sweep**: accuracy and KL of every class at ``K`` strengths. Three ways: ``edit_curves`` (stage ``control`` computes
the accuracies alone, by ``edit_accuracies``); an edited head for each α on the same cached activations; and the whole
edited ResNet-18 for each α on images. The last is timed on a few images at one α and scaled up; the table marks it.

- Limit: ``4 N M C`` flops at the matmul peak, and ``4 N K C`` bytes of logits written once and read once.
- Grows as ``N`` and ``C``; in ``M`` and ``K`` as ``M + const`` and ``K + const``, because there is no product ``M K``.

**Critical strength** of every image, over all its rivals: ``critical_strength`` (exact), against two ways that run
the head. A scan over ``K`` strengths gives the next strength of the grid. Bisection then searches the step of the scan
to 1e-6, for all images at once. All compute in float64. A scan may step over a class that is lost and comes back. Then
the exact value is below what bisection finds, and the head, run a little above the exact value, confirms it.

- Limit: ``6 N M C`` flops at the float64 matmul peak, and three tables of ``8 N C √M`` bytes, written and read once.
- Grows as ``N`` and ``C``, and between ``√M`` and ``M``. Bisection grows as ``N M C`` times its steps.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from measure import copy_bandwidth, growth, interleaved, machine, matmul_peak, table
from rich.console import Console
from torch import Tensor
from torchvision.models import resnet18

from salve.backbones.tail import LinearTail
from salve.diagnosis import critical_strength
from salve.editing import gate
from salve.editing.curves import edit_curves
from salve.metrics import kl_divergence, per_class_accuracy

SIZES = {"ResNet-18, Imagenette": (3925, 512, 10), "more channels and classes": (2048, 2048, 200)}
QUICK = {"small": (512, 128, 10)}
STRENGTHS = 63  # as many as in conf/edit/default.yaml
IMAGES, PIXELS = 32, 160
TOLERANCE = 1e-6


class Case(NamedTuple):
    """A head, activations ``[N, M]`` with the labels that it gives them, and a latent's contribution."""

    tail: LinearTail
    activations: Tensor
    labels: Tensor
    contribution: Tensor


def draw(images: int, width: int, classes: int) -> Case:
    """Draw activations as behind a ReLU, with a direction for each class; the latent's is mostly that of class 0."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(classes, width, generator=generator)
    noise = torch.randn(images, width, generator=generator)
    activations = (directions[torch.arange(images) % classes] + 0.5 * noise).relu()
    weight = (directions + 0.5 * torch.randn(classes, width, generator=generator)) / width**0.5
    bias = 0.1 * torch.randn(classes, generator=generator)
    contribution = directions[0] + 0.2 * torch.randn(width, generator=generator)
    labels = (activations @ weight.T + bias).argmax(dim=1)
    return Case(LinearTail(weight, bias), activations, labels, contribution / contribution.norm())


def grid(case: Case) -> Tensor:
    """Strengths from 0 to where 19 channels of 20 are closed; most images lose their class on the way."""
    size = case.contribution.abs().double()
    return torch.linspace(0, float(1 / size.quantile(0.05)), STRENGTHS, dtype=torch.float64)


def loop_over_heads(case: Case, alphas: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what :func:`edit_curves` returns with one edited head after the other."""
    classes = len(case.tail)
    original = case.tail(case.activations)
    count = torch.bincount(case.labels, minlength=classes)
    accuracy, drift = [], []
    for alpha in alphas.tolist():
        logits = case.activations @ (case.tail.weight * gate(case.contribution, alpha)).T + case.tail.bias
        accuracy.append(per_class_accuracy(logits.argmax(dim=1), case.labels, classes))
        spread = kl_divergence(original, logits).double()
        drift.append(torch.zeros(classes, dtype=torch.float64).index_add_(0, case.labels, spread) / count)
    return torch.stack(accuracy).double(), torch.stack(drift)


@torch.inference_mode()
def whole_classifier(images: Tensor, model: torch.nn.Module) -> Tensor:
    """Run one edited network on a few images; the time does not depend on α."""
    return model(images)


def margins(case: Case, alphas: Tensor) -> Tensor:
    """How far each image's class is above its best rival at a strength of its own ``[N]``."""
    size = case.contribution.double().abs()
    gated = case.activations.double() * (1 - alphas[:, None] * size).clamp_min(0)
    logits = LinearTail(case.tail.weight.double(), case.tail.bias.double())(gated)
    own = logits.gather(1, case.labels[:, None])[:, 0]
    return own - logits.scatter(1, case.labels[:, None], -torch.inf).amax(dim=1)


def scan(case: Case, alphas: Tensor) -> Tensor:
    """The first strength of the grid at which each image's class is lost ``[N]``, else +inf."""
    found = torch.full((len(case.labels),), torch.inf, dtype=torch.float64)
    for alpha in alphas.flip(0):
        found[margins(case, alpha.expand(len(found))) <= 0] = alpha
    return found


def bisect(case: Case, alphas: Tensor) -> Tensor:
    """Scan, then bisect inside the step; every halving runs the head for all images."""
    high = scan(case, alphas)
    never = high.isinf()
    high = high.where(~never, alphas[-1])
    low = (high - alphas[1]).clamp_min(0)
    while bool((high - low).max() > TOLERANCE):
        middle = (low + high) / 2
        lost = margins(case, middle) <= 0
        low, high = torch.where(lost, low, middle), torch.where(lost, middle, high)
    return torch.where(never, torch.inf, high)


def exact(case: Case) -> Tensor:
    """``salve``'s exact critical strengths."""
    return critical_strength(case.tail, case.activations.double(), case.contribution, case.labels)


def sweep(console: Console, name: str, case: Case, rounds: int) -> None:
    """Time the sweep of one size, and print it."""
    alphas = grid(case).float()
    (images, width), classes, count = case.activations.shape, len(case.tail), len(alphas)
    model = resnet18(num_classes=classes).eval().to(memory_format=torch.channels_last)
    pixels = torch.randn(IMAGES, 3, PIXELS, PIXELS).to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], object]] = {
        "salve, edit_curves": partial(edit_curves, *case, alphas),
        "an edited head for each α": partial(loop_over_heads, case, alphas),
        "whole network": partial(whole_classifier, pixels, model),
    }
    seconds = interleaved(ways, rounds)
    extrapolated = f"whole ResNet-18 for each α (from {IMAGES} images, one α)"
    seconds[extrapolated] = seconds.pop("whole network") * images / IMAGES * count
    ours, theirs = edit_curves(*case, alphas), loop_over_heads(case, alphas)
    apart = [float((mine - other).abs().nan_to_num().max()) for mine, other in zip(ours, theirs, strict=True)]
    flops, moved = 4 * images * width * classes, 8 * images * count * classes
    limit = flops / matmul_peak("cpu") + moved / copy_bandwidth("cpu")
    shown = table(
        f"sweep, {name}: N={images}, M={width}, C={classes}, K={count}\n{machine('cpu')}",
        ("", "s", "over salve", "of the limit"),
        f"largest difference to the loop: accuracy {apart[0]:.1e}, KL {apart[1]:.1e} nats; "
        f"limit {1000 * limit:.2f} ms: {flops / 1e9:.2f} GFLOP and {moved / 1e6:.0f} MB",
    )
    for way, took in seconds.items():
        ratio = f"{took / seconds['salve, edit_curves']:,.1f} ×"
        shown.add_row(way, f"{took:.4f}", ratio, f"{limit / took:.0%}" if way.startswith("salve") else "")
    console.print(shown)


def critical(console: Console, name: str, case: Case, rounds: int) -> None:
    """Time the critical strengths of one size, and print them."""
    alphas = grid(case)
    (images, width), classes = case.activations.shape, len(case.tail)
    ways: dict[str, Callable[[], object]] = {
        "salve, exact": partial(exact, case),
        f"scan of {len(alphas)} strengths": partial(scan, case, alphas),
        f"scan, and bisection to {TOLERANCE:.0e}": partial(bisect, case, alphas),
    }
    seconds = interleaved(ways, rounds)
    ours, theirs, steps = exact(case), bisect(case, alphas), scan(case, alphas)
    seen = theirs.isfinite()
    same = seen & ((ours - theirs).abs() <= 2 * TOLERANCE)
    earlier = (ours < theirs - 2 * TOLERANCE) & (ours <= alphas[-1])
    lost = margins(case, ours.where(earlier, 0) + 1e-9) <= 0
    beyond = theirs.isinf() & (ours > alphas[-1])
    flops, moved = 6 * images * width * classes, 3 * 2 * 8 * images * classes * width**0.5
    limit = flops / matmul_peak("cpu", torch.float64) + moved / copy_bandwidth("cpu")
    off = float((steps - ours)[seen].abs().median()) if bool(seen.any()) else float("nan")
    shown = table(
        f"critical strength, {name}: N={images}, M={width}, C={classes}, float64\n{machine('cpu')}",
        ("", "s", "over salve", "of the limit"),
        f"of {images} images {int(same.sum())} agree to {2 * TOLERANCE:.0e}, {int(beyond.sum())} give way beyond the "
        f"scan, {int(earlier.sum())} earlier than it saw (the head confirms {int((earlier & lost).sum())}), "
        f"{int((~(same | beyond | earlier)).sum())} otherwise; the grid alone is off by {off:.2f} in the median; "
        f"limit {1000 * limit:.2f} ms: {flops / 1e9:.2f} GFLOP and {moved / 1e6:.0f} MB",
    )
    for way, took in seconds.items():
        share = f"{limit / took:.0%}" if way.startswith("salve") else ""
        shown.add_row(way, f"{took:.4f}", f"{took / seconds['salve, exact']:,.1f} ×", share)
    console.print(shown)


def grow(console: Console, size: tuple[int, int, int], rounds: int) -> None:
    """Print the exponents in N, M and C, from three sizes of each."""
    shown = table(f"seconds ∝ size^p, from {size} at 1, 2 and 4 times", ("in", "sweep", "critical strength", "sizes"))
    for axis, letter in enumerate("NMC"):
        sizes = [size[axis] * factor for factor in (1, 2, 4)]

        def drawn(value: int, axis: int = axis) -> Case:
            return draw(*(value if place == axis else size[place] for place in range(3)))

        def make_sweep(value: int, drawn: Callable[[int], Case] = drawn) -> Callable[[], object]:
            case = drawn(value)
            return partial(edit_curves, *case, grid(case).float())

        def make_critical(value: int, drawn: Callable[[int], Case] = drawn) -> Callable[[], object]:
            return partial(exact, drawn(value))

        exponents = [growth(sizes, make, rounds) for make in (make_sweep, make_critical)]
        shown.add_row(letter, *(f"{exponent:.2f}" for exponent in exponents), ", ".join(map(str, sizes)))
    console.print(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size, one round")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    rounds, console = 1 if given.quick else given.rounds, Console()
    for name, size in (QUICK if given.quick else SIZES).items():
        case = draw(*size)
        sweep(console, name, case, rounds)
        critical(console, name, case, rounds)
    grow(console, (128, 64, 10) if given.quick else (1024, 256, 20), rounds)


if __name__ == "__main__":
    main()
