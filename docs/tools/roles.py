"""A Griffe extension, which reads the package for the API's pages: roles in docstrings become links."""

import re
from collections.abc import Iterator
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`[.~]?([\w.]+)`")


class Roles(griffe.Extension):
    """Makes of ``:func:`gate` `` a link to that function, if it has an entry, and of all other roles plain code."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Change all docstrings of a package that has been read."""
        for one in _objects(pkg):
            if one.docstring:
                one.docstring.value = _linked(one.docstring.value, one)
        _unshadow(pkg)


def _objects(of: griffe.Object) -> Iterator[griffe.Object]:
    yield of
    for member in list(of.members.values()):
        if isinstance(member, griffe.Object):
            yield from _objects(member)


def _unshadow(module: griffe.Module) -> None:
    """Let ``salve.saliency.grad_fam`` be the function, as in Python, and not the module of the same name."""
    for name, member in list(module.members.items()):
        if isinstance(member, griffe.Module):
            _unshadow(member)
            if name in (module.exports or ()) and name in member.members:
                module.members[name] = griffe.Alias(name, member.members[name], parent=module)


def _linked(text: str, near: griffe.Object) -> str:
    return _ROLE.sub(lambda role: _link(role[1], near), text)


def _link(name: str, near: griffe.Object) -> str:
    first, _, rest = name.partition(".")
    try:
        found = near.resolve(first)
    except griffe.NameResolutionError:
        found = first
    target = f"{found}.{rest}" if rest else found
    return f'<autoref identifier="{target}" optional>`{name}`</autoref>'
