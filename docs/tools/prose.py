"""Comments and docstrings as Markdown."""

import re
from collections.abc import Iterable

#: What is code in a text: commands, lists and mappings, perhaps with a key before them, keys, paths and file names.
_CODE = re.compile(
    r"pip install '[^']*'|python -m [\w.]+|docs/\w+\.md"
    r"|[\w.]*=?(?:\{[^}]*\}|\[[^\]]*\])"
    r"|\+?[a-z]\w+(?:\.\w\w+)+(?:=[\w.:/-]*\w)?|\w+=(?:\w[\w.]*)?\w"
    r"|[^\s`(\"',;]*(?:<\w+>|_\w|/\*|[a-z]/[a-z<])[^\s`)\"',;:]*[\w>*/]|[a-z]\w+/"
)


def sentence(text: str) -> str:
    """A phrase of a docstring as a sentence of Markdown, its roles and literals as code."""
    text = re.sub(r":\w+:`\.?([\w.]+)`", r"`\1`", text).replace("``", "`")
    return markdown([text[:1].upper() + text[1:]])


def markdown(lines: Iterable[str]) -> str:
    """Lines of a comment as Markdown: indented ones become a list, what looks like code is marked as such."""
    paragraphs: list[list[str]] = [[]]
    listed: list[str] = []
    for line in lines:
        if line.startswith("  "):
            first, _, rest = line.strip().partition("  ")
            listed.append(f"- `{first}`{': ' + marked(rest.strip()) if rest else ''}")
        else:
            if listed:
                paragraphs += [listed, []]
                listed = []
            paragraphs[-1].append(line)
    texts = [
        "\n".join(part) if part[:1] and part[0].startswith("- ") else marked(" ".join(part)) for part in paragraphs
    ]
    return "\n\n".join(filter(None, [*texts, "\n".join(listed)]))


def marked(text: str) -> str:
    """Text with settings, paths and lists marked as code, and pages of the docs as links."""

    def code(found: re.Match[str]) -> str:
        page = re.fullmatch(r"docs/((\w+)\.md)", found[0])
        return f"[{page[2].replace('_', ' ')}]({page[1]})" if page else f"`{found[0]}`"

    parts = text.split("`")
    return "`".join(part if number % 2 else _CODE.sub(code, part) for number, part in enumerate(parts))
