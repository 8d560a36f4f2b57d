# SPDX-License-Identifier: MIT
"""What a latent looks at: image strips with overlays, and localisation beside its control."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from salve.report.style import BLACK, BLUE, GREY, VERMILLION, WIDTH, new_figure, percent_axis, styled
from salve.report.tables import column
from salve.report.text import label

MAX_IMAGES = 8
MAX_ROWS = 60
#: Kinds of maps, as readers see them.
OWN_MAP, GRAD_FAM = "own map", "Grad-FAM"


def overlay(image: NDArray[np.uint8], saliency: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Lay a saliency map over an image.

    Args:
        image: [3, S, S] RGB, 0..255.
        saliency: [S, S] ≥ 0, any scale; it is divided by its own maximum. Where it is zero the image shows in grey.

    Returns:
        [S, S, 3] RGB. A map of zeros gives the grey image.
    """
    rgb = image.transpose(1, 2, 0).astype(np.float64) / 255
    weight = np.nan_to_num(saliency.astype(np.float64)).clip(min=0)
    weight = weight / weight.max() if weight.max() > 0 else weight
    grey = (rgb @ np.array([0.299, 0.587, 0.114]))[..., None] * 0.85
    heat = mpl.colormaps["inferno"](0.15 + 0.8 * weight)[..., :3]
    mix = 0.75 * np.sqrt(weight)[..., None]
    mixed = (1 - mix) * grey + mix * heat
    return (255 * mixed.clip(0, 1)).round().astype(np.uint8)


def _strip(rows: list[list[NDArray[np.uint8]]], gap: int) -> NDArray[np.uint8]:
    """Rows of equal tiles [S, S, 3] as one picture with white gaps; one array draws faster than many axes."""
    size = rows[0][0].shape[0]
    pitch = size + gap
    canvas = np.full((pitch * len(rows) - gap, pitch * len(rows[0]) - gap, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            canvas[i * pitch : i * pitch + size, j * pitch : j * pitch + size] = tile
    return canvas


@styled
def class_strip(
    maximised: NDArray[np.uint8] | None,
    images: NDArray[np.uint8] | None,
    maps: Mapping[str, NDArray[np.floating]],
    captions: Sequence[tuple[str, bool]] = (),
) -> Figure | None:
    """One class's latent: the maximising image, and the top-activating images above the same under their maps.

    Args:
        maximised: [3, S, S] image made by activation maximisation, or None.
        images: [T, 3, S, S] top-activating images, strongest first, or None; the first ``MAX_IMAGES`` are shown.
        maps: by name, raw maps [T, S, S] ≥ 0, in their order; several are named beside their rows.
        captions: for each image its text, and whether it is of another class (then in colour).

    Returns:
        None where there is no image at all.
    """
    if maximised is None and (images is None or not len(images)):
        return None
    cell, text = WIDTH / (MAX_IMAGES + 2.3), 0.27
    count_of_rows = max(2, 1 + len(maps))
    height = count_of_rows * cell + text + 0.05
    figure = new_figure(WIDTH, height, layout=None)
    bottom, tall = 0.02 / height, cell / height
    top = bottom + count_of_rows * tall
    if maximised is not None:
        axes = figure.add_axes((0.0, top - 2 * tall, 2 * cell / WIDTH, 2 * tall))
        axes.imshow(maximised.transpose(1, 2, 0), interpolation="antialiased", aspect="auto")
        axes.set_title("activation maximisation", fontsize=8, fontweight="normal", pad=4)
        axes.axis("off")
    if images is not None and len(images):
        images = images[:MAX_IMAGES]
        count, size = len(images), images.shape[-1]
        rows = [[image.transpose(1, 2, 0) for image in images]]
        for saliencies in maps.values():
            rows.append([overlay(image, saliency) for image, saliency in zip(images, saliencies, strict=False)])
        gap = max(1, round(0.03 * size))
        axes = figure.add_axes(
            (2.3 * cell / WIDTH, top - len(rows) * tall, count * cell / WIDTH, len(rows) * tall), label="images"
        )
        canvas = _strip(rows, gap)
        axes.imshow(canvas, interpolation="antialiased", aspect="auto")
        for i, name in enumerate(maps if len(maps) > 1 else (), start=1):
            middle = i * (size + gap) + size / 2
            axes.text(-0.06 * size, middle, name, fontsize=7, rotation=90, ha="right", va="center")
        for i, (caption, foreign) in enumerate(list(captions)[:count]):
            colour = VERMILLION if foreign else BLACK
            axes.text(i * (size + gap) - 0.5, -0.05 * size, caption, fontsize=7, color=colour, va="bottom")
        axes.axis("off")
    return figure


@styled
def localisation_dots(table: pd.DataFrame) -> Figure | None:
    """Pointing game and IoU per class: the class's latent (filled) beside a random latent (hollow).

    Args:
        table: columns class and any of pointing, random_pointing, iou, random_iou [fractions], of Grad-FAM; the same of
            latents' own maps, whose names hold ``own_``.

    Returns:
        None where the table has none of them. Beyond ``MAX_ROWS`` classes the first ones are shown.
    """
    table = table.iloc[:MAX_ROWS]
    has_own = any(name.startswith("own_") for name in table)
    measures = [
        (prefix + name, title + (f",\n{kind}" if has_own else ""))
        for prefix, kind in (("own_", OWN_MAP), ("", GRAD_FAM))
        for name, title in (("pointing", "Pointing game (hits)"), ("iou", "IoU with the mask"))
        if np.isfinite(column(table, prefix + name)).any()
    ]
    if not measures:
        return None
    rows = np.arange(len(table))
    pitch = 0.26 if len(table) <= 30 else 0.16
    figure = new_figure(WIDTH * {1: 0.5, 2: 0.85}.get(len(measures), 1.0), 1.15 + pitch * len(table))
    panels = np.atleast_1d(figure.subplots(1, len(measures), sharey=True))
    for axes, (name, title) in zip(panels, measures, strict=True):
        value, control = column(table, name).to_numpy(), column(table, f"random_{name}").to_numpy()
        axes.hlines(rows, control, value, color="#d5d9de", linewidth=1.6)
        axes.plot(control, rows, "o", color="white", markeredgecolor=GREY, markersize=5)
        axes.plot(value, rows, "o", color=BLUE, markersize=6)
        axes.set_title(title)
        axes.set_xlim(-0.03, 1.03)
        percent_axis(axes.xaxis)
    hollow = Line2D([], [], linestyle="", marker="o", color="white", markeredgecolor=GREY, label="a random latent")
    filled = Line2D([], [], linestyle="", marker="o", color=BLUE, label="the class's latent")
    figure.legend(handles=[hollow, filled], loc="outside upper left", ncols=2)
    size = 8.0 if pitch > 0.2 else 6.5
    panels[0].set_yticks(rows, [label(name) for name in table["class"]], fontsize=size)
    panels[0].set_ylim(len(table) - 0.4, -0.6)
    return figure
