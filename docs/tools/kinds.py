"""The type of a setting in words, and what its dataclass says of it."""

import re
import types
from inspect import getdoc
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from salve.values import LARGEST, OneOf, Range, Takes, Unit

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`", list: "list", dict: "mapping"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def type_of(hint: Any) -> str:
    """A type with its unit and allowed values in words, such as ``whole number (pixels), above 0, or null``.

    Args:
        hint: what a field is annotated with.

    Raises:
        KeyError: this module has no words for it; a field of type Any needs :class:`salve.values.Takes`.
    """
    rules: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *rules = get_args(hint)
    optional = type(None) in get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    forms = [rule.form for rule in rules if isinstance(rule, Takes)]
    choices = [_either(rule, hint) for rule in rules if isinstance(rule, OneOf)]
    text = next(iter([*forms, *choices]), None) or _plain(hint)
    text += "".join(f" ({rule.name})" for rule in rules if isinstance(rule, Unit))
    text += "".join(_bounds(rule) for rule in rules if isinstance(rule, Range) and not forms)
    return f"{text}, or null" if optional or (hint is Any and choices) else text


def _either(rule: OneOf, hint: Any) -> str:
    names = [f"`{as_yaml(choice)}`" for choice in rule.values]
    is_list = get_origin(hint) is list
    return f"{'list of ' if is_list else ''}{', '.join(names[:-1])} {'and' if is_list else 'or'} {names[-1]}"


def _plain(hint: Any) -> str:
    of = get_args(hint)[-1:]
    if not of:
        return _PLAIN[hint]
    kind = get_origin(hint)
    if of[0] is Any or get_args(of[0]):
        return {list: "list of lists" if get_args(of[0]) else "list", dict: "mapping"}[kind]
    return f"{'list of' if kind is list else 'mapping from names to'} {_MANY[of[0]]}"


def _bounds(rule: Range) -> str:
    if rule.least > -LARGEST:
        return f", {rule.least:g} to {rule.most:.10g}" if rule.most < LARGEST else f", {rule.least:g} or more"
    return f", above {rule.above:g}" + (f", at most {rule.most:.10g}" if rule.most < LARGEST else "")


def attributes(kind: Any) -> dict[str, str]:
    """What a dataclass's docstring, and those of its bases, say of each attribute."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        section = (getdoc(one) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
        for names, text in re.findall(r"^ {4}(\w+(?:, \w+)*): ((?:.|\n {8})*)", section, re.MULTILINE):
            # Several may stand on a line: ``sparsity: λ. k: active latents.``
            parts = re.split(r"(?<=\.) (\w+): ", " ".join(text.split()))
            for name, said in zip([names, *parts[1::2]], parts[::2], strict=True):
                found.update(dict.fromkeys(name.split(", "), said))
    return found


def as_yaml(value: Any) -> str:
    """A value as one writes it on a line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True).strip()
    return text.removesuffix("...").strip()
