"""How a command ends that is told to end: by Ctrl-C, by ``kill``, with its terminal, or with what started it.

The first signal raises :class:`Stopped` wherever the command is, so that what must be put in order is. Nothing that is
kept depends on it, since whatever is written survives a kill. So a second signal ends the command at once, and so does
the clock if the command has not ended after ``PATIENCE`` seconds, whatever has become of the exception meanwhile.

Imports nothing that takes time: a signal may come while everything else is being imported.
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

#: Seconds that a command has to put things in order. SLURM kills after 30, and Docker after 10.
PATIENCE = 9.0
#: Seconds between two looks at whether the process that this one belongs to is still there.
LOOK = 0.5
#: Variable in the environment of what a command starts: the process that it is to end with.
OWNER = "SALVE_ENDS_WITH"
#: Signals that tell a command to end. Windows has no SIGHUP.
TOLD_BY = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)


class Stopped(BaseException):
    """The process was told to end.

    No Exception, so that nothing takes it for a run that failed; and no KeyboardInterrupt, which Lightning takes for
    the wish to end in its own way.
    """


class _End:
    """What a process knows of its end.

    Args:
        farewell: the sentence to end with.
    """

    def __init__(self, farewell: str) -> None:
        self.farewell = farewell
        self.told: int | None = None
        self.over = False
        self._pid = os.getpid()

    def hear(self, number: int, _: Any) -> None:
        """Handle a signal."""
        if os.getpid() != self._pid:  # forked from the command, such as a process that loads images
            os._exit(128 + number)
        if self.over:
            return
        if self.told is not None:
            self.leave()
        self.told = number
        # Not threading.Thread: what the signal has interrupted may hold one of its locks.
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
                os.write(1, b"\x1b[?25h")  # a bar of progress has hidden the cursor
        os._exit(128 + (self.told or 0))


#: Of this process. Signals come to processes, so it cannot belong to anything smaller.
_end: _End | None = None


def as_told(command: Callable[[], T], farewell: str) -> T:
    """Do all that a command does; told to end, it ends with 128 + the signal's number, and says a sentence.

    A signal that was ignored when the command started (``nohup``) still is. Within another command, and in a thread
    that is not the main one, signals are left as they are.

    Args:
        command: does it. farewell: the sentence.

    Returns:
        What the command returned.

    Raises:
        SystemExit: in place of whatever came out of the command, if it had been told to end.
    """
    global _end
    if _end is not None:
        return command()
    end = _end = _End(farewell)
    before: dict[int, Any] = {}
    # A function instead of a context: between the end of a block and its context's there is room for a signal.
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
    """While Python puts itself away, which takes a second, Ctrl-C would be a traceback of that."""
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)


def is_told() -> bool:
    """Whether this process was told to end."""
    return _end is not None and _end.told is not None


def stop_if_told() -> None:
    """Raise :class:`Stopped` again if this process was told to end: on its way it may have become an error."""
    if is_told():
        raise Stopped


@contextmanager
def stopped_if_told() -> Iterator[None]:
    """Whatever comes out of this after the process was told to end is :class:`Stopped`."""
    try:
        yield
    except BaseException:
        stop_if_told()
        raise


def keep_silent() -> None:
    """Have this process say nothing at its end, since another one does."""
    if _end is not None:
        _end.farewell = ""


def others_handle_sigterm() -> bool:
    """Whether SIGTERM is neither ours nor the system's here, such as in a job of SLURM, where submitit handles it."""
    handler = signal.getsignal(signal.SIGTERM)
    ours = _end is not None and handler == _end.hear
    return not ours and handler not in (signal.SIG_DFL, signal.SIG_IGN)


@contextmanager
def owning(ends: bool = True) -> Iterator[None]:
    """What is started within ends with this process, if it calls :func:`end_with_owner`; or with none at all."""
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
    """From now on this process ends when the one does whose :func:`owning` it was started in, however that ends.

    Ctrl-C reaches both. Unless this process is a command itself, it leaves it to the other one.
    """
    owner = int(os.environ.get(OWNER, "0"))
    if owner in (0, os.getpid()) or os.name != "posix":
        return
    if _end is None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(owner)


def end_with(owner: int) -> None:
    """From now on this process ends when another does, by its number; once for each."""
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
            # It has ended, but what had started it has not asked for its status yet.
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:  # no Linux
        return True
    except OSError:
        return False


def run_child(command: Sequence[str]) -> int:
    """Run a command of this project as a child, which ends with this process; its exit status.

    Raises:
        Stopped: this process, or the child, was told to end.
    """
    with owning():
        child = subprocess.Popen(command)
    try:
        status = child.wait()
    except BaseException:
        try:
            child.wait(1)  # Ctrl-C has told the child, too
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()  # it takes no longer than this process may
        if child.returncode > 128:
            keep_silent()  # the child has said it
        raise
    number = status - 128 if status > 128 else -status
    if _end is not None and number in TOLD_BY:
        _end.told = number
        if status > 128:
            keep_silent()
        raise Stopped
    return status
