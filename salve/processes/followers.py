# SPDX-License-Identifier: MIT
"""Followers: the ranks that help a leader with pieces of work.

The leader and its followers meet in a ``torch.distributed`` store. For each piece of work the leader writes an order
there; all ranks then form a process group, in which the leader sends the function and its arguments.
"""

import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from typing import Any, TypeVar

import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import distributed

from salve.ending import is_told, keep_silent
from salve.types import UserError

T = TypeVar("T")

#: Seconds between two looks for an order.
_POLL = 0.05
#: Seconds that the leader waits for its followers to read that they are dismissed.
_LEAVE = 30


class Followers:
    """The followers of this process, as their leader sees them.

    Args:
        store: reached by all ranks.
        size: the number of ranks, the leader included.
    """

    def __init__(self, store: distributed.Store, size: int) -> None:
        self.size = size
        self._store = store
        self._orders = 0

    def _order(self, what: str) -> int:
        self._orders += 1
        self._store.set(f"order/{self._orders}", what)
        return self._orders

    def lead(self, accelerator: str, local_size: int, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        """Do a piece of work on all ranks.

        Args:
            accelerator: ``cpu`` or ``cuda``.
            local_size: the number of ranks on a node.
            work: a function of a module.
            args: its arguments, which can be pickled.

        Returns:
            The leader's result.

        Raises:
            UserError: raised by ``work``, on any rank.
            RuntimeError: another error on a follower, or a follower that has ended.
        """
        number = self._order(f"{accelerator} {local_size}")
        try:
            return _together(self._store, number, 0, self.size, accelerator, local_size, (work, args))
        except UserError:
            raise
        except Exception as error:
            # The leader's own error may only be that a follower has gone; the follower's says why.
            if self._store.check([f"error/{number}"]):
                kind, _, sentence = self._store.get(f"error/{number}").decode().partition(" ")
                raise (UserError if kind == "UserError" else RuntimeError)(sentence) from error
            if ended := self._ended(within=1):
                raise RuntimeError(f"The process of a rank ended with status {ended[0]}; was it killed?") from error
            raise

    def _ended(self, within: float = 0) -> list[int]:
        """Exit statuses of followers that have ended, after waiting for one for some seconds."""
        return []

    def dismiss(self, failed: bool) -> None:
        """End the followers, with status 1 if the leader failed."""
        self._order("failed" if failed else "done")
        # The store may end with this process, which a follower that has not read its order would take for a crash.
        # The loop polls, because a signal cannot interrupt the store's own waiting. It ends when this process is told
        # to end, since the followers then are told too, and do not answer.
        left, until = [f"left/{rank}" for rank in range(1, self.size)], time.monotonic() + _LEAVE
        with suppress(distributed.DistError):
            while not (is_told() or self._store.check(left)) and time.monotonic() < until:
                time.sleep(_POLL)


class StartedFollowers(Followers):
    """Followers on this machine, which the leader starts with its first piece of work.

    Args:
        size: the number of ranks, the leader included.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._orders = 0
        self._followers: list[Any] = []

    def lead(self, accelerator: str, local_size: int, work: Callable[..., T], args: tuple[Any, ...]) -> T:
        if self._ended():  # killed, for example when memory runs out
            self.dismiss(failed=True)
        if not self._followers:
            self._start()
        return super().lead(accelerator, local_size, work, args)

    def _start(self) -> None:
        store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._store = store
        # Else torch prints a page about the lost connection when a leader is killed.
        quiet = {"TORCH_CPP_LOG_LEVEL": "FATAL", **os.environ}
        before = dict(os.environ)
        os.environ.update(quiet)
        try:
            for rank in range(1, self.size):
                process = get_context("spawn").Process(target=_started, args=(store.port, rank, self.size))
                process.start()
                self._followers.append(process)
        finally:
            for name in quiet.keys() - before.keys():
                del os.environ[name]
        while not store.check([f"here/{rank}" for rank in range(1, self.size)]):
            if ended := self._ended():
                self.dismiss(failed=True)
                raise RuntimeError(f"A rank could not be started: its process ended with status {ended[0]}.")
            time.sleep(_POLL)

    def _ended(self, within: float = 0) -> list[int]:
        ending = wait([process.sentinel for process in self._followers], within)
        ended = [process for process in self._followers if process.sentinel in ending]
        for process in ended:
            process.join()
        return [process.exitcode for process in ended]

    def dismiss(self, failed: bool) -> None:
        if self._followers:
            self._order("failed" if failed else "done")
        for process in self._followers:
            process.join(0 if failed else 30)
            if process.is_alive():  # it waits for a rank that has failed
                process.kill()
                process.join()
        self._followers, self._orders = [], 0


def _started(port: int, rank: int, size: int) -> None:
    """Follow the leader that started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the leader handles it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    store = distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    store.set(f"here/{rank}", "")
    follow(store, rank, size)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def follow(store: distributed.Store, rank: int, size: int) -> None:
    """Do pieces of work until the leader dismisses this rank, silently: the leader prints all messages.

    Raises:
        SystemExit: with status 1 if the leader failed, or is gone.
    """
    keep_silent()
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    warnings.simplefilter("ignore")
    number = 0
    while True:
        number += 1
        try:
            while not store.check([f"order/{number}"]):
                time.sleep(_POLL)
            order = store.get(f"order/{number}").decode()
        except distributed.DistError:  # the leader is gone
            raise SystemExit(1) from None
        if order in ("done", "failed"):
            store.set(f"left/{rank}", "")
        if order == "done":
            return
        if order == "failed":
            raise SystemExit(1)
        accelerator, local_size = order.split()
        try:
            _together(store, number, rank, size, accelerator, int(local_size))
        except Exception as error:
            sentence = str(error) if isinstance(error, UserError) else f"On rank {rank}: {error!r}"
            kind = "UserError" if isinstance(error, UserError) else "Exception"
            store.compare_set(f"error/{number}", "", f"{kind} {sentence}")
            traceback.clear_frames(error.__traceback__)


def _together(
    store: distributed.Store,
    number: int,
    rank: int,
    size: int,
    accelerator: str,
    local_size: int,
    piece: tuple[Callable[..., T], tuple[Any, ...]] | None = None,
) -> T:
    """Do this rank's part of a piece of work, in a process group of all ranks.

    Args:
        store: see :class:`Followers`.
        number: of the piece.
        rank: of this process.
        size: the number of ranks.
        accelerator, local_size: see :meth:`Followers.lead`.
        piece: the function and its arguments on the leader; None on followers, which receive them.
    """
    backend = "nccl" if accelerator == "cuda" else "gloo"
    store = distributed.PrefixStore(f"work/{number}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        with _sharing_cores(local_size):
            box: list[Any] = [piece]
            # NCCL sends tensors on GPUs only.
            objects = distributed.group.WORLD if backend == "gloo" else distributed.new_group(backend="gloo")
            distributed.broadcast_object_list(box, group=objects)  # type: ignore[arg-type]
            work, args = box[0]
            return work(*args)
    finally:
        distributed.destroy_process_group()


@contextmanager
def _sharing_cores(ranks: int) -> Iterator[None]:
    """Give each rank of a node an equal share of its threads, unless OMP_NUM_THREADS is set."""
    threads, given = torch.get_num_threads(), "OMP_NUM_THREADS" in os.environ
    if not given:
        torch.set_num_threads(max(1, threads // ranks))
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # else Lightning sets it, for good
    try:
        yield
    finally:
        if not given:
            del os.environ["OMP_NUM_THREADS"]
            torch.set_num_threads(threads)
