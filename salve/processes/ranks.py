# SPDX-License-Identifier: MIT
"""Ranks: several processes that do one training, a leader and its followers.

The leader runs everything: it alone reads settings, runs stages, writes artifacts and logs. For capture, training and
measuring it sends pieces of work (a function and its arguments) to its followers, and all ranks do each piece together
in a process group. Followers are started from outside, by torchrun or as the tasks of a SLURM step, or by the leader.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import distributed

from salve.ending import end_with
from salve.processes.followers import Followers, StartedFollowers, follow
from salve.processes.gpus import accelerator_of
from salve.settings import TrainerSettings
from salve.types import UserError

T = TypeVar("T")

#: Seconds within which all ranks must start.
_MEET = 600
#: Variable in the environment of a leader and of its children: the leader's process id. A child inherits the variables
#: that describe the leader's rank, and must not take itself for that rank.
_TAKEN = "SALVE_RANK_PROCESS"


class Ranks:
    """Do pieces of work on one process or several: ``ranks(work, *args)``.

    Args:
        accelerator: ``cpu`` or ``cuda``.
        local_size: the number of ranks on a node.
        gpus: indices of a node's GPUs that may be used; None for the first ones.
        followers: the other ranks; None if there are none.
    """

    def __init__(
        self, accelerator: str, local_size: int = 1, gpus: list[int] | None = None, followers: Followers | None = None
    ) -> None:
        self.accelerator, self.local_size, self.gpus = accelerator, local_size, gpus
        self._followers = followers

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self._followers is not None

    @property
    def devices(self) -> list[torch.device]:
        """The device of each rank of a node."""
        if self.accelerator == "cpu":
            return [torch.device("cpu")] * self.local_size
        return [
            torch.device(self.accelerator, index) for index in (self.gpus or range(self.local_size))[: self.local_size]
        ]

    def __call__(self, work: Callable[..., T], *args: Any) -> T:
        """Call ``work(*args)`` on every rank at once.

        Args:
            work: a function of a module.
            args: anything that can be pickled; followers get copies.

        Returns:
            The leader's result.

        Raises:
            UserError: raised by ``work``, on any rank.
        """
        if self._followers is None:
            return work(*args)
        return self._followers.lead(self.accelerator, self.local_size, work, args)


@contextmanager
def joined() -> Iterator[bool]:
    """Enter as leader or as follower, if this process is one of several ranks that were started from outside.

    A follower does all its work in here. Wrap everything that a process does in this context; nested ones do nothing.

    Yields:
        True in the leader, and in a process that is no such rank; False in a follower that the leader has dismissed.

    Raises:
        SystemExit: with status 1, in a follower whose leader failed.
        UserError: not all ranks started, or they are not numbered node by node.
    """
    outside = None if _outside.get() else _OutsideRank.found()
    if outside is not None and TorchElasticEnvironment.detect():
        end_with(os.getppid())  # torchrun: it tells its ranks to end, unless it is killed
    if outside is None:
        yield True
    elif outside.rank:
        follow(outside.meet(), outside.rank, outside.size)
        yield False
    else:
        followers = Followers(outside.meet(), outside.size)
        reset = _outside.set((outside, followers))
        os.environ[_TAKEN] = str(os.getpid())
        failed = True
        try:
            yield True
            failed = False
        finally:
            del os.environ[_TAKEN]
            _outside.reset(reset)
            followers.dismiss(failed)


@contextmanager
def gathered(settings: TrainerSettings, gpus: list[int] | None = None) -> Iterator[Ranks]:
    """The ranks of a run. Followers start with the first piece of work, and end with this context.

    Args:
        settings: of the run's trainer.
        gpus: indices of this machine's GPUs that the run may use; None for the first ones.

    Raises:
        UserError: there are no such ranks or GPUs.
    """
    led = _outside.get()
    check_ranks(settings, from_outside=led is not None)
    accelerator = accelerator_of(settings)
    if led is not None:
        outside, followers = led
        if settings.devices != outside.local_size:
            raise UserError(
                f"trainer.devices={settings.devices}, but {outside.local_size} ranks were started on each node; "
                f"set trainer.devices={outside.local_size}."
            )
        yield Ranks(accelerator, settings.devices, followers=followers)
    elif settings.devices == 1:
        yield Ranks(accelerator, gpus=gpus)
    else:
        started = StartedFollowers(settings.devices)
        failed = True
        try:
            yield Ranks(accelerator, settings.devices, gpus, started)
            failed = False
        finally:
            started.dismiss(failed)


def check_ranks(settings: TrainerSettings, from_outside: bool = False) -> None:
    """Refuse settings with which Lightning would start ranks by running the whole command again.

    Args:
        settings: of a run's trainer.
        from_outside: whether torchrun or SLURM starts its ranks.

    Raises:
        UserError: ``trainer.strategy=ddp`` with several devices, and ranks that are not started from outside.
    """
    if settings.strategy == "ddp" and settings.devices > 1 and not from_outside:
        raise UserError(
            "trainer.strategy=ddp would start each rank by running the whole command again, a sweep and all; "
            "use trainer=ddp (strategy ddp_spawn), which starts them for the training alone, or start them with: "
            f"torchrun --nproc-per-node={settings.devices} -m salve.cli …, or cluster=slurm."
        )


@dataclass(frozen=True)
class _OutsideRank:
    """This process among ranks that torchrun or SLURM started.

    Attributes:
        rank, size: its rank, and the number of ranks.
        local_rank, local_size: the same on its node.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @staticmethod
    def found() -> "_OutsideRank | None":
        """What the environment says; None if there is no other rank."""
        env = os.environ
        if env.get(_TAKEN, str(os.getpid())) != str(os.getpid()):
            return None  # a child of a leader
        if TorchElasticEnvironment.detect():
            found = _OutsideRank(*(int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
        elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun, and not in a batch script, which is no task
            size, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
            found = _OutsideRank(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), size // nodes)
        else:
            return None
        return found if found.size > 1 else None

    def meet(self) -> distributed.Store:
        """Wait for all ranks, and return the store that they share.

        Raises:
            UserError: see :func:`joined`.
        """
        if TorchElasticEnvironment.detect():
            store, _, _ = next(iter(distributed.rendezvous("env://")))
            store = distributed.PrefixStore(f"salve/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        else:
            alone = self.size == self.local_size
            nodes = "127.0.0.1" if alone else os.environ["SLURM_STEP_NODELIST"]
            host = os.environ.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes)
            job = int(os.environ["SLURM_JOB_ID"]) + int(os.environ.get("SLURM_STEP_ID", "0"))
            port = int(os.environ.get("MASTER_PORT", 15_000 + job % 10_000))
            store = distributed.TCPStore(
                host, port, is_master=self.rank == 0, timeout=timedelta(seconds=_MEET), wait_for_workers=False
            )
        store.set(f"here/{self.rank}", f"{self.local_rank} {self.local_size}")
        if self.rank == 0:
            try:
                store.wait([f"here/{rank}" for rank in range(self.size)], timedelta(seconds=_MEET))
            except distributed.DistStoreError:
                raise UserError(
                    f"{self.size} ranks were announced, but not all of them started within {_MEET // 60} minutes."
                ) from None
            wanted = [f"{rank % self.local_size} {self.local_size}".encode() for rank in range(self.size)]
            if [store.get(f"here/{rank}") for rank in range(self.size)] != wanted:
                raise UserError(
                    "The ranks must be numbered node by node, equally many on each (SLURM: --distribution=block)."
                )
        return store


#: In a leader whose ranks were started from outside: its own rank, and its followers.
_outside: ContextVar[tuple[_OutsideRank, Followers] | None] = ContextVar("_outside", default=None)
