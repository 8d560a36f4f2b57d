"""What ImageNet, a large dictionary and many sweeps would cost: bytes, operations and hours, from rates.

    python benchmarks/scale.py                                       # docs/scale.md, with the rates of one CPU core
    python benchmarks/scale.py --forward 100 --train 100 --cores 16  # other rates: TFLOP/s of a GPU, cores beside each
    OMP_NUM_THREADS=1 python benchmarks/scale.py --measure FILE      # this machine's core, in two minutes

The operations are those of the stages as they are: the network and the trainings run on the device, and what a finished
SAE is measured by, and what its latents mean, is computed on the host's cores. The benchmark of trainings and that of
captures print rates; `make gpu-check` prints those of a GPU, as rows and images a second: times the operations of one
(`flops_per_sample` in machine.py; 35.1 GFLOP an image of ViT-B/16) they are rates as they are wanted here.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from machine import flops_per_sample

ONE_CORE = Path(__file__).parent / "rates" / "one_core.json"
FLOAT = 4


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        images, held_out: of the train split; of select and test together.
        forward: floating-point operations of the network for one image.
        positions: of the map, prefix tokens included. kept: of each image; 1 and 1 at a vector.
        width: M. size: d. kind: ``l1`` or ``topk``. k: latents that fire.
        steps, batch: of one training. saes: how many; those of a device are trained one after the other.
        host: bytes that ``trainer.memory`` allows. device: bytes of a device's memory.
    """

    images: int = 1_281_167
    held_out: int = 50_000
    forward: float = 35.1e9
    positions: int = 197
    kept: int = 16
    width: int = 768
    size: int = 65_536
    kind: str = "topk"
    k: int = 32
    steps: int = 5_000
    batch: int = 4_096
    saes: int = 3_200
    host: float = 8 * 2**30
    device: float = 80e9

    @property
    def parameters(self) -> int:
        """Of one SAE: encoder, decoder, bias and ``b_dec``."""
        return 2 * self.width * self.size + self.size + self.width

    @property
    def rows(self) -> int:
        """Of all splits."""
        return (self.images + self.held_out) * self.kept

    @property
    def from_disk(self) -> bool:
        """Whether trainings read rows from disk; in memory they are held twice."""
        return 2 * self.rows * self.width * FLOAT > self.host

    def memory(self, precision: int = FLOAT) -> float:
        """Bytes on the device for one SAE in training: float32 parameters, gradients and two moments, and latents.

        Latents ``[B, d]`` with what backward needs of them: pre-activations, latents, and the gradient of either.
        """
        return 4 * FLOAT * self.parameters + 4 * precision * self.batch * self.size


@dataclass(frozen=True)
class Rates:
    """Operations a second.

    Attributes:
        name: what they are of. forward, train: of a device, in the network and in trainings. encode: of a host's core.
    """

    name: str
    forward: float
    train: float
    encode: float


class Cost(NamedTuple):
    """Of one part of the work, for all SAEs.

    Attributes:
        part: its name. device, host: operations there. read, written: bytes of files.
    """

    part: str
    device: float
    host: float
    read: float
    written: float

    def hours(self, rates: Rates, devices: int, cores: int) -> float:
        """With so many devices, and cores beside each."""
        rate = rates.train if self.part == "training" else rates.forward
        return (self.device / rate / devices + self.host / rates.encode / (devices * cores)) / 3600


def costs(plan: Plan) -> list[Cost]:
    """Of a capture and of trainings, as the stages do them."""
    rows, held_out = plan.images * plan.kept, plan.held_out * plan.kept
    row, product = FLOAT * plan.width, 2 * plan.width * plan.size
    seen = plan.steps * plan.batch
    train = seen * flops_per_sample(plan.width, plan.size, plan.kind, plan.k)
    at_a_map = plan.positions > 1
    # A latent of an image needs all its positions, so at a map the network runs again.
    reading = plan.images * plan.forward if at_a_map else 0
    encoded = plan.images * plan.positions
    n = plan.saes
    passed = seen if plan.from_disk else plan.rows
    return [
        Cost("capture", (plan.images + plan.held_out) * plan.forward, 0, 0, plan.rows * row),
        Cost("training", n * train, 0, n * passed * row, n * FLOAT * plan.parameters),
        Cost("measuring", 0, n * product * (rows + 2 * held_out), n * plan.rows * row, 0),
        Cost("reading latents", n * reading, n * product * encoded, 0 if at_a_map else n * rows * row, 0),
    ]


def breaks(plan: Plan) -> Iterator[str]:
    """What fits and what does not, in sentences."""
    together = math.floor(plan.device / plan.memory())
    taken, there = plan.memory() / 1e9, plan.device / 1e9
    yield f"An SAE in training takes {taken:.1f} GB of a device: {together} fit into {there:.0f} GB."
    twice = f"The rows twice are {2 * plan.rows * plan.width * FLOAT / 1e9:,.1f} GB"
    if plan.from_disk:
        yield f"{twice}, more than `trainer.memory`: they are read from disk, and SAEs are trained one by one."
    else:
        yield f"{twice}, and fit into `trainer.memory`: SAEs may be trained together."
    yield f"The files of {plan.saes:,} SAEs are {plan.saes * FLOAT * plan.parameters / 1e12:.2f} TB."


def table(plan: Plan, rates: Rates, devices: tuple[int, ...], cores: int) -> str:
    """A table in Markdown."""
    head = ["part", "device, PFLOP", "host, PFLOP", "read, TB", "written, TB", *(f"hours on {n}" for n in devices)]
    found = costs(plan)
    total = Cost("all", *(sum(getattr(one, name) for one in found) for name in Cost._fields[1:]))
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for one in (*found, total):
        numbers = [one.device / 1e15, one.host / 1e15, one.read / 1e12, one.written / 1e12]
        hours = [sum(part.hours(rates, n, cores) for part in (found if one is total else [one])) for n in devices]
        lines.append(f"| {one.part} | {' | '.join(map(_short, numbers + hours))} |")
    return "\n".join(lines)


def _short(value: float) -> str:
    """Three digits, with thousands apart."""
    if value == 0:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure(plan: Plan) -> Rates:
    """The rates of this machine with the threads that torch has, in CPU seconds, so that other work does not count."""
    import torch
    from maps import seconds_per_image

    from salve.sae import make_sae
    from salve.sae.module import adam_with_schedule
    from salve.sae.objective import step_loss

    batch = 512
    sae = make_sae("topk", plan.width, plan.size, torch.Generator().manual_seed(0), k=plan.k)
    [optimizer], _ = adam_with_schedule(sae.parameters(), 1e-3, 10, 0.0, 0.0)
    rows, seconds = torch.randn(batch, plan.width), []
    for _ in range(3):
        start = time.process_time()
        loss, _output = step_loss(sae, rows, 0.0, None, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sae.normalise_decoder()
        seconds.append(time.process_time() - start)
    sae.eval()
    encoding = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()
            sae.encode(rows)
            encoding.append(time.process_time() - start)
    train = batch * flops_per_sample(plan.width, plan.size, "topk", plan.k) / min(seconds)
    encode = 2 * plan.width * plan.size * batch / min(encoding)
    name = f"one core of {_processor()}, torch {torch.__version__.partition('+')[0]}, batches of {batch}"
    return Rates(name, plan.forward / seconds_per_image(), train, encode)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="FILE", help="write the rates of this machine")
    parser.add_argument("--rates", type=Path, default=ONE_CORE, help="a file that --measure wrote")
    for name in ("forward", "train", "encode"):
        parser.add_argument(f"--{name}", type=float, help="TFLOP/s; the first two of a device, the last of a core")
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--cores", type=int, default=1, help="of the host, for each device")
    parser.add_argument("--kind", choices=["l1", "topk"], default="topk")
    parser.add_argument("--memory", type=float, default=80, help="GB of a device")
    parser.add_argument("--host", type=float, default=8, help="GiB of trainer.memory")
    given = parser.parse_args()
    plan = Plan(kind=given.kind, device=given.memory * 1e9, host=given.host * 2**30)
    if given.measure:
        given.measure.write_text(json.dumps(asdict(measure(plan)), indent=2) + "\n", encoding="utf-8")
        return
    rates = Rates(**json.loads(given.rates.read_text(encoding="utf-8")))
    flags = {name: 1e12 * value for name in ("forward", "train", "encode") if (value := getattr(given, name))}
    rates = replace(rates, **flags, name=rates.name + (f"; {' and '.join(flags)} as given" if flags else ""))
    print(
        f"Rates: {rates.name}. GFLOP/s: {rates.forward / 1e9:,.0f} in the network, {rates.train / 1e9:,.0f} in ", end=""
    )
    print(f"trainings, {rates.encode / 1e9:,.0f} in encoding on a core; {given.cores} core(s) for each device.")
    vector = replace(plan, positions=1, kept=1)
    for title, one in (("A map, 16 positions of each image", plan), ("A vector, as at the last site", vector)):
        print(f"\n{title}:\n\n{table(one, rates, tuple(given.devices), given.cores)}\n")
        for sentence in breaks(one):
            print(f"- {sentence}")


if __name__ == "__main__":
    main()
