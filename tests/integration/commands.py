"""Commands that start at once: forks of one process that has imported what they need.

To import torch and Lightning takes seconds of CPU, and a test that starts a command six times would pay for each. A
fork is what ``python -m salve.cli`` is after its imports: a process with its own session, arguments, environment,
output, children and end. Forks are also the commands that one starts itself, its ranks under torchrun, and its jobs
under joblib and submitit.
"""

import atexit
import gc
import json
import os
import pickle
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn
from uuid import uuid4
from weakref import finalize

import pytest

from tests.composing import base, remember
from tests.drawing import draw_nothing

ROOT = Path(__file__).parents[2]


class Fork:
    """A module that runs; the part of ``subprocess.Popen`` that commands and their tests use.

    Args:
        address: of the server's socket. module, arguments: what ``python -m`` would run.
        streams: file descriptors of stdout and stderr. environment: all its variables.
    """

    def __init__(
        self,
        address: str,
        module: str,
        arguments: Sequence[str],
        streams: tuple[int, int],
        environment: Mapping[str, str],
    ) -> None:
        order = {"module": module, "arguments": list(arguments), "environment": dict(environment)}
        self._link = socket.socket(socket.AF_UNIX)
        self._link.connect(address)
        socket.send_fds(self._link, [json.dumps(order).encode() + b"\n"], streams)
        finalize(self, self._link.close)
        self.pid = int(self._link.recv(20))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The status, negative for a signal, or None while it runs."""
        if self.returncode is None and select.select([self._link], [], [], 0)[0]:
            self.returncode = int(self._link.recv(20))
        return self.returncode

    def wait(self, timeout: float | None = 280) -> int:
        """Wait until it has ended."""
        if self.returncode is None:
            select.select([self._link], [], [], timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


class Command(Fork):
    """A command whose output is kept.

    Args:
        module: what ``python -m`` would run. arguments: of its command line. folder: where its output is written.
        environment: variables to set beside this process's; None unsets one.
    """

    def __init__(
        self, module: str, arguments: list[str], folder: Path, environment: Mapping[str, str | None] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = uuid4().hex
        self._out, self._err = (folder / f".{name}-{kind}" for kind in ("out", "err"))
        variables = {name: value for name, value in {**os.environ, **(environment or {})}.items() if value is not None}
        with self._out.open("a") as out, self._err.open("a") as err:
            super().__init__(server(), module, arguments, (out.fileno(), err.fileno()), variables)

    def communicate(self, timeout: float = 280) -> tuple[str, str]:
        """Wait until it has ended; what it and its children wrote to stdout and stderr."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()


class Rank(Fork):
    """A function in a process of its own, as a spawned follower has its work: pickled.

    It has the part of ``multiprocessing.Process`` that the leader of such a follower uses.

    Args:
        target: a function of a module. args: its arguments, which can be pickled.
    """

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._arguments = [pickle.dumps((target, args)).hex(), str(os.getpid())]

    def start(self) -> None:
        super().__init__(server(), "tests.integration.rank", self._arguments, (1, 2), os.environ)
        self.sentinel = self._link

    def join(self, timeout: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout)

    def is_alive(self) -> bool:
        return self.poll() is None

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    @property
    def exitcode(self) -> int | None:
        return self.poll()


def ranks_are_forks(patch: pytest.MonkeyPatch) -> None:
    """Start the followers of this process, with ``trainer.devices=2``, as forks of the server."""
    patch.setattr("salve.processes.followers.get_context", lambda _: SimpleNamespace(Process=Rank))


#: The address of the server of the process that started this one, if it said so.
shared = ""


def server() -> str:
    """The address of the server for this process and those that it starts to run tests."""
    return shared or _started()


@cache
def _started() -> str:
    """The address of a new server, which ends with this process."""
    folder = tempfile.mkdtemp(prefix="salve-")  # under pytest's it would be too long for a socket
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.commands", address := f"{folder}/orders"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    atexit.register(shutil.rmtree, folder)
    atexit.register(process.communicate)  # which tells it to end
    assert process.stdout is not None
    process.stdout.readline()
    return address


def _serve(address: str) -> tuple[str, list[str]]:
    """Fork for each order that comes to a socket, and answer with the fork's process id and, at its end, its status.

    The first order has it import what forks need.

    Returns:
        Only in a fork: the module that it shall run, and its arguments.
    """
    links: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(100)
        print(flush=True)
        sources: list[Any] = [0, listener]
        if 0 in select.select(sources, [], [])[0]:
            raise SystemExit
        _prepare(address)
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake)
        sources.append(woken)
        while True:
            ready, _, _ = select.select(sources, [], [])
            if 0 in ready:  # it has ended that started this process
                raise SystemExit
            if woken in ready:
                os.read(woken, 1000)
                while links and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    _answer(links[ended[0]], os.waitstatus_to_exitcode(ended[1]))
                    links.pop(ended[0]).close()
            if listener not in ready:
                continue
            link, _ = listener.accept()
            order, streams = _received(link)
            if pid := os.fork():
                links[pid] = link
                _answer(link, pid)
                for stream in streams:
                    os.close(stream)
                continue
            break
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for other in (link, *links.values()):
        other.close()
    os.close(woken)
    os.close(wake)
    os.setsid()
    for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(order["environment"])
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # as a new interpreter does
        if folder and (Path(folder) / "sitecustomize.py").is_file():
            runpy.run_path(str(Path(folder) / "sitecustomize.py"))
    return order["module"], order["arguments"]


def _received(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """An order, and the descriptors of its streams."""
    read, streams, _, _ = socket.recv_fds(link, 2**16, 2)
    while not read.endswith(b"\n"):
        read += link.recv(2**16)
    return json.loads(read), streams


def _answer(link: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # it has ended that gave the order
        link.sendall(str(number).encode())


def _popen(
    address: str,
    args: Sequence[str],
    env: Mapping[str, str] | None = None,
    stdout: Any = None,
    stderr: Any = None,
    **_: Any,
) -> Fork:
    """In place of ``subprocess.Popen``: ``python -m MODULE …`` as a fork of the server."""
    where = args.index("-m")
    assert args[0] == sys.executable
    assert set(args[1:where]) <= {"-u"}
    streams = (1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno())
    return Fork(address, args[where + 1], args[where + 2 :], streams, os.environ if env is None else env)


def _worker(cmd: Sequence[str], keep_fds: Sequence[int], env: Mapping[str, str] | None = None) -> int:
    """In place of loky's ``fork_exec``, by which joblib starts a worker: a fork that forgets what the command has done.

    A fork of the server would not do, since loky waits for its own children.
    """
    from salve import ending

    if pid := os.fork():
        return pid
    above = [0, *sorted({1, 2, *map(int, keep_fds)}), os.sysconf("SC_OPEN_MAX")]
    for low, high in pairwise(above):
        os.closerange(low + 1, high)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    ending._end = None
    os.environ.update(env or {})
    where = cmd.index("-m")
    sys.argv[1:] = cmd[where + 2 :]
    sys.modules.pop(cmd[where + 1], None)  # else Python warns that it runs what is imported
    status = _run(cmd[where + 1])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without the farewells of the command


def _run(module: str) -> int:
    """Run a module as ``python -m`` does; return the status."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _leave(status: int) -> NoReturn:
    """End as Python ends, but do not take every imported module apart, which takes two seconds."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _prepare(address: str) -> None:
    """Import what commands need; have them fork where they would start an interpreter, and draw nothing."""
    gc.disable()  # as in tests/conftest.py
    for module in (
        *("matplotlib.pyplot", "optuna"),
        *("salve.run.execute", "salve.stages.training", "salve.sweep.jobs"),
    ):
        import_module(module)
    assert "wandb" not in sys.modules, "it leaves folders behind where a process is killed"
    import_module("wandb")
    remember()
    base()  # Hydra's parser is slow at first
    forking = partial(_popen, address)
    patch = pytest.MonkeyPatch()
    draw_nothing(patch)
    patch.setattr("salve.ending.subprocess", SimpleNamespace(Popen=forking, TimeoutExpired=subprocess.TimeoutExpired))
    patch.setattr("torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler.Popen", forking)
    for name, put in (
        ("joblib.externals.loky.backend.fork_exec.fork_exec", _worker),
        ("submitit.local.local.subprocess", SimpleNamespace(Popen=forking)),
    ):
        with suppress(ImportError):  # an extra
            patch.setattr(name, put)
    os.fsync = lambda fd: None  # as in tests/conftest.py
    gc.enable()
    gc.freeze()


if __name__ == "__main__":
    module, sys.argv[1:] = _serve(sys.argv[1])
    _leave(_run(module))
