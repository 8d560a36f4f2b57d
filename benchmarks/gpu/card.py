"""The highest rates of the card. Nothing of ``salve`` is imported here, so that they are known whatever else fails."""

import torch
from measure import copy_bandwidth, matmul_peak

from gpu.work import Work


def measure_card(work: Work) -> None:
    """The highest rates of the card in this run: products in fp32 and bf16, and a copy."""
    side, floats = (256, 2**20) if work.quick else (8192, 2**29)
    runs = 3 if work.quick else 30
    matmul_peak(work.device, torch.bfloat16, side, runs)  # brings the clocks up
    peaks = {
        "bf16": matmul_peak(work.device, torch.bfloat16, side, runs),
        "fp32": matmul_peak(work.device, torch.float32, side, runs),
        "bandwidth": copy_bandwidth(work.device, floats, runs),
    }
    print(", ".join(f"{name} {rate / 1e12:.3f} T/s" for name, rate in peaks.items()), flush=True)
    work.record.note(peaks=peaks)
