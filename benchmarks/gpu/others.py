"""What is measured besides single trainings: an ensemble, and captures."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import capture
import ensemble
import torch
from machine import flops_per_sample
from measure import now
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpu.report import NAN, Line
from gpu.work import Work
from salve.backbones import find_site, load_backbone

MEMBERS = 32


def in_turn(
    work: Work, ways: Mapping[str, Callable[[], float]], what: str
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Run all ways in turn, once to warm up and then once a round; stop after the round in which time runs out.

    Args:
        work: the part's orders.
        ways: each does its work once and returns its rate. what: for messages.

    Returns:
        By way: a rate for each round, bytes of the card at the peak, and why it failed, if so.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    memory, failed = dict.fromkeys(ways, NAN), dict[str, str]()
    for number in range(work.rounds + 1):
        if number > 1 and work.is_late:
            work.cut(f"rounds {number} to {work.rounds} of {what}")
            break
        for name, run in ways.items():
            if name in failed:
                continue
            before = _mark_memory(work.device)
            try:
                rate = run()
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                print(f"{name} failed: {failed[name]}", flush=True)
                continue
            if number:
                rates[name].append(rate)
            if work.device == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() - before
    return rates, memory, failed


def _mark_memory(device: str) -> int:
    """Bytes of the card in use; the peak counts from here."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.memory_allocated())


def train_ensemble(work: Work) -> None:
    """32 SAEs together, against one after the other, as ``salve`` trains them: measured every epoch, in fp32."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sizes: tuple[ensemble.Size, ...] = (ensemble.SIZES[1], ensemble.Size("ViT-B/16", 16_384, 4096, 768, 3072))
    members, epochs = MEMBERS, 4
    if work.quick:
        sizes, members, epochs = (ensemble.Size("toy", 256, 64, 16, 32),), 4, 1
    for size in sizes:
        what = f"{size.name}: {size.width} → {size.dictionary_size}, {size.train} rows, batch {ensemble.BATCH}"
        if work.is_late:
            work.cut(what)
            continue
        print(what, flush=True)
        drawn = ensemble.activations(size)

        def rate(count: int, size: ensemble.Size = size, drawn: dict[str, Tensor] = drawn) -> float:
            """Rows per second of all SAEs."""
            if count == 1:
                took = ensemble.alone(size, drawn, work.device, epochs)
            else:
                took = ensemble.together(size, drawn, work.device, epochs, count)
            return count * size.train * epochs / took.epochs

        ways = {"one after the other": partial(rate, 1), f"{members} together": partial(rate, members)}
        rates, memory, failed = in_turn(work, ways, what)
        for name in ways:
            work.record.add(
                Line(
                    work.part,
                    f"Ensemble of {members} L1 SAEs, {what}, fp32",
                    name,
                    "rows/s, all SAEs",
                    rates[name],
                    memory[name],
                    flops_per_sample(size.width, size.dictionary_size, "l1", 0),
                    reference=name == "one after the other",
                    note=failed.get(name, ""),
                )
            )


def capture_backbones(work: Work) -> None:
    """Activations of ViT-B/16 and ResNet-18 with random weights, from images that are decoded beforehand."""
    backbones: dict[str, tuple[str, str, int, int, int]] = {
        "ViT-B/16": ("timm", "vit_base_patch16_224", 224, 256, 1024),
        "ResNet-18": ("torchvision", "resnet18", 224, 256, 2048),
    }
    if work.quick:
        backbones = {
            "ViT-Ti/16": ("timm", "vit_tiny_patch16_224", 32, 8, 16),
            "ResNet-18": ("torchvision", "resnet18", 32, 8, 16),
        }
    for name, (library, model_name, pixels, batch, count) in backbones.items():
        what = f"{name}, {pixels} px, {count} images, batch {batch}"
        if work.is_late:
            work.cut(what)
            continue
        print(what, flush=True)
        arguments: dict[str, object] = {"img_size": pixels} if library == "timm" else {}
        capture_one(work, load_backbone(library, model_name, "random", 10, arguments).model, what, pixels, batch, count)


def capture_one(work: Work, model: nn.Module, what: str, pixels: int, batch: int, count: int) -> None:
    """One backbone: ``salve``'s capture against bare loops."""
    device = torch.device(work.device)
    plain = model.to(device).eval()
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    site = find_site(plain, "last")
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(batch, dtype=torch.long)
    resident = images.to(device, memory_format=torch.channels_last)
    # On every call the same images, which takes no more memory and computes as much.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
        plain(resident[:1])
    flops = counter.get_total_flops()

    def batches(pixels: Tensor, rows: Sequence[int]) -> Iterable[tuple[Tensor, Tensor]]:
        return ((pixels[: len(part)], labels[: len(part)]) for part in torch.arange(len(rows)).split(batch))

    loaded, on_card = partial(batches, images), partial(batches, resident)

    def rate(run: Callable[[], object], precision: str) -> float:
        """Images per second."""
        start = now()
        with torch.autocast(work.device, torch.bfloat16, enabled=precision == "bf16"):
            run()
        return count / (now() - start)

    channels = torch.channels_last
    runs: dict[str, tuple[str, Callable[[], object]]] = {
        "bare loop, channels last": ("fp32", partial(capture.bare, last, site, count, loaded, device, channels)),
        "bare loop": ("fp32", partial(capture.bare, plain, site, count, loaded, device, torch.preserve_format)),
        "salve, with its shard on disk": ("fp32", partial(capture.captured, last, site, count, loaded, device)),
        "bare loop, images on the card": ("fp32", partial(capture.bare, last, site, count, on_card, device, channels)),
        "… in bf16 (autocast)": ("bf16", partial(capture.bare, last, site, count, on_card, device, channels)),
    }
    ways = {name: partial(rate, run, precision) for name, (precision, run) in runs.items()}
    rates, memory, failed = in_turn(work, ways, what)
    for name, (precision, _) in runs.items():
        work.record.add(
            Line(
                work.part,
                f"Capture, {what}, {flops / 1e9:.2f} GFLOP an image",
                name,
                "images/s",
                rates[name],
                memory[name],
                flops,
                precision=precision,
                reference=name == "bare loop, channels last",
                note=failed.get(name, ""),
            )
        )
