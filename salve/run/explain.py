# SPDX-License-Identifier: MIT
"""Turn Hydra's errors about settings into one sentence that names the valid choices."""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from salve.run.refused import instead_of
from salve.types import UserError

#: What may stand before the ``=`` of an argument: a setting or a group, perhaps with Hydra's ``+``, ``++`` or ``~``.
_KEY = re.compile(r"(\+\+?|~)?[A-Za-z_][\w./@:-]*")


class SweepIncomplete(Exception):
    """Some runs of a sweep failed, and its summary has listed them."""


def conf_dir() -> Path:
    """The folder of YAML files: inside an installed package, or at the top of the repository."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def explain(error: HydraException | OmegaConfBaseException) -> str:
    """Put an error that Hydra raised while it composed the settings into one sentence."""
    cause = error.__cause__ or error
    if own := _raised_by_resolver(error):
        return own
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        if group == "hydra" and name.startswith("launcher/"):
            launcher = name.partition("/")[2]
            extra = launcher.split("_")[0].replace("submitit", "slurm")
            return f"Hydra's launcher {launcher} is not installed: pip install 'salve[{extra}]'."
        return _no_choice(group, name)
    if isinstance(error, OverrideParseException):
        return _unreadable(error.override)
    if named := re.match(
        r"(?s)(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?: requires --multirun)?\n", f"{error}\n"
    ):
        argument = named[1]
        key, _, values = argument.partition("=")
        a_list = "" if "(" in values else f"to give a list, {key}=[{values}]; "
        return f"{argument} names several values: to sweep over them, use salve -m; {a_list}{_if_text(argument)}."
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        node, key = cause.parent_node, str(cause.full_key)
        if OmegaConf.get_type(node) is dict:
            return f"{key} has no value to change; add it as +{key}=VALUE."
        return no_setting(key, (str(name) for name in node))
    lines = [str(part).splitlines()[0].rstrip(".:") for part in dict.fromkeys((error, cause)) if str(part)]
    merged = re.match(r"(?s)Error merging override (.*)", str(error))
    if merged and (wanted := _wanted(str(cause), merged[1])):
        within = re.match("Value '(.*?)' of type", str(cause)) if "=[" in merged[1] else None
        of_list = within and within[1] != merged[1].partition("=")[2]
        return f"{merged[1]}{f': {within[1]}' if within and of_list else ''} must be {wanted}."
    if merged and re.match("Cannot convert '(list|dict)' to string", str(cause)):
        lines.append(_if_text(merged[1]))
    return ": ".join(dict.fromkeys(lines)) + "."


def no_setting(key: str, known: Iterable[str]) -> str:
    """Say that a key is no setting, and what to use instead: its new name, or the settings that its group has.

    Args:
        key: the whole key.
        known: names of the settings in its group.
    """
    settings = ", ".join(name for name in known if name != "hydra" and not name.startswith("_"))
    return instead_of(key) or f"{key} is no setting; {key.rpartition('.')[0] or 'the top level'} has {settings}."


#: How OmegaConf's message about a value of the wrong type ends, and what the setting takes.
_TYPES = {
    "could not be converted to Integer": "a whole number",
    "could not be converted to Float": "a number",
    "is not a valid bool": "true or false",
}


def _wanted(said: str, argument: str) -> str:
    """What a setting takes, from OmegaConf's message about a value of the wrong type; empty if that is not known."""
    key, _, value = argument.partition("=")
    if "is not a ListConfig, list or tuple" in said:
        return f"a list, such as {key}=[{value}]"
    if said.startswith("Cannot merge DictConfig with ListConfig"):
        if value.lstrip().startswith("{"):
            return f"a list, such as {key}=[{value}]"
        return f"a mapping, such as {key}={{NAME: {value.strip('[]').split(',')[0] or 'VALUE'}}}"
    return next((kind for ending, kind in _TYPES.items() if ending in said), "")


def _raised_by_resolver(error: BaseException) -> str:
    """The message of a UserError from one of salve's resolvers, which OmegaConf wraps; empty if there is none."""
    within: BaseException | None = error
    seen = set[int]()  # under a debugger, OmegaConf makes an error the cause of its own cause
    while within is not None and id(within) not in seen:
        if isinstance(within, UserError):
            return str(within)
        seen.add(id(within))
        within = within.__cause__ or within.__context__
    return ""


def quoted(argument: str) -> str:
    """Quote ``key=value`` for a shell so that Hydra reads the value as one text, whatever its characters.

    Most punctuation has a meaning in Hydra's grammar. Within double quotes only quotes, the backslashes before them,
    and ``${`` do. The outer quotes are for the shell, which removes them.
    """
    key, _, value = argument.partition("=")
    value = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    value = re.sub(r'(\\*)"', r'\1\1\\"', value)
    value = re.sub(r"(\\+)$", r"\1\1", value)
    return shlex.quote(f'{key}="{value}"')


def _unreadable(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if any("\ud800" <= letter <= "\udfff" for letter in argument):  # bytes that are not UTF-8
        return f"{argument.encode(errors='backslashreplace').decode()} is not UTF-8; settings must be."
    if not equals or not _KEY.fullmatch(key):
        return f"{argument} cannot be read; settings are given as key=value, and salve --help says which there are."
    if value[:1] in ("[", "{"):
        return f"{argument} cannot be read: put double quotes around each text in it, or {_if_text(argument)}."
    return f"{argument} cannot be read: some of its characters need quotes; write {quoted(argument)}."


def _if_text(argument: str) -> str:
    return f"if it is one text, write {quoted(argument)}"


def group_mistake(arguments: Sequence[str]) -> str | None:
    """One sentence for a group that is given a number, such as ``sae=5``; Hydra raises no error of its own for it."""
    for argument in arguments:
        group, _, name = argument.partition("=")
        if name and (conf_dir() / group).is_dir() and not name[0].isalpha():
            return _no_choice(group, name)
    return None


def _no_choice(group: str, name: str) -> str:
    if not name:  # what --config-name says
        return f"There is no file {group}.yaml among the settings."
    return f"{group}={name} is no choice; {group} can be {', '.join(choices(group))}."


def choices(group: str) -> list[str]:
    """The files of a group, by name: salve's, and the user's own on Hydra's search path."""
    return sorted({name for folder in _folders(sys.argv[1:]) for name in _names(folder / group)})


def groups() -> list[str]:
    """The groups in the order of ``config.yaml``, then groups that only the user has."""
    ours = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    named = [group for item in ours if isinstance(item, dict) for group in item if " " not in group]
    _, *own = _folders(sys.argv[1:])
    further = {path.parent.name for folder in own for path in folder.glob("*/*.yaml")} - {"hydra"}
    return list(dict.fromkeys([*named, *sorted(further)]))


def list_of_choices() -> str:
    """List the groups for ``salve --help``, one a line, with their files.

    Hydra's own ``$APP_CONFIG_GROUPS`` cannot be used. It ignores ``hydra.searchpath``, lists schemas such as
    ``concepts_schema`` beside the files, and shows ``experiment=imagenette/vit`` as ``vit`` in a group
    ``experiment/imagenette``, which cannot be chosen that way.
    """
    return "\n".join(f"    {group:<11} {', '.join(choices(group))}" for group in groups())


def _names(folder: Path) -> list[str]:
    return [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]


def _folders(arguments: Sequence[str]) -> list[Path]:
    """The folders in which a command finds YAML files: salve's, then those that its arguments or main file name."""
    own: list[str] = []
    name = "config"
    for option, value in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, joined = option.partition("=")
        if flag in ("--config-dir", "-cd"):
            own.append(joined if equals else value)
        elif flag in ("--config-name", "-cn"):
            name = joined if equals else value
    folders = [conf_dir(), *map(Path, own)]
    given = next((argument for argument in arguments if argument.startswith("hydra.searchpath=")), None)
    if given is not None:
        found: Any = OverridesParser.create().parse_override(given).value()
    else:
        primary = next((file for folder in folders if (file := folder / f"{name}.yaml").is_file()), None)
        content = yaml.safe_load(primary.read_text(encoding="utf-8")) if primary else None
        found = ((content or {}).get("hydra") or {}).get("searchpath")
    for path in found if isinstance(found, list) else []:
        if str(path).startswith("pkg://"):
            spec = find_spec(str(path).removeprefix("pkg://").replace("/", "."))
            folders += [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
        else:
            folders.append(Path(str(path).removeprefix("file://")))
    return folders
