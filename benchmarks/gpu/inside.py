"""What one strength costs at a site inside a network, beside a whole forward pass of the same images."""

from collections.abc import Callable
from functools import partial

import timm
import torch
from measure import now
from tails import CASES, flops
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.others import in_turn
from gpu.report import Line
from gpu.work import Work
from salve.backbones import graph_of, sites


@torch.no_grad()
def gate_inside(work: Work) -> None:
    """Logits of images with a site gated, from what is held of them, at three sites of each network of ``tails.py``."""
    images = 4 if work.quick else 64
    cases = CASES
    if work.quick:
        toy: Callable[[], nn.Module] = partial(
            timm.create_model, "resnet10t", num_classes=4, channels=(8, 16, 24, 32), output_stride=8
        )
        cases = {"toy": (toy, 32, ("layer1.0.conv1", "layer4.0.conv2"))}
    for name, (make, size, names) in cases.items():
        model = make().eval().to(work.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = torch.randn(images, 3, size, size).to(work.device, memory_format=torch.channels_last)
        graph, known = graph_of(model, size), sites(model, size)
        chosen = [known[one] for one in names[::2]]
        tails = {site.name: graph.tail(model, site, batch) for site in chosen}
        gates = {site.name: torch.rand(site.width, device=work.device) for site in chosen}
        runs: dict[str, Callable[[], Tensor]] = {"a whole forward pass": partial(model, batch)}
        runs |= {f"tail at {site}": partial(tail.gated, gates[site]) for site, tail in tails.items()}

        def rate(run: Callable[[], Tensor], device: str = work.device) -> float:
            """Images per second."""
            _wait(device)
            start = now()
            for _ in range(5):
                run()
            _wait(device)
            return 5 * images / (now() - start)

        what = f"{name}, {size} px, {images} images"
        rates, memory, failed = in_turn(work, {one: partial(rate, run) for one, run in runs.items()}, what)
        for one, run in runs.items():
            with sdpa_kernel(SDPBackend.MATH):
                each = flops(run) / images
            group, reference = f"Tails, {what}", one.startswith("a whole")
            line = (work.part, group, one, "images/s", rates[one], memory[one], each)
            work.record.add(Line(*line, reference=reference, note=failed.get(one, "")))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
