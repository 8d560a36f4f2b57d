# SPDX-License-Identifier: MIT
"""The classifier, the SAE, and what its latents mean for the classes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from salve.metrics import ALMOST_DEAD, DENSE
from salve.report.blocks import Block, Cell, FigureBlock, FigureFolder, Prose, Section, TableBlock, numbers
from salve.report.figures import discover as figures
from salve.report.figures import training
from salve.report.tables import chosen_latents, class_names, column, overall_accuracy, records
from salve.report.text import count_of, is_missing, latent_name, number, percent, plural, slug
from salve.results import Artifacts

MAX_RANKS = 6
#: A probe is trained on captured activations of unaugmented images, so only full fine-tuning says this.
AUGMENTED = {"full": " Train images are augmented, so they can score below select images."}
FOLD_ROWS = 25


def classifier(artifacts: Artifacts, figure_folder: FigureFolder) -> Section:
    """The classifier before any edit."""
    record = artifacts.record("classifier", "classifier.json")
    history, classes = artifacts.table("classifier", "history.csv"), artifacts.table("features", "classes.csv")
    blocks: list[Block] = []
    if record:
        mode = {"full": "all weights were fine-tuned", "probe": "only the head was trained, on a frozen backbone"}
        how = mode.get(str(record.get("mode")), "its weights were taken as they are")
        images = f" of {count_of(column(classes, 'test_images').sum())} test images" if len(classes) else ""
        blocks.append(
            Prose(
                f"The classifier is {record.get('backbone', 'a network')}; {how}. It is right on "
                f"{percent(overall_accuracy(artifacts))}{images}; every edit below is compared with this frozen "
                "original."
            )
        )
    if len(history) and "split" in history:
        blocks += figure_folder.figure(
            training.classifier_curves(history),
            "classifier-training",
            "Two line plots of the classifier's loss and accuracy by epoch, for train and select images.",
            "Loss and accuracy after each epoch. Select images (blue), which choose the epoch that is kept, should "
            "follow train images (orange): a widening gap in the loss means that the classifier learns its train "
            "images by heart." + AUGMENTED.get(str(record.get("mode")), ""),
            "classifier-history.csv",
        )
    return Section("classifier", "The classifier", blocks, "finetune")


def discover(artifacts: Artifacts, figure_folder: FigureFolder) -> Section:
    """The sparse autoencoder and what its latents mean for the classes."""
    blocks: list[Block] = []
    record, history = artifacts.record("sae", "sae.json"), artifacts.table("sae", "history.csv")
    if record:
        parts = [
            f"A sparse autoencoder ({record.get('variant', 'unknown')}, {record.get('dictionary_size', '?')} "
            f"latents) was trained on the activations of {record.get('width', '?')} channels{_place(artifacts)}"
            + (f", for {plural(int(record['steps']), 'step')}" if record.get("steps") else "")
            + ".",
            f"On test images it explains {percent(record.get('fve'))} of their variance (FVE) with "
            f"{number(record.get('l0'))} active latents per image (L0); activation and reconstruction have a mean "
            f"cosine of {number(record.get('cosine'))}.",
            f"The classifier keeps {percent(record.get('downstream_accuracy'))} accuracy on its reconstructions "
            f"({percent(record.get('original_accuracy'))} before).",
            f"Of its latents {percent(record.get('dead_fraction'))} fire for no train image (dead), "
            f"{percent(record.get('almost_dead_fraction'))} for some but fewer than 1 in {number(1 / ALMOST_DEAD)} "
            f"(almost dead), and {percent(record.get('dense_fraction'))} for more than {percent(DENSE, 0)} (dense).",
        ]
        blocks.append(Prose(" ".join(parts)))
        blocks += _downstream_table(record)
    if len(history):
        original = record.get("select_original_accuracy")
        blocks += figure_folder.figure(
            training.sae_curves(history, None if original is None else float(original)),
            "discover-training",
            "Line plots over the training: variance explained, active latents, dead latents, accuracy on "
            "reconstructions.",
            "Training of the autoencoder, on select images. Variance explained (FVE) and accuracy should level off "
            "high, L0 low: a few latents then carry what the classifier uses.",
            "sae-history.csv",
        )
    blocks += _latent_use(artifacts, figure_folder)
    blocks += _class_means(artifacts, figure_folder)
    blocks += _latent_tables(artifacts)
    blocks += _purity_table(artifacts)
    blocks += _concept_table(artifacts)
    return Section("discover", "Discover: which latents carry which class", blocks, "discover")


def _place(artifacts: Artifacts) -> str:
    """Where the activations were captured."""
    record = artifacts.record("activations", "activations.json")
    if not record.get("site"):
        return ""
    place = f" at the site {record['site']}"
    if positions := record.get("positions"):
        place += f", at {count_of(record['sampled'])} of the {plural(math.prod(positions), 'position')} of each image"
    return place


def _downstream_table(record: Mapping[str, Any]) -> list[Block]:
    """What the network does on reconstructions, between its own activations and two ablations."""
    if is_missing(record.get("downstream_kl")):
        return []
    header = [Cell("the site holds"), *numbers("accuracy", "accuracy recovered", "KL (nats)", "KL recovered")]
    rows = [
        [Cell("unchanged activations"), *numbers(percent(record.get("original_accuracy")), "", number(0.0), "")],
        [
            Cell("reconstructions"),
            *numbers(percent(record.get("downstream_accuracy")), "", number(record["downstream_kl"]), ""),
        ],
    ]
    for name, anchor in (("the mean train activation", "mean"), ("zeros", "zero")):
        texts = (
            percent(record.get(f"{anchor}_accuracy")),
            percent(record.get(f"accuracy_recovered_from_{anchor}")),
            number(record.get(f"{anchor}_kl")),
            percent(record.get(f"kl_recovered_from_{anchor}")),
        )
        rows.append([Cell(name), *numbers(*texts)])
    title = (
        "What reconstructions keep for the classifier, on test images, between two ablations. KL: from the "
        "predictive distribution on unchanged activations, mean over images. Recovered: of what the row's ablation "
        "loses, the share that reconstructions do not lose; – where it loses nothing."
    )
    return [TableBlock(title, header, rows)]


def _latent_use(artifacts: Artifacts, figure_folder: FigureFolder) -> list[FigureBlock]:
    frequency = column(artifacts.table("features", "latents.csv"), "frequency").dropna().to_numpy()
    sizes = artifacts.tensors("features", "histograms.safetensors")
    counts, edges = sizes.get("counts", np.zeros((0, 0))), sizes.get("edges", np.zeros(0))
    dead = int((frequency == 0).sum())
    left_out = f" {plural(dead, 'latent')} of {count_of(len(frequency))} never fire and are not shown." if dead else ""
    return figure_folder.figure(
        figures.latent_use(frequency, counts, edges),
        "discover-latent-use",
        "Two histograms with logarithmic axes: how often latents fire, and how large they are where they fire.",
        "Left: for which share of the train images a latent fires. A latent of one class alone fires for about that "
        "class's share; rare ones tell few images apart, dense ones few classes. Right: what a latent adds, as a share "
        "of the activation's length, over all images for which it fires." + left_out,
        "features-latents.csv",
    )


def _class_means(artifacts: Artifacts, figure_folder: FigureFolder) -> list[FigureBlock]:
    means = artifacts.tensors("features", "class_means.safetensors").get("class_means")
    classes = class_names(artifacts)
    if means is None or len(means) != len(classes):
        return []
    chosen = chosen_latents(artifacts)
    latents = [chosen.get(name, {}).get("latent") for name in classes]
    picks = [None if is_missing(latent) else int(float(str(latent))) for latent in latents]
    shown = figures.MAX_ROWS
    more = f" The first {shown} of {len(classes)} classes are shown." if len(classes) > shown else ""
    return figure_folder.figure(
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
        # A linear latent that never fires still has small class means: this is not the number of dead latents.
        order = {kind: kind for kind in ("class-defining", "cross-class", "diffuse")} | {
            "dead": "zero in the mean of every class"
        }
        listed = ", ".join(f"{int(counts.get(kind, 0))} {words}" for kind, words in order.items())
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
        for name, part in dominant.groupby("class", sort=False):
            own = {int(row["rank"]): row for row in records(part)}
            rows.append([Cell(str(name)), *(_dominant_cell(own.get(rank)) for rank in ranks)])
        title = "Latents with the largest absolute mean per class: number (sign), mean, share of all class means, kind"
        blocks.append(TableBlock(title, header, rows, "features-dominant.csv", folded=len(rows) > FOLD_ROWS))
    return blocks


def _dominant_cell(row: Mapping[str, Any] | None) -> Cell:
    if row is None or is_missing(row.get("latent")):
        return Cell("–", "dim")
    kind = str(row.get("kind", ""))
    note = f"{number(row.get('mean'))} · {percent(row.get('share'), 0)} · {kind}"
    return Cell(latent_name(row["latent"], row.get("sign")), f"kind-{slug(kind)}", note)


def _purity_table(artifacts: Artifacts) -> list[Block]:
    """How pure each class's chosen latent is."""
    latents, classes = artifacts.table("features", "latents.csv"), class_names(artifacts)
    if not {"latent", "purity"} <= set(latents.columns):
        return []
    by_number = {int(row["latent"]): row for row in records(latents)}
    rows = []
    for name, chosen in chosen_latents(artifacts).items():
        found = {} if is_missing(chosen.get("latent")) else by_number.get(int(float(chosen["latent"])), {})
        images = "" if is_missing(found.get("purity")) else f"of {plural(int(found['purity_images']), 'image')}"
        rows.append(
            [
                Cell(name),
                Cell(latent_name(chosen.get("latent"), chosen.get("sign")), "nowrap"),
                *numbers(percent(found.get("frequency"))),
                Cell(percent(found.get("purity"), 0), "num", images),
                *numbers(number(found.get("entropy"))),
            ]
        )
    header = [Cell("class"), Cell("latent"), *numbers("fires for", "purity", "entropy (nats)")]
    mean = percent(column(latents, "purity").mean(), 0)
    title = (
        "The chosen latents, on train images. Purity: share of the images that excite a latent most that are of one "
        f"class (mean over all latents that fire: {mean}). Entropy of a latent's activation over the classes: 0 when "
        f"one has it all, {number(math.log(max(1, len(classes))))} when all {len(classes)} have the same."
    )
    return [TableBlock(title, header, rows, "features-latents.csv", folded=len(rows) > FOLD_ROWS)]


def _concept_table(artifacts: Artifacts) -> list[Block]:
    """The latent that best tells each concept, if the data have concepts."""
    table = artifacts.table("features", "concepts.csv")
    if "auroc" not in table:
        return []
    rows = [
        [
            Cell(row["concept"], note=row["classes"]),
            Cell(latent_name(row["latent"], row["sign"]), "nowrap"),
            *numbers(number(row["auroc"]), count_of(row["test_images"])),
        ]
        for row in records(table)
    ]
    header = [Cell("concept", note="of class"), Cell("latent"), *numbers("AUROC", "images")]
    title = (
        "The latent that best tells each concept, chosen on train images and judged on test images. AUROC: "
        "0.5 by chance, 1 when the latent is larger for every image that shows the concept (mean: "
        f"{number(table['auroc'].mean())}). Images: those that show it. (−): the concept lowers the latent."
    )
    return [TableBlock(title, header, rows, "features-concepts.csv", folded=len(rows) > FOLD_ROWS)]
