# SPDX-License-Identifier: MIT
"""What each latent means for each class: the signed heat map of class means; and how much latents are used."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from salve.metrics import ALMOST_DEAD, DENSE
from salve.report.style import BLACK, BLUE, GREEN, GREY, WIDTH, log_axis, new_figure, percent_axis, styled
from salve.report.text import label

MAX_ROWS = 100
EXTRA_COLUMNS = 12


def heat_map_columns(means: NDArray[np.floating], selected: Sequence[int | None]) -> tuple[list[int], list[int]]:
    """Which latents the heat map shows.

    Args:
        means: [C, d] signed class-conditional means.
        selected: the latent chosen for each class, in class order; None where there is none.

    Returns:
        The chosen latents in class order without repeats (so that they lie on the diagonal), and up to
        ``EXTRA_COLUMNS`` others with the largest mean in any class, largest first.
    """
    chosen = list(dict.fromkeys(latent for latent in selected if latent is not None and 0 <= latent < means.shape[1]))
    strength = np.nan_to_num(np.abs(means)).max(axis=0) if means.size else np.zeros(means.shape[1])
    rest = [int(i) for i in np.argsort(-strength, kind="stable") if int(i) not in set(chosen) and strength[i] > 0]
    return chosen, rest[:EXTRA_COLUMNS]


@styled
def class_mean_heat_map(
    means: NDArray[np.floating], classes: Sequence[str], selected: Sequence[int | None]
) -> Figure | None:
    """Signed class means [classes × latents], chosen latents on the diagonal, other strong latents to the right.

    Args:
        means: [C, d] signed class-conditional means of the latents.
        classes: C class names.
        selected: the latent chosen for each class; None where there is none.

    Returns:
        None where no latent has a mean other than zero. Beyond ``MAX_ROWS`` classes the first ones are shown.
    """
    classes, selected, means = classes[:MAX_ROWS], selected[:MAX_ROWS], means[:MAX_ROWS]
    chosen, rest = heat_map_columns(means, selected)
    columns: list[int | None] = [*chosen, *([None] if chosen and rest else []), *rest]
    if not columns:
        return None
    values = np.full((len(classes), len(columns)), np.nan)
    for position, latent in enumerate(columns):
        if latent is not None:
            values[:, position] = means[:, latent]
    finite = np.abs(values[np.isfinite(values)])
    # One outlying latent would wash out the rest: the scale ends at the 99th percentile of what is not zero.
    limit = float(np.quantile(finite[finite > 0], 0.99)) if (finite > 0).any() else 1.0
    beyond = "both" if finite.size and finite.max() > limit * 1.001 else "neither"

    large = len(classes) > 30
    pitch = 0.15 if large else 0.27
    width = min(WIDTH, 2.6 + max(0.13 if large else 0.33, 0.0) * len(columns))
    figure = new_figure(max(width, 4.5), max(2.3, 1.0 + pitch * len(classes)))
    axes = figure.subplots()
    axes.grid(False)
    image = axes.imshow(
        values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest", rasterized=True
    )
    for row, latent in enumerate(selected):
        if latent in chosen:
            box = (chosen.index(latent) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(box, 1, 1, fill=False, edgecolor=BLACK, linewidth=0.6 if large else 1.1))
    size = 6.0 if large else 8.0
    axes.set_yticks(range(len(classes)), [label(name) for name in classes], fontsize=size)
    step = 1 if len(columns) <= 45 else -(-len(columns) // 45)
    ticks = [i for i, latent in enumerate(columns) if latent is not None and (i % step == 0 or step == 1)]
    axes.set_xticks(ticks, [str(columns[i]) for i in ticks], fontsize=size, rotation=90 if len(columns) > 20 else 0)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("latent: chosen for a class (boxed), then the strongest of the others" if rest else "latent")
    bar = figure.colorbar(image, ax=axes, extend=beyond, shrink=0.9 if not large else 0.3, pad=0.01, aspect=25)
    bar.set_label("mean over the class's images")
    bar.outline.set_visible(False)
    return figure


@styled
def latent_use(
    frequency: NDArray[np.floating], counts: NDArray[np.integer], edges: NDArray[np.floating]
) -> Figure | None:
    """How often latents fire and how large they are where they do, both on logarithmic axes.

    Args:
        frequency: [d] share of images for which each latent fires. counts: [d, E + 1] how often a latent's share of the
            activation's norm lay below the first edge, between two, and above the last. Without any between, that panel
            is left out.
        edges: [E].

    Returns:
        None where no latent fires. Latents that never fire are in neither panel.
    """
    fires = frequency[frequency > 0]
    if not len(fires):
        return None
    sizes = counts.sum(axis=0)[1:-1] if counts.size else np.zeros(0)
    panels = 2 if sizes.any() else 1
    figure = new_figure(WIDTH * 0.4 * panels, 2.5)
    axes = np.atleast_1d(figure.subplots(1, panels))
    # Four bins per decade that end at 1: one latent that fires for all images lies in the last.
    decades = max(1, int(np.ceil(-np.log10(fires.min()) - 1e-9)))
    bins = np.logspace(-decades, 0, 4 * decades + 1)
    heights, _ = np.histogram(fires.clip(bins[0], 1.0), bins)
    _bars(axes[0], bins, heights, BLUE, "images for which a latent fires, share")
    axes[0].set_ylabel("latents")
    axes[0].set_title("How often latents fire", pad=16)
    log_axis(axes[0], "x", (float(bins[0]) / 1.1, 1.1))
    for share, name, side in ((ALMOST_DEAD, "almost dead", "right"), (DENSE, "dense", "center")):
        if bins[0] < share:
            axes[0].axvline(share, color=GREY, linestyle="--", linewidth=1.2)
            axes[0].annotate(
                name, (share, 1), (0, 2), xycoords=axes[0].get_xaxis_transform(), textcoords="offset points",
                color=GREY, fontsize=7.5, ha=side, va="bottom",
            )  # fmt: skip
    if panels == 2:
        _bars(axes[1], edges, sizes / counts.sum(), GREEN, "|z| / ‖a‖: a latent's share of the activation's norm")
        axes[1].set_ylabel("share of firings")
        axes[1].set_title("How large they are where they fire", pad=16)
        used = np.flatnonzero(sizes)
        log_axis(axes[1], "x", (float(edges[used[0]]) / 1.1, float(edges[used[-1] + 1]) * 1.1))
        percent_axis(axes[1].yaxis)
    return figure


def _bars(axes: Axes, edges: NDArray[np.floating], heights: NDArray[np.floating], colour: str, name: str) -> None:
    axes.bar(edges[:-1], heights, np.diff(edges), align="edge", color=colour, edgecolor="white", linewidth=0.5)
    axes.set_xlabel(name)
