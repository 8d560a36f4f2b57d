# SPDX-License-Identifier: MIT
"""Training curves of the classifier and of the sparse autoencoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from salve.report.style import BLUE, GREEN, GREY, ORANGE, PURPLE, WIDTH, new_figure, percent_axis, styled
from salve.report.tables import column


@dataclass(frozen=True)
class Curve:
    """One small plot of a quantity over the training."""

    column: str
    title: str
    colour: str
    fraction: bool = False


SAE_CURVES = (
    Curve("fve", "Variance explained (FVE)", BLUE, fraction=True),
    Curve("l0", "Active latents per image (L0)", ORANGE),
    Curve("dead_fraction", "Dead latents", PURPLE, fraction=True),
    Curve("downstream_accuracy", "Accuracy, reconstructed", GREEN, fraction=True),
)


def _line(axes: Axes, epochs: np.ndarray, values: np.ndarray, colour: str, name: str = "") -> None:
    shown = np.isfinite(values)
    marker = "o" if shown.sum() <= 30 else ""
    axes.plot(epochs[shown], values[shown], color=colour, marker=marker, label=name or None)


def _finish(axes: Axes, title: str, epochs: Sequence[float], fraction: bool, unit: str = "epoch") -> None:
    axes.set_title(title)
    axes.set_xlabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(set(epochs)) < 2:
        axes.margins(x=0.5)
    if fraction:
        percent_axis(axes.yaxis)


@styled
def classifier_curves(history: pd.DataFrame) -> Figure:
    """Loss and accuracy by epoch, train and select images.

    Args:
        history: columns epoch, split ("train" | "select"), loss [nats], accuracy [fraction].
    """
    figure = new_figure(WIDTH * 0.8, 2.7)
    panels = (("loss", "Loss (cross-entropy, nats)", False), ("accuracy", "Accuracy", True))
    for axes, (name, title, fraction) in zip(figure.subplots(1, 2), panels, strict=True):
        for split, colour, text in (("train", ORANGE, "train images"), ("select", BLUE, "select images")):
            rows = history[history["split"] == split]
            _line(axes, column(rows, "epoch").to_numpy(), column(rows, name).to_numpy(), colour, text)
        _finish(axes, title, list(column(history, "epoch")), fraction)
    figure.axes[1].legend(loc="lower right")
    return figure


@styled
def sae_curves(history: pd.DataFrame, original_accuracy: float | None = None) -> Figure | None:
    """FVE, L0, dead fraction and downstream accuracy by optimiser step, those that were logged.

    Args:
        history: columns step, and any of fve, l0, dead_fraction, downstream_accuracy.
        original_accuracy: accuracy of the untouched classifier, drawn as a dashed line [fraction].

    Returns:
        None where nothing was logged.
    """
    curves = [curve for curve in SAE_CURVES if np.isfinite(column(history, curve.column)).any()]
    if not curves:
        return None
    done = column(history, "step").to_numpy()
    figure = new_figure(WIDTH * len(curves) / 4, 2.3)
    for axes, curve in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves, strict=True):
        _line(axes, done, column(history, curve.column).to_numpy(), curve.colour)
        if curve.column == "downstream_accuracy" and original_accuracy is not None:
            axes.axhline(original_accuracy, color=GREY, linestyle="--", linewidth=1.2, label="unchanged activations")
            axes.legend(loc="lower right")
        _finish(axes, curve.title, list(done), curve.fraction, "step")
    return figure
