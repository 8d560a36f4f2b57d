"""Make docs/settings.md, the list of every setting: python -m docs.tools.settings.

Settings, types and units are those of the schema (salve.run.schema), values and explanations those of the files in
conf/. What no file explains is explained by its dataclass. A new setting is therefore listed without a change here.
"""

from collections.abc import Collection, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from inspect import getdoc
from pathlib import Path
from typing import Any, get_args, get_type_hints

from docs.tools.comments import bases, choices, comments, is_global, leaves, read, values
from docs.tools.kinds import as_yaml, attributes, type_of
from docs.tools.prose import markdown, sentence
from salve.run.schema import DATA, DATA_NAMES, Config
from salve.settings import NOT_COMPUTED

PAGE = Path(__file__).resolve().parents[1] / "settings.md"
#: The file of each group that is taken if none is chosen.
CHOSEN = {group: name for one in read("config")["defaults"] if isinstance(one, dict) for group, name in one.items()}
#: Values that are longer are not shown.
LONGEST = 120
INTRODUCTION = """# Every setting

Write a setting as `key=value`: `salve sae.sparsity=2 edit.modes=[suppress]`. Choose a file of a group as `group=name`:
`salve sae=topk`. [Sweeps](sweeps.md) try several values. `salve --cfg job` prints all settings with their values.

Below, each setting has its type, with unit and allowed values; its default; and whether it is *in the key*. With
another value of a setting in the key, `salve` makes the artifacts anew that depend on it. A setting that is not in the
key changes no result, for the reason given.

This page is made by `python -m docs.tools.settings` from the schema and from [the files of settings](../conf).
"""


@dataclass(frozen=True)
class Setting:
    """A setting as the page lists it.

    Attributes:
        key: as it is written on the command line.
        kind: its type, unit and allowed values.
        default: as it is written in YAML; empty if the user must give it.
        explanation: Markdown; empty if nothing explains it.
    """

    key: str
    kind: str
    default: str
    explanation: str


def settings_of(kind: Any, prefix: str, files: list[str], without: Collection[str] = ()) -> Iterator[Setting]:
    """The settings of a dataclass, and of the dataclasses in it.

    Args:
        kind: the dataclass. prefix: of its keys, such as ``sae.``.
        files: that set and explain them, the one that is taken by default first.
        without: names of fields to leave out.
    """
    hints, described = get_type_hints(kind, include_extras=True), attributes(kind)
    for item in fields(kind):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        if item.name in without:
            continue
        if inner := dataclass_in(hint):
            yield from settings_of(inner, f"{key}.", files)
        else:
            explanation = explained(key, files) or sentence(described.get(item.name, ""))
            yield Setting(key, type_of(hint), default_of(key, item, files), explanation)


def dataclass_in(hint: Any) -> Any:
    """The dataclass that a setting is, or may be; None for a value."""
    return next((kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and is_dataclass(kind)), None)


def default_of(key: str, item: "Field[Any]", files: list[str]) -> str:
    """The value of a setting in the default file, in its dataclass, or in another file, which is then named."""
    for number, file in enumerate(files):
        found = leaves(values(file), "" if is_global(file) else f"{file.partition('/')[0]}.")
        value = found.get(key, MISSING)
        if value is not MISSING and value != "???":
            group, _, name = file.partition("/")
            return f"`{as_yaml(value)}`{f' with `{group}={name}`' if number else ''}"
        if number == 0 and item.default_factory is not MISSING:
            return f"`{as_yaml(item.default_factory())}`"
        if number == 0 and item.default not in (MISSING, "???"):
            return f"`{as_yaml(item.default)}`"
        if value == "???":
            break
    return ""


def explained(key: str, files: list[str]) -> str:
    """The comment on a setting in the first of the files that has one, as Markdown."""
    for base in (base for file in files for base in bases(file)):
        own = key if is_global(base) else key.partition(".")[2]
        if lines := comments(base).get(own):
            return markdown(lines)
    return ""


def why_not_in_key(key: str) -> str:
    """Why results do not depend on a setting; empty if they do."""
    return next((why for idle, why in NOT_COMPUTED.items() if f"{key}.".startswith(f"{idle}.")), "")


def launcher_settings(file: str) -> Iterator[Setting]:
    """The settings of a launcher, which are Hydra's: their types are those of the values in the file."""
    for key, value in leaves(read(file).get("hydra", {}), "hydra.").items():
        if not isinstance(value, dict):
            yield Setting(
                key, "" if value is None else type_of(type(value)), f"`{as_yaml(value)}`", explained(key, [file])
            )


def sections() -> Iterator[tuple[str, str, list[Setting]]]:
    """Everything on the page, in the order of the schema: a heading, what is said first, and the settings."""
    hints = get_type_hints(Config, include_extras=True)
    groups = [name for name, hint in hints.items() if name == "data" or dataclass_in(hint)]
    yield "The run", "", [*settings_of(Config, "", ["config"], without=groups)]
    for name in groups:
        kind = dataclass_in(hints[name])
        said = "Which images. Each source has settings of its own."
        if kind:
            said = explained(name, ["config"]) or sentence((getdoc(kind) or "").splitlines()[0])
        listed = [*settings_of(kind, f"{name}.", files_of(name))] if kind else []
        yield f"`{name}`", f"{said}\n\n{table_of_files(name)}".strip(), listed
        for choice, target in DATA_NAMES.items() if name == "data" else ():
            said = markdown(comments(f"data/{choice}")[""])
            yield (
                f"`data={choice}`",
                said,
                [*settings_of(DATA[target], "data.", [f"data/{choice}"], without=("_target_",))],
            )
    yield "`callbacks`", f"Callbacks of Lightning.\n\n{table_of_files('callbacks')}", []
    yield "`cluster`", f"Where runs are made ([sweeps](sweeps.md)).\n\n{table_of_files('cluster')}", []
    for file in choices("cluster"):
        if listed := [*launcher_settings(file)]:
            yield f"`{file.replace('/', '=')}`", markdown(comments(file)[""]), listed
    yield (
        "`experiment`",
        f"Recipes: files that choose everything for one purpose.\n\n{table_of_files('experiment')}",
        [],
    )


def files_of(group: str) -> list[str]:
    """The files that set a group, the one that is taken by default first."""
    if group not in CHOSEN:
        return ["config"]
    first = f"{group}/{CHOSEN[group]}"
    return [first, *(file for file in choices(group) if file != first)]


def table_of_files(group: str) -> str:
    """The files of a group: what each is for, and where it differs from the one that is taken by default."""
    if group not in CHOSEN:
        return ""
    first, *others = files_of(group) if CHOSEN[group] else ["", *choices(group)]
    files = [*filter(None, [first]), *others]
    differ = {file: differing(file, first) for file in files}
    said = {file: markdown(one for one in comments(file).get("", ()) if not one.startswith(" ")) for file in files}
    names = {file: f"`{file.partition('/')[2]}`{' (default)' if file == first else ''}" for file in files}
    if not any(differ.values()):
        return "\n".join([f"| `{group}=` | |", "|---|---|", *(f"| {names[file]} | {said[file]} |" for file in files)])
    rows = [f"| {names[file]} | {said[file]} | {differ[file]} |" for file in files]
    return "\n".join([f"| `{group}=` | | other values than the default |", "|---|---|---|", *rows])


def differing(file: str, first: str) -> str:
    """What a file sets to another value than the one it is compared with: its base, or the default of its group."""
    if is_global(file):
        return ""
    other = bases(file)[-1] if file.startswith("data/") else first
    if other == file or (file.startswith("data/") and len(bases(file)) == 1):
        return ""
    before = values(other)
    shown = {
        name: as_yaml(value) for name, value in values(file).items() if before.get(name) != value and value != "???"
    }
    return ", ".join(f"`{name}: {value}`" for name, value in shown.items() if len(value) <= LONGEST)


def entry(setting: Setting, where: str) -> str:
    """A setting as it stands on the page."""
    why = why_not_in_key(setting.key)
    default = f"default {setting.default}" if setting.default else "must be given"
    in_key = f"not in the key: {why}" if why else "in the key"
    heading = f"### `{setting.key}`{where}"
    return f"{heading}\n\n{' · '.join(filter(None, [setting.kind, default, in_key]))}\n\n{setting.explanation}\n"


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for heading, said, listed in sections():
        # Several choices of data and cluster have a setting of the same name: headings differ, so that anchors do.
        choice = heading.strip("`").partition("=")[2]
        parts += [f"## {heading}\n", *([f"{said}\n"] if said else [])]
        parts += [entry(setting, f" ({choice})" if choice else "") for setting in listed]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
