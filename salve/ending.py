# SPDX-License-Identifier: MIT
"""End a command that is told to end: by Ctrl-C, by ``kill``, with its terminal, or with the process that started it.

The first signal raises :class:`Stopped` wherever the command is, so that ``finally`` blocks run. No result depends on
them, since all files are written so that they survive a kill. A second signal therefore ends the command at once, and
so does a timer, ``PATIENCE`` seconds after the first.

Imports nothing heavy: a signal may come while other modules are being imported.
"""

import _thread
import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds that a command has to end in after a signal. SLURM kills after 30, and Docker after 10.
PATIENCE = 9.0
#: Seconds between two looks at whether the owner of this process still runs.
LOOK = 0.5
#: Variable in the environment of a process that ends with its owner: the id of the owner's process.
OWNER = "SALVE_ENDS_WITH"
#: The signals that tell a command to end. Windows has no SIGHUP.
TOLD_BY = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)


class Stopped(BaseException):
    """The process was told to end.

    It is not an Exception, so that nobody takes it for a run that failed, and not a KeyboardInterrupt, which Lightning
    handles in its own way.
    """


class _End:
    """The state of a process that may be told to end.

    Args:
        farewell: the last sentence that the process says.
    """

    def __init__(self, farewell: str) -> None:
        self.farewell = farewell
        self.told: int | None = None
        self.over = False
        self._pid = os.getpid()

    def hear(self, number: int, _: Any) -> None:
        """Handle a signal."""
        if os.getpid() != self._pid:  # a fork of the command, such as a process that loads images
            os._exit(128 + number)
        if self.over:
            return
        if self.told is not None:
            self.leave()
        self.told = number
        # Not threading.Thread: the code that the signal interrupted may hold one of its locks.
        _thread.start_new_thread(self._wait_and_leave, ())
        raise Stopped

    def _wait_and_leave(self) -> None:
        time.sleep(PATIENCE)
        if not self.over:
            self.leave()

    def leave(self) -> None:
        """End the process now."""
        with suppress(OSError):
            if self.farewell:
                os.write(2, f"{self.farewell}\n".encode())
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # show the cursor, which a progress bar has hidden
        os._exit(128 + (self.told or 0))


#: The state of this process; global, as signals are.
_end: _End | None = None


def as_told(command: Callable[[], T], farewell: str) -> T:
    """Run a command. If it is told to end, it ends with a sentence, and with 128 + the signal's number as its status.

    Signals that are ignored when the command starts (``nohup``) stay ignored. A command within another one, or in a
    thread other than the main one, handles no signals.

    Args:
        command: does the work.
        farewell: the sentence.

    Returns:
        What the command returned.

    Raises:
        SystemExit: the command was told to end; replaces what it raised.
    """
    global _end
    if _end is not None:
        return command()
    end = _end = _End(farewell)
    before: dict[int, Any] = {}
    # A function, not a context manager: a signal could come between the end of a block and that of its context.
    try:
        try:
            if threading.current_thread() is threading.main_thread():
                for number in TOLD_BY:
                    if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                        before[number] = handler
                        signal.signal(number, end.hear)
            end_with_owner()
            return command()
        finally:
            end.over = True
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and end.told is None:
            end.told = signal.SIGINT
        if end.told is None:
            raise
        if end.farewell:
            with suppress(OSError):
                print(end.farewell, file=sys.stderr, flush=True)
        raise SystemExit(128 + end.told) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _end = None
        atexit.unregister(_end_without_a_word)
        atexit.register(_end_without_a_word, list(before))


def _end_without_a_word(numbers: Sequence[int]) -> None:
    """Let signals end the process silently while Python exits, which takes a second."""
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)


def is_told() -> bool:
    """Whether this process has been told to end."""
    return _end is not None and _end.told is not None


def stop_if_told() -> None:
    """Raise :class:`Stopped` if this process has been told to end; call it where an error may have replaced it."""
    if is_told():
        raise Stopped


@contextmanager
def stopped_if_told() -> Iterator[None]:
    """Replace any exception by :class:`Stopped` if this process has been told to end."""
    try:
        yield
    except BaseException:
        stop_if_told()
        raise


def keep_silent() -> None:
    """End without the sentence of :func:`as_told`, because another process says it."""
    if _end is not None:
        _end.farewell = ""


def others_handle_sigterm() -> bool:
    """Whether other code handles SIGTERM in this process, as submitit does in a job of SLURM."""
    handler = signal.getsignal(signal.SIGTERM)
    ours = _end is not None and handler == _end.hear
    return not ours and handler not in (signal.SIG_DFL, signal.SIG_IGN)


@contextmanager
def owning(ends: bool = True) -> Iterator[None]:
    """Make this process the owner of the processes that are started in here.

    Args:
        ends: whether they end with their owner, if they call :func:`end_with_owner`. If not, they have no owner.
    """
    before = os.environ.pop(OWNER, None)
    if ends:
        os.environ[OWNER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(OWNER, None)
        if before is not None:
            os.environ[OWNER] = before


def end_with_owner() -> None:
    """From now on, end this process when its owner ends (see :func:`owning`).

    Ctrl-C reaches both processes. This one ignores it and leaves it to its owner, unless it is a command itself.
    """
    owner = int(os.environ.get(OWNER, "0"))
    if owner in (0, os.getpid()) or os.name != "posix":
        return
    if _end is None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(owner)


def end_with(owner: int) -> None:
    """From now on, end this process when another one ends. Further calls for the same process do nothing.

    Args:
        owner: the other process's id.
    """
    name = f"ends with {owner}"
    if all(thread.name != name for thread in threading.enumerate()):
        threading.Thread(target=_watch, args=(owner,), name=name, daemon=True).start()


def _watch(owner: int) -> None:
    while _runs(owner):
        time.sleep(LOOK)
    if _end is not None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
    os._exit(1)


def _runs(process: int) -> bool:
    if os.getppid() == process:
        return True
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            # A zombie has ended, but its parent has not asked for its status yet.
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:  # no /proc: not Linux
        return True
    except OSError:
        return False


def run_child(command: Sequence[str]) -> int:
    """Run a command of this project as a child process that ends with this one.

    Returns:
        Its exit status.

    Raises:
        Stopped: this process, or the child, was told to end.
    """
    with owning():
        child = subprocess.Popen(command)
    try:
        status = child.wait()
    except BaseException:
        try:
            child.wait(1)  # Ctrl-C reaches the child, too
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()  # for at most PATIENCE seconds
        if child.returncode > 128:
            keep_silent()  # the child has said the sentence
        raise
    number = status - 128 if status > 128 else -status
    if _end is not None and number in TOLD_BY:
        _end.told = number
        if status > 128:
            keep_silent()
        raise Stopped
    return status
