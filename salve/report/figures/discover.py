"""What each latent means for each class: the signed heat map of class means."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from salve.report.style import BLACK, WIDTH, new_figure, styled
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
