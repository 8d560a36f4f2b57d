"""How a command ends that is told to end: status, sentence, and whatever it was doing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from salve.ending import OWNER, Stopped, as_told, is_told, owning, run_child, stopped_if_told

ROOT = Path(__file__).parents[2]
#: A command that says when it is ready, and then does what a test is about.
PROGRAM = """
import os, subprocess, sys, time
import salve.ending as ending
ending.PATIENCE = 0.5
def ready():
    print("ready", os.getpid(), flush=True)
def command():
{body}
ending.as_told(command, "program: stopped.")
"""


def program(body: str) -> str:
    return PROGRAM.format(body="\n".join(f"    {line}" for line in body.strip("\n").splitlines()))


@contextmanager
def started(body: str, **options: object) -> Iterator["tuple[subprocess.Popen[str], int]"]:
    """The command, ready, and the process that said so."""
    process = subprocess.Popen(
        [sys.executable, "-c", program(body)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    try:
        assert process.stdout is not None
        yield process, int(process.stdout.readline().split()[1])
    finally:
        process.kill()
        process.communicate()


def is_gone(process: int, within: float = 10) -> bool:
    """Whether a process has ended, or ends soon."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


ENDS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}

#: What a command may be at when the signal comes, and what may become of the exception.
DOING = {
    "work": "ready()\ntime.sleep(60)",
    "work that is tidied up": "try:\n    ready()\n    time.sleep(60)\nfinally:\n    time.sleep(0.1)",
    "an error in its place": """
try:
    ready()
    time.sleep(60)
except BaseException:
    raise RuntimeError("the loader of images was killed")
""",
    "a loop that swallows everything": """
ready()
while True:
    try:
        time.sleep(0.01)
    except BaseException:
        pass
""",
    "a last step that hangs": "try:\n    ready()\n    time.sleep(60)\nfinally:\n    time.sleep(60)",
}


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize("doing", DOING)
def test_a_command_that_is_told_to_end_says_so_with_its_status(doing: str, number: signal.Signals) -> None:
    with started(DOING[doing]) as (process, _):
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (ENDS[number], "program: stopped.\n")


def test_a_second_signal_ends_a_command_at_once() -> None:
    body = "ending.PATIENCE = 60\ntry:\n    ready()\n    time.sleep(60)\nfinally:\n    ready()\n    time.sleep(60)"
    with started(body) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (143, "program: stopped.\n")  # what it was told first


def test_what_the_system_was_asked_to_ignore_stays_ignored() -> None:
    nohup = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    with started("ready()\ntime.sleep(0.5)", **nohup) as (process, _):
        process.send_signal(signal.SIGHUP)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (0, "")


def test_a_process_that_the_command_has_forked_ends_without_a_word() -> None:
    body = "if os.fork():\n    os.wait()\nelse:\n    ready()\n    time.sleep(60)"
    with started(body) as (process, forked):
        os.kill(forked, signal.SIGTERM)
        _, said = process.communicate(timeout=20)
        assert (process.returncode, said) == (0, "")


def test_a_keyboard_interrupt_is_an_end_too(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        as_told(command, "stopped.")
    assert left.value.code == 130
    assert capsys.readouterr().err == "stopped.\n"


def test_a_command_leaves_signals_as_it_found_them(capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in ENDS]
    assert as_told(lambda: as_told(lambda: 7, "inner"), "outer") == 7
    with pytest.raises(ValueError, match="its own"):
        as_told(lambda: int("its own"), "outer")
    for number, status in ENDS.items():
        with pytest.raises(SystemExit) as left:
            as_told(lambda number=number: as_told(lambda: signal.raise_signal(number), "inner"), "outer")  # type: ignore[misc]
        assert left.value.code == status
        assert capsys.readouterr().err == "outer\n"
    assert [signal.getsignal(number) for number in ENDS] == before
    assert not is_told()


def test_an_error_after_the_signal_is_the_end_that_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    caught: list[BaseException] = []

    def command() -> None:
        try:
            with stopped_if_told():
                try:
                    signal.raise_signal(signal.SIGTERM)
                finally:
                    raise ValueError("of a library")
        except BaseException as error:
            caught.append(error)
            raise

    with pytest.raises(SystemExit):
        as_told(command, "stopped.")
    assert [type(error) for error in caught] == [Stopped]
    with pytest.raises(ValueError, match="mine"), stopped_if_told():
        raise ValueError("mine")


# -- what a command has started

PARENT = "ending.run_child([sys.executable, '-c', {child!r}])"
CHILD = program("ready()\ntime.sleep(60)")
#: Does not know of what started it until it looks.
JOB = """
import os, time, salve.ending as ending
ending.end_with_owner()
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize("told", ["parent", "child", "both"])
def test_a_command_and_its_child_end_together_and_say_it_once(told: str, number: signal.Signals) -> None:
    with started(f"ending.PATIENCE = 9\n{PARENT.format(child=CHILD)}", start_new_session=True) as (process, child):
        if told == "both":  # as a terminal does
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if told == "parent" else child, number)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) == (ENDS[number], "program: stopped.\n")
        assert is_gone(child)


@pytest.mark.parametrize("child", [CHILD, JOB], ids=["command", "job"])
def test_what_a_command_has_started_ends_when_it_is_killed(child: str) -> None:
    with started(PARENT.format(child=child)) as (process, started_by_it):
        process.kill()
        assert is_gone(started_by_it)


def test_what_a_process_that_ended_has_started_ends_as_well() -> None:
    between = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {JOB!r}])"
    with started(PARENT.format(child=between) + "\ntime.sleep(60)") as (process, grandchild):
        assert not is_gone(grandchild, within=1)  # it is the command that counts, not what stood between
        process.kill()
        assert is_gone(grandchild)


@pytest.mark.parametrize("status", [0, 1, 2, 15])
def test_the_status_of_a_child_that_ended_by_itself(status: int) -> None:
    assert as_told(lambda: run_child([sys.executable, "-c", f"raise SystemExit({status})"]), "stopped.") == status


def test_jobs_of_a_cluster_belong_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OWNER, raising=False)
    with owning():
        assert os.environ[OWNER] == str(os.getpid())
        with owning(False):
            assert OWNER not in os.environ
        assert os.environ[OWNER] == str(os.getpid())
    assert OWNER not in os.environ
