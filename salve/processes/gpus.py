"""Which device a run computes on, and one GPU for each of the runs that share a machine."""

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

#: Seconds between two looks for free GPUs.
_POLL = 0.5


def accelerator_of(settings: TrainerSettings) -> str:
    """``cpu`` or ``cuda``.

    Raises:
        UserError: a GPU is wanted and there is none, or more are than there are.
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
    """GPUs that no other run of this user on this machine has leased; waits until there are as many as wanted.

    The system gives a lease back when its process ends, however it ends.

    Yields:
        Their indices; None where there is nothing to choose from: on the CPU, and beside a single GPU.

    Raises:
        UserError: there are not so many.
    """
    if accelerator_of(settings) == "cpu" or torch.cuda.device_count() == 1:
        yield None
        return
    names = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    with lease(names, settings.devices, Path(tempfile.gettempdir()) / f"salve-gpus-{getpass.getuser()}") as gpus:
        yield gpus


@contextmanager
def lease(names: Sequence[str], count: int, folder: Path) -> Iterator[list[int]]:
    """Hold the locks of ``count`` of the named things; yields their indices.

    Args:
        names: names that every process gives to the same thing. count: how many, at most ``len(names)``.
        folder: where the locks lie.
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
        # All or none are held while waiting: two jobs that want two GPUs each would otherwise wait for each other.
        time.sleep(_POLL)
