# SPDX-License-Identifier: MIT
"""The page's glossary: each word in one sentence, and the links to it."""

import re
from typing import NamedTuple

from markupsafe import Markup, escape

from salve.report.text import PERCENT
from salve.report.verdict import Verdict


class Term(NamedTuple):
    """A word, the pattern that finds it in a text, and what it means."""

    id: str
    name: str
    pattern: str
    meaning: str


def terms_of(verdict: Verdict | None, own_maps: bool = False) -> list[Term]:
    """The page's glossary; *separates* is in it where something was judged, *own map* where there are ``own_maps``."""
    strength = (
        "The strength of an edit: suppressing a latent multiplies each weight that reads the activation by "
        "max(0, 1 − α · the latent's share in its channel), for good; at α = 0 nothing changes."
    )
    if verdict is not None and verdict.method:
        strength = f"The strength of an edit: at α = 0 nothing changes, and at α = 1 {verdict.full_size}."
    terms = [
        Term(
            "splits",
            "train, select and test images",
            r"\b(?:select|test) images\b",
            "Three sets with no image in common: train images fit the network and the autoencoder, select images make "
            "every choice (epochs, strengths), and test images, which chose nothing, give the numbers.",
        ),
        Term("site", "site", r"\bsite\b", "The tensor in the network whose activations are read and edited."),
        Term(
            "sae",
            "SAE (sparse autoencoder)",
            r"\bSAE\b|\bsparse autoencoder\b",
            "A small network that rewrites each activation as a sum of few out of many learned directions.",
        ),
        Term(
            "latent",
            "latent",
            r"\blatents?\b",
            "One of these directions, and the number that says how much of it is in an image; (+) or (−) is its sign "
            "for its class.",
        ),
        Term(
            "fve",
            "FVE",
            r"\bFVE\b",
            "Fraction of variance explained: how much of the activations' variation the SAE reproduces; "
            f"100{PERCENT} is all.",
        ),
        Term("l0", "L0", r"\bL0\b", "How many latents are active per image, on average; fewer is sparser."),
        Term(
            "alpha",
            "α",
            r"α(?!_)",
            strength,
        ),
        Term(
            "critical",
            "α_flip, α_logit",
            r"α_(?:flip|logit)",
            "The smallest α at which one image is no longer predicted as its class, or at which the class's logit "
            "reaches zero; ∞ where none does.",
        ),
        Term(
            "grad-fam",
            "Grad-FAM",
            r"\bGrad-FAM\b",
            "A heat map over an image that is bright where a latent gets its value from.",
        ),
    ]
    if own_maps:
        terms.append(
            Term(
                "own-map",
                "own map",
                r"\bown maps?\b",
                "Of a latent at a site with positions: a heat map of its value at each of them.",
            )
        )
    if verdict is not None:
        terms += [
            Term("separates", "separates", r"\bseparates?\b", f"Of an edit, on test images: {verdict.meaning}."),
            Term(
                "published",
                "published sense",
                r"\bpublished sense\b",
                f"The weaker sense of “separates” that the method was published with: {verdict.published_meaning}.",
            ),
        ]
    return terms


class Linker:
    """Turns text into HTML, where the first mention of each term links to the glossary."""

    def __init__(self, terms: list[Term]) -> None:
        self._waiting = {term.id: term.pattern for term in terms}

    def __call__(self, text: str) -> Markup:
        """Escaped text with the indices of α set low, and links."""
        escaped = str(escape(text))
        if self._waiting:
            waiting = dict(self._waiting)
            # Names of groups are letters only.
            groups = {f"t{i}": name for i, name in enumerate(waiting)}
            pattern = "|".join(f"(?P<{group}>{waiting[name]})" for group, name in groups.items())

            def link(match: re.Match[str]) -> str:
                name = groups[str(match.lastgroup)]
                if name not in self._waiting:
                    return match[0]
                del self._waiting[name]
                return f'<a class="term" href="#term-{name}">{match[0]}</a>'

            escaped = re.sub(pattern, link, escaped)
        return Markup(subscripts(escaped))


def subscripts(escaped: str) -> str:
    """Escaped text with the indices of α set low."""
    return re.sub(r"α_(flip|logit)", r"α<sub>\1</sub>", escaped)
