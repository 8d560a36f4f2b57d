"""The comments in the files of settings: what a file is for, and what each of its settings means."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from salve.run.explain import conf_dir

_KEY = re.compile(r"( *)(?:- )?([\w.]+):(?: |$)")


@cache
def read(file: str) -> dict[str, Any]:
    """What a file such as ``sae/topk`` holds."""
    return yaml.safe_load((conf_dir() / f"{file}.yaml").read_text(encoding="utf-8"))


def bases(file: str) -> list[str]:
    """The file, then the files of its group that it starts from, nearest first; ``…_schema`` is none."""
    group = file.rpartition("/")[0]
    named = [f"{group}/{name}" for name in read(file).get("defaults", []) if isinstance(name, str)]
    return [
        file,
        *(base for name in named if not name.endswith("_schema") and "_self_" not in name for base in bases(name)),
    ]


def values(file: str) -> dict[str, Any]:
    """The values that a file gives to its settings, itself or through the files that it starts from."""
    found: dict[str, Any] = {}
    for base in reversed(bases(file)):
        found.update({name: value for name, value in read(base).items() if name != "defaults"})
    return found


def choices(group: str) -> list[str]:
    """The files of a group, with their folder: ``sae/topk``."""
    folder = conf_dir() / group
    return sorted(path.relative_to(conf_dir()).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


@cache
def comments(file: str) -> dict[str, tuple[str, ...]]:
    """The comment directly above each setting of a file, line by line, by dotted key.

    The key ``""`` has the first comment of the file, which says what the file is for. It belongs to no setting, even
    where one follows at once.
    """
    path = Path(conf_dir() / f"{file}.yaml")
    found: dict[str, tuple[str, ...]] = {}
    above: list[str] = []
    open_keys: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        key = _KEY.match(line)
        if line.lstrip().startswith("#"):
            if "@package" not in line:
                above.append(re.sub(r"^ *# ?", "", line))
            continue
        if above and "" not in found:
            found[""], above = tuple(above), []
        if key:
            indent = len(key[1])
            open_keys = [*(one for one in open_keys if one[0] < indent), (indent, key[2])]
            found[".".join(name for _, name in open_keys)] = tuple(above)
        above = []
    return {key: lines for key, lines in found.items() if lines}


def is_global(file: str) -> bool:
    """Whether a file has whole keys, and not those of its own group alone."""
    return "/" not in file or "# @package _global_" in (conf_dir() / f"{file}.yaml").read_text(encoding="utf-8")


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys, and every mapping in it, too: which of them are settings, the schema knows."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found[f"{prefix}{name}"] = value
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
    return found
