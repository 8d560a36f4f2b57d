# SPDX-License-Identifier: MIT
"""How hard a class must be pushed: critical strengths per class, and approximation against the exact value."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from salve.report.style import BLACK, BLUE, GREEN, GREY, PURPLE, WIDTH, log_axis, log_range, new_figure, styled
from salve.report.tables import column, critical, is_on_grid
from salve.report.text import count_of, label, percent

MAX_ROWS = 100
POINTS_PER_CLASS = 300
POINTS_PER_PANEL = 20_000


def _box(axes: Axes, row: int, values: NDArray[np.floating], right: float, colour: str) -> None:
    """Median, quartiles and 10–90 % range that count +inf as a value; what lies at infinity ends at the right edge."""
    # "inverted_cdf" picks an observed value: interpolating between a number and infinity would give NaN.
    q = np.quantile(values, [0.1, 0.25, 0.5, 0.75, 0.9], method="inverted_cdf").clip(max=right)
    axes.plot([q[0], q[4]], [row, row], color=colour, linewidth=1.2, solid_capstyle="butt")
    axes.add_patch(Rectangle((q[1], row - 0.28), q[3] - q[1], 0.56, facecolor="white", edgecolor=colour, zorder=3))
    axes.plot([q[2], q[2]], [row - 0.28, row + 0.28], color=BLACK, linewidth=2, solid_capstyle="butt", zorder=4)


def _strength_panel(
    axes: Axes, groups: Sequence[NDArray[np.floating]], limits: tuple[float, float], colour: str, size: float
) -> None:
    log_axis(axes, "x", limits)
    dots_x, dots_y = [], []
    for row, values in enumerate(groups):
        if not len(values):
            continue
        values = np.sort(values).clip(min=limits[0])
        finite = values[np.isfinite(values)]
        finite = finite[:: max(1, -(-len(finite) // POINTS_PER_CLASS))]
        # Golden-ratio steps spread the points evenly and alike in every run.
        dots_x.append(finite)
        dots_y.append(row + (np.arange(len(finite)) * 0.618034 % 1 - 0.5) * 0.7)
        _box(axes, row, values, limits[1], colour)
        never = float(np.isinf(values).mean())
        text = percent(never, 0) if never else "0"
        axes.text(
            1.02,
            row,
            text,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=size,
            color=BLACK if never else GREY,
        )
    if dots_x:
        x, y = np.concatenate(dots_x), np.concatenate(dots_y)
        axes.plot(x, y, ".", color=colour, alpha=0.3, markersize=3.5, markeredgewidth=0, rasterized=True, zorder=2)
    axes.text(1.02, 1.0, "never (∞)", transform=axes.transAxes, va="bottom", fontsize=7.5, color="#4b535c")


@styled
def strength_distributions(images: pd.DataFrame, classes: Sequence[str]) -> Figure | None:
    """α_flip and α_logit per class: box, points, and the share that is infinite.

    Args:
        images: columns class, flip_exact, logit_exact (α ≥ 0, may be inf), or flip_crossing, logit_crossing.
        classes: the rows and their order; beyond ``MAX_ROWS`` the first ones are shown.

    Returns:
        None where no image has a value.
    """
    classes = classes[:MAX_ROWS]
    panels = []
    criteria: tuple[tuple[Literal["logit", "flip"], str, str], ...] = (
        ("flip", "α_flip: the prediction leaves the class", BLUE),
        ("logit", "α_logit: the class logit reaches zero", GREEN),
    )
    for name, title, colour in criteria:
        values = critical(images, name).to_numpy()
        known = ~np.isnan(values)
        groups = [values[known & (images["class"] == one).to_numpy()] if len(images) else values for one in classes]
        if known.any():
            panels.append((title, colour, groups, log_range(values[known])))
    if not panels:
        return None
    large = len(classes) > 30
    pitch, size = (0.15, 6.0) if large else (0.3, 8.0)
    figure = new_figure(WIDTH * (1 if len(panels) == 2 else 0.6), 1.1 + pitch * len(classes))
    grid = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (title, colour, groups, limits) in zip(grid, panels, strict=True):
        _strength_panel(axes, groups, limits, colour, size)
        axes.set_title(title + "\n")
        axes.set_xlabel("strength α (logarithmic)")
    grid[0].set_yticks(range(len(classes)), [label(name) for name in classes], fontsize=size)
    grid[0].set_ylim(len(classes) - 0.4, -0.6)
    return figure


def _scatter(axes: Axes, x: NDArray[np.floating], y: NDArray[np.floating], colour: str, found: str) -> None:
    known = ~np.isnan(x) & ~np.isnan(y)
    x, y = x[known], y[known]
    both = np.isfinite(x) & np.isfinite(y)
    limits = log_range(np.concatenate([x[both], y[both]]))
    log_axis(axes, "x", limits)
    log_axis(axes, "y", limits)
    axes.plot(limits, limits, color=GREY, linewidth=1, zorder=1)
    step = max(1, -(-int(both.sum()) // POINTS_PER_PANEL))
    axes.plot(
        x[both][::step].clip(min=limits[0]), y[both][::step].clip(min=limits[0]),
        ".", color=colour, alpha=0.35, markersize=4, markeredgewidth=0, rasterized=True,
    )  # fmt: skip
    axes.set_aspect("equal")
    counts = (
        (int(both.sum()), "both finite"),
        (int((np.isinf(x) & np.isinf(y)).sum()), "both ∞"),
        (int((np.isinf(x) & np.isfinite(y)).sum()), f"only the {found} one ∞"),
        (int((np.isfinite(x) & np.isinf(y)).sum()), "only the other ∞"),
    )
    lines = [f"{count_of(count)} {text}" for count, text in counts if count]
    axes.text(0.03, 0.97, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=7.5, color="#4b535c")


@styled
def agreement_scatter(images: pd.DataFrame) -> Figure | None:
    """The approximation and the empirical value against the exact critical strength, with the identity line.

    Where strengths were found on a grid, the approximation alone against the strength refined by bisection.

    Args:
        images: columns logit_linear, logit_exact, flip_linear, flip_exact, flip_grid (α ≥ 0, may be inf); or
            logit_crossing and flip_crossing instead of the exact ones.

    Returns:
        None where no pair of columns has a value. Values at +inf are counted in the panel, not drawn.
    """
    refined = is_on_grid(images)
    found = "refined" if refined else "exact"
    pairs: tuple[tuple[Literal["logit", "flip"], str, str, str, str], ...] = (
        ("logit", "logit_linear", "α_logit", "linear approximation", GREEN),
        ("flip", "flip_linear", "α_flip", "linear approximation", BLUE),
        ("flip", "flip_grid", "α_flip", "first α of the grid that flips", PURPLE),
    )
    panels = [
        pair
        for pair in (pairs[:2] if refined else pairs)
        if (critical(images, pair[0]).notna() & column(images, pair[1]).notna()).any()
    ]
    if not panels:
        return None
    figure = new_figure(WIDTH * len(panels) / 3, 3.5)
    for axes, (criterion, other, title, name, colour) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        _scatter(axes, critical(images, criterion).to_numpy(), column(images, other).to_numpy(), colour, found)
        axes.set_title(title)
        axes.set_xlabel(f"{found} {title}")
        axes.set_ylabel(name)
    return figure
