"""Commands that start at once: forks of one process that has imported what they need.

To import torch and Lightning takes seconds of CPU, and a test that starts a command six times would pay for each. A
fork is what ``python -m salve.cli`` is after its imports: a process with its own session, arguments, environment,
output, children and end.
"""

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from uuid import uuid4

ROOT = Path(__file__).parents[2]


class Command:
    """A command that runs; the part of ``subprocess.Popen`` that tests use.

    Args:
        module: what ``python -m`` would run. arguments: of its command line. folder: where its output is written.
        environment: variables to set beside this process's.
    """

    def __init__(
        self, module: str, arguments: list[str], folder: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = uuid4().hex
        self._out, self._err, self._end = (folder / f".{name}-{kind}" for kind in ("out", "err", "end"))
        order = {
            **{"module": module, "arguments": arguments, "folder": str(ROOT)},
            **{"out": str(self._out), "err": str(self._err), "end": str(self._end)},
            "environment": {**os.environ, **(environment or {})},
        }
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        self.pid = int(server.stdout.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The status, negative for a signal, or None while it runs."""
        if self.returncode is None and self._end.exists():
            self.returncode = int(self._end.read_text())
        return self.returncode

    def wait(self, timeout: float = 280) -> int:
        """Wait until it has ended."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.01)
        return status

    def communicate(self, timeout: float = 280) -> tuple[str, str]:
        """Wait until it has ended; what it and its children wrote to stdout and stderr."""
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@cache
def _server() -> "subprocess.Popen[str]":
    """One for each process that runs tests; it ends with it."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.integration.commands"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    atexit.register(server.communicate)  # which tells it to end
    return server


def _serve() -> tuple[str, list[str]]:
    """Fork for each order that comes on stdin, and write down how each fork ends.

    Returns:
        Only in a fork: the module that it shall run, and its arguments.
    """
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    ends: dict[int, Path] = {}
    orders = b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 1000)
            while ends and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                end = ends.pop(ended[0])
                end.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(ended[1])))
                end.with_suffix(".new").rename(end)
        if 0 not in ready:
            continue
        if not (read := os.read(0, 2**16)):
            raise SystemExit
        *lines, orders = (orders + read).split(b"\n")
        for line in lines:
            order = json.loads(line)
            if pid := os.fork():
                ends[pid] = Path(order["end"])
                os.write(1, f"{pid}\n".encode())
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(woken)
            os.close(wake)
            os.setsid()
            for number, path, flags in (
                (0, os.devnull, os.O_RDONLY),
                (1, order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                (2, order["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            ):
                file = os.open(path, flags)
                os.dup2(file, number)
                os.close(file)
            os.environ.clear()
            os.environ.update(order["environment"])
            os.chdir(order["folder"])
            for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):  # as a new interpreter does
                if folder and (Path(folder) / "sitecustomize.py").is_file():
                    runpy.run_path(str(Path(folder) / "sitecustomize.py"))
            return order["module"], order["arguments"]


if __name__ == "__main__":
    import matplotlib.pyplot  # noqa: F401
    import optuna  # noqa: F401
    import wandb  # noqa: F401

    import salve.run.execute
    import salve.stages.training
    import salve.sweep.jobs  # noqa: F401

    module, sys.argv[1:] = _serve()
    runpy.run_module(module, run_name="__main__", alter_sys=True)
