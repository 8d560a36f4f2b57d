# SPDX-License-Identifier: MIT
"""Choose the device of a run, and give runs that share a machine different GPUs."""

import getpass
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from salve.settings import TrainerSettings
from salve.types import UserError

#: Seconds between two attempts to lease GPUs.
_POLL = 0.5


def accelerator_of(settings: TrainerSettings) -> str:
    """The accelerator of a run: ``cpu`` or ``cuda``.

    Raises:
        UserError: the settings want a GPU, or several, and there are not so many.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if settings.accelerator == "cpu" or (settings.accelerator == "auto" and not found):
        return "cpu"
    if not found:
        raise UserError(f"trainer.accelerator={settings.accelerator}, but torch finds no GPU; use trainer=cpu.")
    if settings.devices > found:
        raise UserError(
            f"trainer.devices={settings.devices}, but each rank sees {found} of its node's GPUs; set trainer.devices "
            f"to at most {found} (SLURM: gpus_per_node in place of gpus_per_task)."
        )
    return "cuda"


@contextmanager
def leased_gpus(settings: TrainerSettings) -> Iterator[list[int] | None]:
    """Lease as many GPUs as a run wants; wait until other runs of this user on this machine leave so many free.

    The operating system ends a lease when its process ends.

    Yields:
        The indices of the GPUs; None on the CPU, and on a machine with one GPU, which all runs share.

    Raises:
        UserError: the machine has too few GPUs.
    """
    if accelerator_of(settings) == "cpu" or torch.cuda.device_count() == 1:
        yield None
        return
    names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    with lease(names, settings.devices, Path(tempfile.gettempdir()) / f"salve-gpus-{getpass.getuser()}") as gpus:
        yield gpus


@contextmanager
def lease(names: Sequence[str], count: int, folder: Path) -> Iterator[list[int]]:
    """Lock ``count`` of several devices; wait until so many are free.

    Args:
        names: of the devices, the same in every process.
        count: at most ``len(names)``.
        folder: of the lock files.

    Yields:
        The indices of the locked devices in ``names``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        with ExitStack() as held:
            taken: list[int] = []
            for index, name in enumerate(names):
                if len(taken) < count:
                    try:
                        held.enter_context(FileLock(folder / f"{name}.lock", timeout=0))
                        taken.append(index)
                    except Timeout:
                        pass
            if len(taken) == count:
                yield taken
                return
        # No lock is held while waiting: two jobs that want two GPUs each could hold one each for ever.
        time.sleep(_POLL)
