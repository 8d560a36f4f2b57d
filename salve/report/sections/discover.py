"""The classifier, the sparse autoencoder, and what its latents mean for the classes."""

from collections.abc import Mapping
from typing import Any

from salve.report.blocks import Block, Cell, FigureBlock, Prose, Section, Shelf, TableBlock
from salve.report.figures import discover as figures
from salve.report.figures import training
from salve.report.inputs import Artifacts, column, records
from salve.report.tables import overall_accuracy
from salve.report.text import count_of, is_missing, latent_name, number, percent, plural, slug

MAX_RANKS = 6
FOLD_ROWS = 25


def classifier(artifacts: Artifacts, shelf: Shelf) -> Section:
    """What was trained and how well it does before anything is changed."""
    record = artifacts.record("classifier", "classifier.json")
    history, classes = artifacts.table("classifier", "history.csv"), artifacts.table("features", "classes.csv")
    blocks: list[Block] = []
    if record:
        mode = {"full": "all weights were fine-tuned", "probe": "only the head was trained, on a frozen backbone"}
        how = mode.get(str(record.get("mode")), "its weights were taken as they are")
        images = f" of {count_of(classes['val_images'].sum())} validation images" if len(classes) else ""
        blocks.append(
            Prose(
                f"The classifier is {record.get('backbone', 'a network')}; {how}. It is right on "
                f"{percent(overall_accuracy(artifacts))}{images}; every edit below is compared with this frozen "
                "original."
            )
        )
    if len(history) and "split" in history:
        blocks += shelf.figure(
            training.classifier_curves(history),
            "classifier-training",
            "Two line plots of the classifier's loss and accuracy by epoch, for training and validation images.",
            "Loss and accuracy after each epoch. Validation (blue) should follow training (orange): a widening gap in "
            "the loss means that the classifier learns its training images by heart. Training images are augmented, so "
            "they can score below the validation images.",
            "classifier-history.csv",
        )
    return Section("classifier", "The classifier", blocks, "finetune")


def discover(artifacts: Artifacts, shelf: Shelf) -> Section:
    """The sparse autoencoder and what its latents mean for the classes."""
    blocks: list[Block] = []
    record, history = artifacts.record("sae", "sae.json"), artifacts.table("sae", "history.csv")
    if record:
        parts = [
            f"A sparse autoencoder ({record.get('variant', 'unknown')}, {record.get('dictionary_size', '?')} "
            f"latents) was trained on the {record.get('width', '?')} activations that the head reads.",
            f"It explains {percent(record.get('fve'))} of their variance with {number(record.get('l0'))} active "
            f"latents per image, {percent(record.get('dead_fraction'))} of latents are dead, and the classifier "
            f"keeps {percent(record.get('downstream_accuracy'))} accuracy on its reconstructions "
            f"({percent(record.get('original_accuracy'))} before).",
        ]
        blocks.append(Prose(" ".join(parts)))
    if len(history):
        original = record.get("original_accuracy")
        blocks += shelf.figure(
            training.sae_curves(history, None if original is None else float(original)),
            "discover-training",
            "Line plots by epoch: variance explained, active latents, dead latents, accuracy on reconstructions.",
            "Training of the autoencoder. Variance explained and accuracy should level off high, L0 low: a few "
            "latents then carry what the classifier uses.",
            "sae-history.csv",
        )
    blocks += _class_means(artifacts, shelf)
    blocks += _latent_tables(artifacts)
    return Section("discover", "Discover: which latents carry which class", blocks, "discover")


def _class_means(artifacts: Artifacts, shelf: Shelf) -> list[FigureBlock]:
    means = artifacts.tensors("features", "class_means.safetensors").get("class_means")
    classes = artifacts.classes()
    if means is None or len(means) != len(classes):
        return []
    chosen = artifacts.selected()
    latents = [chosen.get(name, {}).get("latent") for name in classes]
    picks = [None if is_missing(latent) else int(float(str(latent))) for latent in latents]
    shown = figures.MAX_ROWS
    more = f" The first {shown} of {len(classes)} classes are shown." if len(classes) > shown else ""
    return shelf.figure(
        figures.class_mean_heat_map(means, classes, picks),
        "discover-class-means",
        "Heat map of the mean of each latent over each class's images; the chosen latents form the diagonal.",
        "Mean of a latent (column) over the images of a class (row), with its sign: red positive, blue negative. A "
        "clean diagonal means that each class has a latent of its own; colour elsewhere in a boxed latent's column "
        "means that an edit of it will touch those classes too." + more,
        "features-dominant.csv",
    )


def _latent_tables(artifacts: Artifacts) -> list[Block]:
    blocks: list[Block] = []
    dominant, latents = artifacts.table("features", "dominant.csv"), artifacts.table("features", "latents.csv")
    if len(latents) and "kind" in latents:
        counts = latents["kind"].value_counts()
        order = ("class-defining", "cross-class", "diffuse", "dead")
        listed = ", ".join(f"{int(counts.get(kind, 0))} {kind}" for kind in order)
        blocks.append(
            Prose(
                f"Of {plural(len(latents), 'latent')}: {listed}. A latent is class-defining when one class holds at "
                "least half of its absolute class means, cross-class when two or more hold at least a quarter "
                "each, else diffuse.",
                "Dominant latents",
            )
        )
    if len(dominant) and "class" in dominant:
        ranks = sorted({int(rank) for rank in column(dominant, "rank").dropna()})[:MAX_RANKS]
        header = [Cell("class"), *(Cell(f"rank {rank}") for rank in ranks)]
        rows = []
        for name in dict.fromkeys(dominant["class"]):
            own = {int(row["rank"]): row for row in records(dominant[dominant["class"] == name])}
            rows.append([Cell(name), *(_dominant_cell(own.get(rank)) for rank in ranks)])
        title = "Latents with the largest absolute mean per class: number (sign), mean, share of all class means, kind"
        blocks.append(TableBlock(title, header, rows, "features-dominant.csv", folded=len(rows) > FOLD_ROWS))
    return blocks


def _dominant_cell(row: Mapping[str, Any] | None) -> Cell:
    if row is None or is_missing(row.get("latent")):
        return Cell("–", "dim")
    kind = str(row.get("kind", ""))
    note = f"{number(row.get('mean'))} · {percent(row.get('share'), 0)} · {kind}"
    return Cell(latent_name(row["latent"], row.get("sign")), f"kind-{slug(kind)}", note)
