# SPDX-License-Identifier: MIT
"""What the chosen latents look at, in pictures and, with ground truth, in numbers."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from salve.report.blocks import Block, Cell, FigureFolder, Prose, Section, StripBlock, TableBlock, numbers
from salve.report.figures import validate as figures
from salve.report.tables import chosen_latents, class_names, records
from salve.report.text import is_missing, label, latent_name, number, percent, plural, slug, times
from salve.results import Artifacts

MAX_STRIPS = 24

HOW_TO_READ = (
    "A good latent lights up on the same thing in every image; light on the background, or images of many classes, "
    "means that it stands for something else. Insertion and deletion are the latent's mean value while the most "
    "salient pixels are put in or taken away, divided by its mean value on whole images. They are ratios, not shares: "
    "above 1× where parts of an image excite the latent more than the whole, below 0 where it changes sign. A faithful "
    "map has a higher insertion and a lower deletion than a random one."
)


def validation(artifacts: Artifacts, figure_folder: FigureFolder) -> Section:
    """What the chosen latents look at, in pictures and, with ground truth, in numbers."""
    blocks: list[Block] = []
    table = artifacts.table("validate", "localisation.csv")
    strips, pictured = _strips(artifacts, figure_folder, table)
    kinds, why_none = _kinds(artifacts)
    if not kinds and why_none:
        blocks.append(
            Prose(
                f"{why_none} So there are no saliency maps, and no scores of them: for each class's latent, an image "
                "made to excite it (left), and the test images that excite it most."
            )
        )
    elif strips or len(table):
        blocks.append(Prose(f"{_what_is_shown(kinds)} {HOW_TO_READ}"))
    shown = figures.MAX_ROWS
    if len(table) and "class" in table:
        blocks += figure_folder.figure(
            figures.localisation_dots(table),
            "validate-localisation",
            "Dot plot per class: pointing game and overlap with the mask, the class's latent and a random latent.",
            f"Where {_named(kinds)}, against the masks, or boxes where there are none. "
            "The pointing game asks whether the map's peak falls on "
            "the class's concept (or within validate.pointing_tolerance pixels of it), IoU how much of the thresholded "
            "map overlaps it; a latent has found its concept when the filled dot is far to the right of the hollow "
            "one, a latent drawn at random."
            + (f" The first {shown} of {len(table)} classes are shown." if len(table) > shown else ""),
            "validate-localisation.csv",
        )
    concepts = artifacts.table("validate", "tcav.csv")
    if len(concepts):
        blocks += _concepts(concepts)
    blocks += strips
    more = len(class_names(artifacts)) - pictured
    if strips and more > 0:
        first = "The first class is" if pictured == 1 else f"The first {pictured} classes are"
        blocks.append(Prose(f"{first} shown; {plural(more, 'class')} more in the tables."))
    return Section("validate", "Validate: what each latent looks at", blocks, "validate")


def _concepts(table: pd.DataFrame) -> list[Block]:
    """Whether each class depends on each of the user's concepts (TCAV)."""
    header = [Cell("concept"), Cell("class"), *(Cell(name, "num") for name in ("TCAV", "by chance", "p", "p of all"))]
    body = [
        [
            *(Cell(label(row["concept"], 32)), Cell(label(row["class"], 32))),
            *numbers(percent(row["tcav"], 0), percent(row["tcav_random"], 0), number(row["p"]), number(row["p_all"])),
        ]
        for row in records(table)
    ]
    told = (
        "TCAV is the share of a class's test images whose logit grows towards a concept of validate.concepts, mean "
        "over draws; by chance, the same along random directions. p is of a test over draws, and p of all counts all "
        "tests of the table together."
    )
    title = "Whether classes depend on concepts"
    return [Prose(told), TableBlock(title, header, body, "validate-tcav.csv", folded=len(body) > 25)]


def _kinds(artifacts: Artifacts) -> tuple[list[str], str]:
    """The kinds of maps that there are, a latent's own first, and why there is none of Grad-FAM."""
    record = artifacts.record("validate", "maps.json")
    if not record:  # of a run before there were several kinds
        return [figures.GRAD_FAM], ""
    named = {"own": figures.OWN_MAP, "grad_fam": figures.GRAD_FAM}
    return [name for kind, name in named.items() if kind in record["kinds"]], record["why_none"]["grad_fam"]


def _named(kinds: Sequence[str]) -> str:
    names = {figures.OWN_MAP: "latents' own maps", figures.GRAD_FAM: "the Grad-FAM map"}
    return " and ".join(names[kind] for kind in kinds) + (" lie" if len(kinds) > 1 else " lies")


def _what_is_shown(kinds: Sequence[str]) -> str:
    begin = (
        "For each class's latent: an image made to excite it (left), the test images that excite it most (top row, "
        "with the latent's value; another class's name is in colour), and the same images under "
    )
    own = "the latent's own map ({} row: its value at each position of the site, exact)"
    by_gradient = "their Grad-FAM map ({} row, bright where the latent comes from)"
    texts = {figures.OWN_MAP: own, figures.GRAD_FAM: by_gradient}
    rows = ["bottom"] if len(kinds) == 1 else ["middle", "bottom"]
    shown = " and under ".join(texts[kind].format(row) for kind, row in zip(kinds, rows, strict=False))
    also = ""
    if len(kinds) > 1:
        also = (
            " The two differ in what they show: the own map is what the latent is at a position, Grad-FAM what the "
            "image's latent, pooled over positions, gets from there to first order."
        )
    return f"{begin}{shown}.{also}"


def _strips(
    artifacts: Artifacts, figure_folder: FigureFolder, localisation: pd.DataFrame
) -> tuple[list[StripBlock], int]:
    """A strip for each class with pictures and a latent, and the number of classes with pictures."""
    saliency = artifacts.tensors("validate", "saliency.safetensors", first=MAX_STRIPS)
    excited = artifacts.tensors("validate", "maximisation.safetensors", first=MAX_STRIPS)
    maximised = excited.get("images", np.zeros((0,), np.uint8))
    images = saliency.get("images", np.zeros((0,), np.uint8))
    named = ((figures.OWN_MAP, "own_maps"), (figures.GRAD_FAM, "maps"))
    maps = {name: saliency[key] for name, key in named if key in saliency}
    selected, top = artifacts.table("features", "selected.csv"), artifacts.table("validate", "top.csv")
    names = list(selected["class"]) if "class" in selected else class_names(artifacts)
    located = {} if "class" not in localisation else {row["class"]: row for row in records(localisation)}
    chosen, blocks = chosen_latents(artifacts), []
    pictured = min(MAX_STRIPS, max(len(images), len(maximised)))
    for i, name in enumerate(names[:pictured]):
        latent, sign = chosen.get(name, {}).get("latent"), chosen.get(name, {}).get("sign")
        if chosen and is_missing(latent):
            continue
        own = top[top["class"] == name].sort_values("rank") if "class" in top and "rank" in top else pd.DataFrame()
        captions = [
            (
                number(row.get("value")) + ("" if row["label"] == name else f"  {label(row['label'], 9)}"),
                row["label"] != name,
            )
            for row in records(own)
        ]
        figure = figures.class_strip(
            maximised[i] if i < len(maximised) else None,
            images[i] if i < len(images) else None,
            {kind: of_kind[i] for kind, of_kind in maps.items() if i < len(of_kind)},
            captions,
        )
        under = f", and the same under: {', '.join(maps)}" if maps else ""
        alt = f"Class {name}: the image that maximises its latent, its top-activating images{under}."
        saved = figure_folder.figure(figure, "-".join(filter(None, ("validate", f"{i:02d}", slug(name)))), alt)
        subtitle = f"latent {latent_name(latent, sign)}" if not is_missing(latent) else ""
        facts = _localisation_numbers(located.get(name, {}))
        blocks.append(StripBlock(name, subtitle, saved[0] if saved else None, facts))
    return blocks, pictured


def _localisation_numbers(row: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    facts = []
    has_own = any(key.startswith("own_") for key in row)
    for prefix, kind in (("own_", figures.OWN_MAP), ("", figures.GRAD_FAM)):
        for key, name, control, write in (
            ("pointing", "Pointing game", "latent", partial(percent, decimals=0)),
            ("iou", "IoU", "latent", partial(percent, decimals=0)),
            ("insertion", "Insertion", "map", times),
            ("deletion", "Deletion", "map", times),
        ):
            if not is_missing(row.get(prefix + key)):
                # Latents drawn at random have maps of both kinds; a random map is of neither.
                random = row.get(f"random_{prefix if control == 'latent' else ''}{key}")
                beside = "" if is_missing(random) else f"random {control} {write(random)}"
                facts.append((f"{name}, {kind}" if has_own else name, write(row[prefix + key]), beside))
    if not is_missing(row.get("auroc")):
        concept = f"for “{row['concept']}”" if not is_missing(row.get("concept")) else "for its concept"
        facts.insert(0, ("AUROC", number(row["auroc"]), concept))
    return facts
