"""The feature atlas: each class's dominant latents, what excites them, where they look, which classes share them."""

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from experiments.claims import Measured
from experiments.experiment import Experiment, Findings, Picture, main, measured, per_testbed, said
from experiments.figures import PRINT_WIDTH, printed, tile
from experiments.runs import Study
from salve.report.figures.validate import overlay
from salve.report.style import BLACK, BLUE, GREY, VERMILLION, new_figure
from salve.report.text import label

#: How many of the images that excite a latent most are counted by class.
MOST = 20
#: Latents listed for each class, and classes on a figure.
LISTED, ROWS = 3, 12
#: Pairs of an image and its overlay in a row.
PAIRS = 3
COLOURS = {"class-defining": BLUE, "cross-class": VERMILLION, "diffuse": GREY, "dead": GREY}


def own_share(
    latents: Float[Tensor, "N d"], labels: Int[Tensor, " N"], chosen: int, sign: int, own: int, most: int = MOST
) -> float:
    """Share of class ``own`` among the images that excite a latent most; a negative sign turns the order round."""
    top = (sign * latents[:, chosen]).topk(min(most, len(latents))).indices
    return float((labels[top] == own).double().mean())


def classes_table(study: Study) -> pd.DataFrame:
    """One row per class that has a latent: the latent, how pure it is, and the scores of stage ``validate``.

    Columns: ``testbed``, ``class``, ``latent``, ``sign``, ``share``, ``kind``; ``own_share`` (:func:`own_share`) and
    ``expected_share``: of the class among all test images; ``maximised``, ``strongest``: the latent's value, times its
    sign, for the maximised image and for the most exciting test image; ``insertion``, ``deletion`` and those of
    a random map, and where the data have masks ``pointing`` and ``iou`` with a random latent's.
    """
    run = study.runs[0]
    latents = run.sae.encode(study.test.activations)
    scores = run.table("validate", "localisation.csv").set_index("class")
    made = pd.Series(dtype=float)
    if "maximisation.csv" in run.files("validate"):
        made = run.table("validate", "maximisation.csv").set_index("class")["final_value"]
    rows = []
    for own, (name, chosen) in enumerate(run.selected.iterrows()):
        if pd.isna(chosen["latent"]):
            continue
        latent, sign = int(chosen["latent"]), int(chosen["sign"])
        row = {
            **{"testbed": study.testbed.name, "class": name, "latent": latent, "sign": sign},
            **{"share": float(chosen["share"]), "kind": chosen["kind"]},
            "own_share": own_share(latents, study.test.labels, latent, sign, own),
            "expected_share": float((study.test.labels == own).double().mean()),
            "strongest": float((sign * latents[:, latent]).max()),
            "maximised": float(made.get(name, np.nan)) * sign,
        }
        rows.append(row | scores.drop(columns=["latent"], errors="ignore").loc[name].to_dict())
    return pd.DataFrame(rows)


@printed
def atlas_figure(study: Study) -> Figure:
    """A row per class: its dominant latents in words, the image that maximises the first, top images, Grad-FAM."""
    run = study.runs[0]
    dominant = run.table("features", "dominant.csv")
    seen = {name: tensor.numpy() for name, tensor in run.tensors("validate", "saliency.safetensors").items()}
    made = None
    if "maximisation.safetensors" in run.files("validate"):
        made = run.tensors("validate", "maximisation.safetensors")["images"].numpy()
    top = run.table("validate", "top.csv").set_index(["class", "rank"])["label"]
    names = [name for name in study.classes if pd.notna(run.selected.loc[name, "latent"])][:ROWS]
    text, gap = 1.6, 0.04
    size = (PRINT_WIDTH - text) / (1 + 2 * PAIRS) - gap
    height = len(names) * (size + gap) + 0.3
    figure = new_figure(PRINT_WIDTH, height, layout=None)
    for row, name in enumerate(names):
        y = height - 0.3 - (row + 1) * (size + gap)
        words = figure.add_axes((0, y / height, text / PRINT_WIDTH, size / height))
        _words(words, name, dominant[dominant["class"] == name].head(LISTED))
        own = study.classes.index(name)
        images, maps = seen["images"][own], seen["maps"][own]
        count = min(PAIRS, len(images))
        blank = np.full((*images.shape[2:], 3), 255, np.uint8)
        pictures = [blank if made is None else made[own].transpose(1, 2, 0)]
        for place in range(count):
            pictures += [images[place].transpose(1, 2, 0), overlay(images[place], maps[place])]
        for column, picture in enumerate(pictures):
            axes = tile(figure, (text + column * (size + gap) + (gap if column else 0), y, size, size), picture)
            if column % 2 == 1 and top.get((name, column // 2 + 1)) != name:
                axes.spines[:].set(visible=True, color=VERMILLION, linewidth=1.5)
            if row == 0:
                title = "maximised" if column == 0 else ("strongest" if column % 2 else "Grad-FAM")
                axes.set_title(title, fontsize=7.5, fontweight="normal", pad=3)
    return figure


def _words(axes: Axes, name: str, dominant: pd.DataFrame) -> None:
    """A class's dominant latents: number with sign, share, kind."""
    axes.axis("off")
    axes.text(0, 0.93, label(name), fontsize=8.5, fontweight="bold", va="top")
    for place, row in enumerate(dominant.to_dict("records")):
        text = f"{row['latent']}{'+' if row['sign'] > 0 else '−'}  {100 * row['share']:.0f} %  {row['kind']}"
        colour = COLOURS[row["kind"]] if row["kind"] in ("class-defining", "cross-class") else BLACK
        axes.text(0, 0.66 - 0.22 * place, text, fontsize=7, va="top", color=colour)


def shown_latents(dominant: pd.DataFrame, listed: int = LISTED) -> list[int]:
    """The latents that any class lists, each once, in the order of the table."""
    return list(dict.fromkeys(dominant[dominant["rank"] <= listed]["latent"].astype(int)))


@printed
def means_figure(study: Study) -> Figure:
    """Heat map of class means: classes by the latents that any of them lists."""
    run = study.runs[0]
    dominant = run.table("features", "dominant.csv")
    means: Float[np.ndarray, "C d"] = run.tensors("features", "class_means.safetensors")["class_means"].numpy()
    kinds = run.table("features", "latents.csv").set_index("latent")["kind"]
    columns = shown_latents(dominant, LISTED if len(study.classes) <= ROWS else 1)
    shown = means[:, columns]
    few = len(study.classes) <= ROWS
    figure = new_figure(PRINT_WIDTH, 1.0 + (0.22 if few else 0.08) * len(study.classes))
    axes = figure.subplots()
    limit = np.nanmax(np.abs(shown))
    picture = axes.imshow(shown, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    chosen = run.selected["latent"]
    points = [(columns.index(int(la)), k) for k, la in enumerate(chosen) if pd.notna(la) and int(la) in columns]
    axes.plot(*np.array(points).T, linestyle="", marker="o", color=BLACK, markersize=3)
    axes.set_yticks(range(len(study.classes)), [label(name) for name in study.classes], fontsize=8 if few else 4)
    axes.set_xticks(range(len(columns)), [str(la) for la in columns], rotation=90, fontsize=7 if few else 3.5)
    for tick, latent in zip(axes.get_xticklabels(), columns, strict=True):
        tick.set_color(COLOURS[kinds[latent]] if few else BLACK)
    axes.grid(visible=False)
    axes.set_xlabel("latent (blue: class-defining, red: cross-class, grey: diffuse)")
    figure.colorbar(picture, ax=axes, label="class mean μ", fraction=0.03, pad=0.015)
    return figure


@per_testbed
def analyse(study: Study) -> Findings:
    name, table, run = study.testbed.name, classes_table(study), study.runs[0]
    pictures = {
        f"atlas-{name}": Picture.of(atlas_figure(study), "atlas.dominant", study, listed=LISTED),
        f"means-{name}": Picture.of(means_figure(study), "atlas.means", study),
    }
    tables = {
        "classes": table,
        "latents": run.table("features", "latents.csv").assign(testbed=name),
        "dominant": run.table("features", "dominant.csv").assign(testbed=name),
    }
    return Findings(_paragraph(study, table), pictures, tables, _measured(study, table))


def faithful(table: pd.DataFrame) -> pd.Series:
    """Whether a class's maps beat random ones by insertion and by deletion."""
    return (table["insertion"] > table["random_insertion"]) & (table["deletion"] < table["random_deletion"])


def _measured(study: Study, table: pd.DataFrame) -> list[Measured]:
    lowest = table.loc[table["own_share"].idxmin()]
    shares = {"defining": table["kind"] == "class-defining"}
    if "insertion" in table:
        shares["faithful"] = faithful(table)
    if table["maximised"].notna().any():
        shares["maximised"] = table["maximised"] > table["strongest"]
    found = [measured("atlas.own_images", study, table["own_share"].mean(), most=MOST, lowest=lowest)]
    for claim, true in shares.items():
        found.append(measured(f"atlas.{claim}", study, true.mean(), count=true.sum(), of=len(true)))
    return found


def _paragraph(study: Study, table: pd.DataFrame) -> str:
    kinds = study.runs[0].table("features", "latents.csv")["kind"].value_counts()
    counts = ", ".join(f"{kinds.get(kind, 0)} {kind}" for kind in ("class-defining", "cross-class", "diffuse", "dead"))
    means = table.mean(numeric_only=True)
    text = [said("atlas.found", study, total=kinds.sum(), counts=counts, most=MOST, means=means)]
    if "insertion" in table:
        failing = table[~faithful(table)]["class"].tolist()
        beaten = f"for all classes but {', '.join(failing)}" if failing else "for every class"
        text.append(said("atlas.faithful", beaten=beaten))
    if "pointing" in table:
        text.append(said("atlas.pointing", means=means))
    if table["maximised"].notna().any():
        text.append(said("atlas.maximised", times=(table["maximised"] / table["strongest"]).median()))
    return " ".join(text)


EXPERIMENT = Experiment(
    "atlas",
    "Feature atlas",
    analyse,
    quick=("sae.epochs=20", "validate.maximisation_steps=16", "validate.faithfulness_steps=4"),
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
