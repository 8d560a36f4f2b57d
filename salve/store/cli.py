# SPDX-License-Identifier: MIT
"""``salve-store``: list, verify and clean the artifacts of an output folder. Imports nothing slow."""

import argparse
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from salve.integrity import Damaged, damage_of, damage_of_run, read_manifest, set_aside
from salve.store.clean import LOCK, Busy, Removable, held, in_use, removable, remove
from salve.store.contents import Contents, Entry, StoredArtifact, contents
from salve.types import UserError

_DESCRIPTION = """\
List, verify and clean the artifacts of an output folder, which runs share.

  ls      list every artifact with its size, age and the runs that use it,
          then unfinished work and damaged artifacts
  verify  read every file and report those that changed since they were written
  gc      list what nobody needs: artifacts that no run uses, abandoned work,
          damaged artifacts, leftovers of killed processes; --yes removes them

FOLDER is the output_dir of the runs (default: outputs).
"""

_EXAMPLES = """\
A run uses the artifacts that its manifest.json names or, if it has not
finished, those that its salve.log names. Runs in other folders are not known:
do not run gc on a folder whose artifacts they use. gc never removes what a
running process has locked, what was written to within --older-than, or what
lies behind a link. The command that made an artifact makes it again.

exit status: 0; 1 if verify found damage or gc could not remove something; 2 if
the command cannot run.

examples:
  salve-store ls
  salve-store verify outputs
  salve-store verify outputs --set-aside
  salve-store gc outputs
  salve-store gc outputs --older-than 7d --yes
"""

#: Number of runs of an artifact that are named; the rest is counted.
_NAMED = 2
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="salve-store",
        usage="salve-store ls [FOLDER]\n"
        "       salve-store verify [FOLDER] [--set-aside]\n"
        "       salve-store gc [FOLDER] [--older-than AGE] [--yes]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("ls", "verify", "gc"), help="what to do")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), metavar="FOLDER", help="output_dir")
    parser.add_argument("--set-aside", action="store_true", help="verify: move damaged artifacts to artifacts/damaged")
    parser.add_argument("--yes", action="store_true", help="gc: remove what is listed")
    parser.add_argument(
        "--older-than",
        type=age,
        metavar="AGE",
        help="gc: keep what was written to within AGE: a number with s, m, h or d (default: 1d)",
    )
    given = parser.parse_intermixed_args(arguments)
    for name, action in (("set_aside", "verify"), ("yes", "gc"), ("older_than", "gc")):
        if given.action != action and getattr(given, name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')} goes with {action} alone")
    try:
        found = contents(given.folder)
        if given.action == "ls":
            return _list(found)
        if given.action == "verify":
            return _verify(found, given.set_aside)
        return _collect(found, _UNITS["d"] if given.older_than is None else given.older_than, given.yes)
    except UserError as error:
        _say(f"salve-store: {error}", sys.stderr)
    except BrokenPipeError:  # the reader of a pipe, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"salve-store: {where}{error.strerror or error}.", sys.stderr)
    except KeyboardInterrupt:
        _say("salve-store: stopped.", sys.stderr)
        return 130
    return 2


def age(text: str) -> float:
    """Parse an age such as ``12h`` into seconds; without a unit it is in days."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no age: give a number with s, m, h or d, such as 12h")
    return float(found[1]) * _UNITS[found[2] or "d"]


def _list(found: Contents) -> int:
    rows = [("kind", "key", "size", "age", "used by")]
    rows += [
        (one.kind, one.key, _bytes(one.entry.size), _ago(one.entry), _users(one, found.output))
        for one in found.artifacts
    ]
    _say(_table(rows))
    idle = [one for one in found.artifacts if not one.users]
    total = sum(one.entry.size for one in found.artifacts)
    unused = f"; {len(idle)} of them used by no run, {_bytes(sum(one.entry.size for one in idle))}" if idle else ""
    _say(f"{_count(len(found.artifacts), 'artifact')}, {_bytes(total)}{unused}.")
    for title, entries in (("unfinished", found.unfinished), ("damaged", found.damaged)):
        if entries:
            _say(f"\n{title}: {len(entries)}, {_bytes(sum(entry.size for entry in entries))}")
            _say(_table([(entry.path.name, _bytes(entry.size), _ago(entry)) for entry in entries], indent="  "))
    _say_of_links_and_runs(found)
    return 0


def _verify(found: Contents, aside: bool) -> int:
    damaged = 0
    for one in found.artifacts:
        if not (damage := damage_of(one.entry.path, reread=True)):
            continue
        damaged += 1
        done = ""
        if aside:
            try:
                with held([found.root / "unfinished" / f"{one.kind}-{one.key}.lock"]):
                    done = f"; set aside as {set_aside(found.root, one.kind, one.key)}"
            except Busy:
                done = "; not set aside, since a running process works on it"
            except OSError as error:
                done = f"; it cannot be set aside ({error.strerror})"
        _say(f"{one.entry.name}: {damage}{done}")
    artifacts = damaged
    there = {(one.kind, one.key) for one in found.artifacts}
    for run in found.runs:
        if reason := _damage_of_run(run, there):
            damaged += 1
            _say(f"{os.path.relpath(run, found.output)}: {reason}")
    read = _bytes(sum(one.entry.size for one in found.artifacts))
    _say(
        f"{_count(len(found.artifacts), 'artifact')} ({read}) and {_count(len(found.runs), 'run')} were read: "
        f"{damaged or 'none'} damaged."
    )
    if artifacts and not aside:
        _say("The command that uses a damaged artifact sets it aside and makes it again; --set-aside moves it now.")
    _say_of_links_and_runs(found, runs=False)
    return 1 if damaged else 0


def _damage_of_run(run: Path, there: set[tuple[str, str]]) -> str:
    """What is wrong with a finished run, or which of its artifacts is missing; empty if nothing, or if unfinished."""
    try:
        made = read_manifest(run)["artifacts"]
    except FileNotFoundError:
        return ""
    except Damaged as error:
        return str(error)
    if damage := damage_of_run(run, names=None, reread=True):
        return damage
    gone = [f"{kind}/{entry.get('key')}" for kind, entry in made.items() if (kind, entry.get("key")) not in there]
    return f"its artifact {gone[0]} is not there" if gone else ""


def _collect(found: Contents, older: float, yes: bool) -> int:
    items = removable(found, older)
    busy = [item for item in items if in_use(item)]
    items = [item for item in items if item not in busy]
    shown = [item for item in items if item.why != LOCK]
    _say(_table([(item.entry.name, _bytes(item.entry.size), _ago(item.entry), item.why) for item in shown]))
    if locks := len(items) - len(shown):  # every artifact leaves one
        _say(f"{_count(locks, 'lock')} that nobody holds")
    failed = 0
    removed: list[Removable] = []
    for item in items if yes else []:
        try:
            remove(item, found.root)
            removed.append(item)
        except Busy:
            busy.append(item)
        except OSError as error:
            failed += 1
            _say(f"{item.entry.name} cannot be removed ({error.strerror}).")
    size = _bytes(sum(item.entry.size for item in (removed if yes else items)))
    if yes:
        _say(f"Removed: {len(removed)}, {size}.")
    elif items:
        _say(f"{len(items)} can go, {size}. Nothing was removed: --yes does so.")
    else:
        _say("Nothing can go.")
    if busy:
        _say(f"{len(busy)} left alone, since running processes have locked them.")
    _say_of_links_and_runs(found)
    return 1 if failed else 0


def _say_of_links_and_runs(found: Contents, runs: bool = True) -> None:
    for path in found.skipped:
        _say(f"{path} is a link and was not looked into.")
    if runs and found.unreadable:
        names = ", ".join(f"{os.path.relpath(run, found.output)} ({why})" for run, why in found.unreadable.items())
        _say(f"It is not known which artifacts these runs use, so that gc removes none: {names}.")


def _users(one: StoredArtifact, output: Path) -> str:
    """The runs of an artifact, in words; those of a sweep are counted."""
    if not one.users:
        return "no run"
    groups = Counter(os.path.dirname(user) if user.startswith("sweeps/") else user for user in one.users)
    names = [
        f"{group} ({_count(count, 'run')})" if group.startswith("sweeps/") else group for group, count in groups.items()
    ]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _table(rows: Sequence[tuple[str, ...]], indent: str = "") -> str:
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _bytes(size: int) -> str:
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "B" else f"{size} B"
        value /= 1000
    return f"{value:.3g} TB"


def _ago(entry: Entry) -> str:
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if entry.age >= seconds:
            return f"{int(entry.age // seconds)} {unit}"
    return f"{int(entry.age)} s"


def _say(text: str, stream: "object | None" = None) -> None:
    """Print, without control characters that a hostile name could send to the terminal."""
    if text:
        plain = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        print(plain, file=stream or sys.stdout)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main())
