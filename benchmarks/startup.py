"""CPU seconds of commands that end before any work: ``--help``, and settings that are refused.

Usage: python benchmarks/startup.py [--times N]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

COMMANDS = {
    "salve --help": ("salve.cli", "--help"),
    "salve sae.foo=1": ("salve.cli", "sae.foo=1"),
    "salve sae=foo": ("salve.cli", "sae=foo"),
    "salve sae.sparsity=-1": ("salve.cli", "sae.sparsity=-1"),
    "salve-edit --help": ("salve.editing.cli", "--help"),
    "salve-edit apply": ("salve.editing.cli", "apply", "no.json", "no.pt", "out.safetensors"),
    "salve-sweep --help": ("salve.sweep.cli", "--help"),
}


def cpu_seconds(module: str, *arguments: str) -> float:
    """User and system seconds of one process."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.times()
        subprocess.run([sys.executable, "-m", module, *arguments], cwd=folder, capture_output=True, check=False)
        after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    """Print the least of several times for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=3, help="processes started for each command")
    times = parser.parse_args().times
    begun = time.strftime("%Y-%m-%d")
    print(f"{begun}, Python {sys.version.split()[0]}, least of {times}")
    for name, (module, *arguments) in COMMANDS.items():
        print(f"{name:24} {min(cpu_seconds(module, *arguments) for _ in range(times)):5.2f} s")


if __name__ == "__main__":
    main()
