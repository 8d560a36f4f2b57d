"""Several processes for one training: a leader that runs everything, and followers that help it to train and measure.

The leader is the ordinary process. Only it sees settings, stages, artifacts and loggers. It hands pieces of work (a
function and its arguments) to the followers, and all ranks do them together in a process group that lasts as long as
the piece. Followers come from outside (torchrun, tasks of a SLURM step), or the leader starts them itself.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pytorch_lightning.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import distributed

from salve.ending import end_with
from salve.processes.followers import Followers, StartedFollowers, follow
from salve.processes.gpus import accelerator_of
from salve.settings import TrainerSettings
from salve.types import UserError

T = TypeVar("T")

#: Seconds until all ranks must have come up.
_MEET = 600
#: Set in the leader, and so in what it starts: the process that is the rank which the environment describes.
_TAKEN = "SALVE_RANK_PROCESS"


class Ranks:
    """Does pieces of work on one process or several.

    Args:
        team: the ranks; None for this process alone. accelerator: ``cpu`` or ``cuda``. local_size: ranks on a node.
        gpus: indices of a node's GPUs that may be used; None for the first ones.
    """

    def __init__(
        self, accelerator: str, local_size: int = 1, gpus: list[int] | None = None, team: Followers | None = None
    ) -> None:
        self.accelerator, self.local_size, self.gpus = accelerator, local_size, gpus
        self._team = team

    @property
    def several(self) -> bool:
        """Whether there is more than this process."""
        return self._team is not None

    def __call__(self, work: Callable[..., T], *args: Any) -> T:
        """``work(*args)`` on every rank at once, with the leader's result.

        Args:
            work: a function of a module. args: anything that can be pickled; followers get copies.

        Raises:
            UserError: raised by ``work``, on whichever rank.
        """
        return work(*args) if self._team is None else self._team.lead(self.accelerator, self.local_size, work, args)


@contextmanager
def joined() -> Iterator[bool]:
    """True in an ordinary process and in the leader; in a follower, False once the leader has dismissed it.

    Wrap whatever a process does in it: a follower that was started from outside does its part in here. Nested calls
    answer True.

    Raises:
        SystemExit: with status 1, in a follower whose leader failed.
        UserError: ranks were started from outside, but not all came up, or they are not numbered node by node.
    """
    place = None if _outside.get() else _OutsideRank.found()
    if place is not None and TorchElasticEnvironment.detect():
        end_with(os.getppid())  # torchrun's process, which tells its ranks to end unless it is killed
    if place is None:
        yield True
    elif place.rank:
        follow(place.meet(), place.rank, place.size)
        yield False
    else:
        team = Followers(place.meet(), place.size)
        reset = _outside.set((place, team))
        os.environ[_TAKEN] = str(os.getpid())
        failed = True
        try:
            yield True
            failed = False
        finally:
            del os.environ[_TAKEN]
            _outside.reset(reset)
            team.dismiss(failed)


@contextmanager
def gathered(settings: TrainerSettings, gpus: list[int] | None = None) -> Iterator[Ranks]:
    """The ranks that these settings ask for; followers start with the first piece of work and end with the context.

    Args:
        settings: of the run. gpus: which of this machine's GPUs it may use; None for the first ones.

    Raises:
        UserError: there are no such ranks or GPUs.
    """
    outside = _outside.get()
    check_ranks(settings, from_outside=outside is not None)
    accelerator = accelerator_of(settings)
    if outside is not None:
        place, team = outside
        if settings.devices != place.local_size:
            raise UserError(
                f"trainer.devices={settings.devices}, but {place.local_size} ranks were started on each node; "
                f"set trainer.devices={place.local_size}."
            )
        yield Ranks(accelerator, settings.devices, team=team)
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
    """Refuse what would start ranks by running the whole command again; starts nothing.

    Args:
        settings: of a run. from_outside: whether torchrun or SLURM will have started its ranks.

    Raises:
        UserError: ``trainer.strategy=ddp`` with several devices, and nobody starts them.
    """
    if settings.strategy == "ddp" and settings.devices > 1 and not from_outside:
        raise UserError(
            "trainer.strategy=ddp would start each rank by running the whole command again, a sweep and all; "
            "use trainer=ddp (strategy ddp_spawn), which starts them for the training alone, or start them yourself: "
            f"torchrun --nproc-per-node={settings.devices} -m salve.cli …, or cluster=slurm."
        )


@dataclass(frozen=True)
class _OutsideRank:
    """Where in a job that was started from outside this process stands."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @staticmethod
    def found() -> "_OutsideRank | None":
        """From the environment; None if there is no other rank."""
        env = os.environ
        if env.get(_TAKEN, str(os.getpid())) != str(os.getpid()):
            return None  # started by a leader, whose environment this is
        if TorchElasticEnvironment.detect():
            place = _OutsideRank(*(int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
        elif "SLURM_STEP_NUM_TASKS" in env:  # set by srun only: a batch script's own process is no task
            size, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
            place = _OutsideRank(int(env["SLURM_PROCID"]), size, int(env["SLURM_LOCALID"]), size // nodes)
        else:
            return None
        return place if place.size > 1 else None

    def meet(self) -> distributed.Store:
        """The store that all ranks reach.

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
                    f"{self.size} ranks were started, but not all came up within {_MEET // 60} minutes."
                ) from None
            wanted = [f"{rank % self.local_size} {self.local_size}".encode() for rank in range(self.size)]
            if [store.get(f"here/{rank}") for rank in range(self.size)] != wanted:
                raise UserError(
                    "The ranks must be numbered node by node, equally many on each (SLURM: --distribution=block)."
                )
        return store


_outside: ContextVar[tuple[_OutsideRank, Followers] | None] = ContextVar("_outside", default=None)
