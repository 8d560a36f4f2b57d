"""What a check ran on: card, driver, and the versions and places of packages."""

import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Packages that a check's figures depend on.
PACKAGES = (
    *("torch", "torchvision", "triton", "pytorch-lightning", "lightning", "torchmetrics", "timm", "numpy", "scipy"),
    *("pandas", "matplotlib", "safetensors", "hydra-core", "omegaconf", "antlr4-python3-runtime", "jaxtyping"),
    *("beartype", "rich", "pytest", "wandb", "einops", "overcomplete", "dictionary-learning", "eai-sparsify"),
    *("sae-lens", "saev"),
)


class Nominal(NamedTuple):
    """A card's rates by its data sheet: dense bf16 products in FLOP/s, and memory in bytes/s."""

    bf16: float
    bandwidth: float


#: By the card's name as the driver gives it; the first that occurs in it counts.
CARDS = {
    "H200": Nominal(989e12, 4.8e12),
    "H100 PCIe": Nominal(756e12, 2.0e12),
    "H100 NVL": Nominal(835e12, 3.9e12),
    "H100": Nominal(989e12, 3.35e12),
    "A100-SXM4-80GB": Nominal(312e12, 2.04e12),
    "A100": Nominal(312e12, 1.555e12),
    "L40S": Nominal(362e12, 0.864e12),
}


def nominal_of(card: str) -> Nominal | None:
    """The data sheet's rates of a card; None for one that is not in the list."""
    return next((rates for name, rates in CARDS.items() if name in card), None)


def packages(unpacked: Path | None) -> list[dict[str, str]]:
    """Name, version and source of each package; the source is ``carried``, ``this Python`` or ``not there``.

    Args:
        unpacked: the folder of carried packages.
    """
    found = []
    for name in PACKAGES:
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found.append({"name": name, "version": "", "from": "not there"})
            continue
        carried = unpacked is not None and Path(str(package.locate_file(""))).is_relative_to(unpacked)
        found.append({"name": name, "version": package.version, "from": "carried" if carried else "this Python"})
    return found


def card() -> dict[str, str]:
    """Name, driver, memory, clocks and temperature of the first GPU as ``nvidia-smi`` gives them; empty without it."""
    fields = ("name", "driver_version", "memory.total", "clocks.sm", "temperature.gpu", "power.draw")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (part.strip() for part in said.strip().split(",")), strict=False))


def facts(device: str, unpacked: Path | None) -> dict[str, Any]:
    """Everything that the figures depend on.

    Args:
        device: ``cuda`` or ``cpu``. unpacked: the folder of carried packages.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "nvidia-smi": card() if device == "cuda" else {},
        "nominal": nominal._asdict() if (nominal := nominal_of(name)) else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "packages": packages(unpacked),
    }


def show(found: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say all facts, a line each."""
    for name in ("device", "nominal", "cuda", "python", "system"):
        say(f"{name}: {found[name]}")
    for name, value in found["nvidia-smi"].items():
        say(f"{name}: {value}")
    for source in ("this Python", "carried", "not there"):
        which = [f"{it['name']} {it['version']}".strip() for it in found["packages"] if it["from"] == source]
        say(f"packages, {source}: {', '.join(which) or 'none'}")
