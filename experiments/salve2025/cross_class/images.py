"""The figure of images: where a shared latent looks, in the classes that depend on it and in one that rises."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from experiments.figures import PRINT_WIDTH
from experiments.runs import Study
from experiments.salve2025.cross_class.figure import COLOURS
from experiments.salve2025.cross_class.roles import FALLS, REDUNDANT, RISES, STAYS
from experiments.salve2025.cross_class.tables import Case
from salve.report.figures.validate import overlay
from salve.report.style import new_figure, styled
from salve.report.text import label
from salve.saliency import grad_fam

#: Images of each class.
IMAGES = 3


class Strip(NamedTuple):
    """Images of one class: the strongest, or those that it ``gained``.

    Attributes:
        images: their indices in test. sign: of the latent, for the maps.
    """

    title: str
    colour: str
    images: list[int]
    sign: int
    gained: bool


def strips_of(case: Case) -> list[Strip]:
    """Of the classes that depend most on the latent, the images in which it is strongest; of the class that rises most,
    the images that it gains, by how much."""
    study, shared, roles = case.reading.study, case.shared, case.roles
    values = case.reading.run.sae.encode(study.test.activations)[:, shared.latent]
    found = []
    seen = set(study.test.labels.tolist())
    dependent = sorted((k for k in shared.classes if k in seen), key=lambda k: roles.roles[k] != FALLS)
    shown = [*dependent[:1], *sorted(dependent[1:], key=lambda k: roles.roles[k] not in (REDUNDANT, STAYS))[:1]]
    for k in shown:
        sign = -1 if float(case.reading.means[k, shared.latent]) < 0 else 1
        mine = (study.test.labels == k).nonzero()[:, 0]
        top = mine[(sign * values[mine]).argsort(descending=True)[:IMAGES]].tolist()
        text = f"{label(study.classes[k], 18)} {roles.roles[k]} ({100 * roles.change.mean[k]:+.0f})"
        found.append(Strip(text.replace("-", "−"), COLOURS[roles.roles[k]], top, sign, False))
    for k in [k for k in case.classes(RISES) if k not in shown][:1]:
        gained = (study.test.labels == k) & (roles.before != k) & (roles.after == k)
        taken = torch.isin(roles.before, torch.tensor(shared.classes))
        from_them = (gained & taken).nonzero()[:, 0]
        top = from_them[roles.gain[from_them].argsort(descending=True)[:IMAGES]].tolist()
        text = f"{label(study.classes[k], 18)} rises ({100 * roles.change.mean[k]:+.0f}), once taken for"
        if top:
            found.append(Strip(text, COLOURS[RISES], top, -1 if float(values[top].mean()) < 0 else 1, True))
    return found


def maps_of(case: Case, strip: Strip) -> tuple[NDArray[np.uint8], NDArray[np.floating], list[float]]:
    """Images ``[n, 3, S, S]``, their Grad-FAM maps ``[n, S, S]`` of the latent, and its values."""
    study, run = case.reading.study, case.reading.run
    context, dataset = study.context, study.context.data.dataset("test")
    model, site = context.model(run.found.artifact("classifier"))
    pictures = torch.stack([dataset[i][0] for i in strip.images])
    sae = run.sae.to(context.device)
    maps = grad_fam(model, site.name, sae, pictures.to(context.device), [case.shared.latent],
                    signs=torch.tensor([strip.sign], device=context.device))  # fmt: skip
    sae.cpu()
    assert context.data.preprocess is not None
    shown: Tensor = context.data.preprocess.denormalise(pictures)
    values = sae.encode(study.test.activations[strip.images])[:, case.shared.latent].tolist()
    return (255 * shown).round().to(torch.uint8).numpy(), maps[:, 0].cpu().numpy(), values


@styled
def images_figure(study: Study, cases: Sequence[Case]) -> tuple[Figure, pd.DataFrame]:
    """Two rows per latent: images of up to three classes, and under each its overlay; and a table of what is shown."""
    cell = PRINT_WIDTH / (3 * IMAGES + 1.2)
    figure = new_figure(PRINT_WIDTH, (2 * cell + 0.70) * len(cases) + 0.05, layout=None)
    height, rows = figure.get_size_inches()[1], []
    for place, case in enumerate(cases):
        top = height - 0.05 - place * (2 * cell + 0.70)
        figure.text(0.005, (top - 0.02) / height, case.title, fontsize=8.5, va="top",
                    fontweight="bold")  # fmt: skip
        for group, strip in enumerate(strips_of(case)):
            images, maps, values = maps_of(case, strip)
            left = group * (IMAGES * cell + 0.5 * cell) + 0.05 * cell
            figure.text(left / PRINT_WIDTH, (top - 0.30) / height, strip.title, fontsize=7.8, color=strip.colour,
                        fontweight="bold", va="center")  # fmt: skip
            for column, index in enumerate(strip.images):
                tiles = (images[column].transpose(1, 2, 0), overlay(images[column], maps[column]))
                for line, tile in enumerate(tiles):
                    bottom = top - 0.38 - (line + 1) * cell
                    box = ((left + column * cell) / PRINT_WIDTH, bottom / height)
                    axes = figure.add_axes((*box, 0.97 * cell / PRINT_WIDTH, 0.97 * cell / height))
                    axes.imshow(tile, interpolation="antialiased", aspect="auto")
                    axes.axis("off")
                before = study.classes[int(case.roles.before[index])]
                note = f"{values[column]:+.2f}".replace("-", "−")
                if strip.gained:
                    note += f"\n{label(before, 11)}"
                figure.text((left + (column + 0.5) * cell) / PRINT_WIDTH, (top - 0.40 - 2 * cell) / height, note,
                            fontsize=7, ha="center", va="top")  # fmt: skip
                own, after = int(study.test.labels[index]), int(case.roles.after[index])
                row = {"testbed": study.testbed.name, "latent": case.title, "image": index, "value": values[column]}
                row |= {"class": study.classes[own], "before": before, "after": study.classes[after]}
                rows.append(row | {"sign": strip.sign, "map_maximum": float(maps[column].max())})
    return figure, pd.DataFrame(rows)
