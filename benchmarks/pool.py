"""An image's latents at a map: the mean over its positions, or the largest of each? What sae.pool should be.

    python benchmarks/pool.py [SETTING ...] --sites layer3.0.conv2 layer4.0.conv2 [--seeds 0 1 2] [--no-edits]

At each site an SAE of each seed is trained, the same for both ways, with the settings of ``salve``. A table shows, as
mean over seeds, what is made of its image latents in each way:

- AUROC: how well the best latent of a concept, chosen on train images, tells test images that show it from others; the
  mean over concepts. Where the data have no concepts, classes take their place.
- defining: the share of class-defining latents among those that are not dead.
- separate: classes that an edit of the latent chosen by margin separates, its strength chosen on select images.

Lines before it give every seed as soon as it is known.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from hydra import compose, initialize_config_dir
from measure import table
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console
from torch import Tensor
from torch.nn.functional import one_hot

from salve.artifacts import Store
from salve.backbones.cut import Cut
from salve.editing.methods import Target
from salve.editing.methods.gate import GateEdit
from salve.editing.verdict import separated
from salve.features import class_means, concept_detectors, kinds, select_latents
from salve.processes.ranks import gathered
from salve.run.build import build_context
from salve.run.explain import conf_dir
from salve.run.schema import Config, register, resolve
from salve.sae import SAE
from salve.sae.positions import at_positions, pooled
from salve.stages import StageContext, capture, finetune, train_saes
from salve.stages.curves import measure
from salve.stages.measured import EditMeasures, measures_of
from salve.stages.outcome import choose
from salve.stages.targets import contributions_of
from salve.types import Split

POOLS = ("mean", "max")


class Found(NamedTuple):
    """One SAE with one way: AUROC, share of class-defining latents, and classes that separate."""

    auroc: float
    defining: float
    separate: float


@torch.no_grad()
def latents_of(
    context: StageContext, cut: object, saes: Sequence[SAE], split: Split
) -> tuple[dict[tuple[int, str], Tensor], Tensor]:
    """The images' latents ``[N, d]`` by SAE and way, in one pass over a split, and the labels ``[N]``."""
    parts: dict[tuple[int, str], list[Tensor]] = {(i, pool): [] for i in range(len(saes)) for pool in POOLS}
    of_images = []
    for images, labels in context.data.loader(split):
        activations = cut.read(context.on_device(images)).float().cpu()  # type: ignore[attr-defined]
        for i, sae in enumerate(saes):
            latents = at_positions(sae.encode, activations)
            for pool in POOLS:
                parts[i, pool].append(pooled(latents, pool))
        of_images.append(labels)
    return {key: torch.cat(part) for key, part in parts.items()}, torch.cat(of_images)


def presence(context: StageContext, split: Split, labels: Tensor) -> Tensor:
    """Which images show which concepts, ``[N, K]``; where no concepts are known, their classes."""
    truth = context.data.truth(split)
    return one_hot(labels, len(context.classes)).bool() if truth is None else truth.presence


class Separating:
    """Counts the classes that edits of their latents separate; an edit that was measured is not measured again."""

    def __init__(self, config: Config, context: StageContext, cut: Cut, edits: EditMeasures) -> None:
        self._settings = replace(config.edit, modes=["suppress"])
        self._context, self._cut, self._edits = context, cut, edits
        self._known: dict[tuple[int, int, int], bool] = {}

    def __call__(self, number: int, sae: SAE, chosen: Sequence[int]) -> float:
        """The number of classes; ``chosen`` ``[C]`` are their latents in the SAE with this number."""
        return float(sum(self._one(number, sae, k, latent) for k, latent in enumerate(chosen) if latent >= 0))

    def _one(self, number: int, sae: SAE, k: int, latent: int) -> bool:
        if (number, k, latent) not in self._known:
            target = Target(self._context.classes[k], (k,), (latent,), (1,), ("",))
            edit = GateEdit.of(self._cut, contributions_of(sae.decoder, target, self._settings))
            found = measure(self._edits, edit, target, len(self._context.classes)).effects
            at, reached = choose(found["select"])
            self._known[number, k, latent] = reached and bool(separated(found["test"].at(at)))
        return self._known[number, k, latent]


def at_site(config: Config, store: Store, seeds: Sequence[int], edits: bool) -> dict[tuple[int, str], Found]:
    """What is found at the site of the settings, by seed and way."""
    with gathered(config.trainer, None) as ranks:
        context = build_context(config, store, lambda _: DummyLogger(), Console(quiet=True), ranks)
        classifier = finetune(context, config.finetune)
        activations = capture(context, config.capture, classifier)
        settings = [replace(config.sae, seed=seed) for seed in seeds]
        saes = [context.sae(one, activations) for one in train_saes(context, settings, classifier, activations)]
        cut = context.cut(classifier)
        train, labels = latents_of(context, cut, saes, "train")
        test, test_labels = latents_of(context, cut, saes, "test")
        shown = presence(context, "train", labels), presence(context, "test", test_labels)
        found, selected = {}, {}
        for (number, pool), latents in train.items():
            sae, key = saes[number], (seeds[number], pool)
            judged = concept_detectors(latents, shown[0], test[number, pool], shown[1], sae.signed)
            means = class_means(latents.double(), labels, len(context.classes))
            kind = kinds(means, config.discover.threshold)
            selected[number, pool] = select_latents(means, "margin", (latents > 0).any(dim=0)).tolist()
            defining = kind.count("class-defining") / max(1, len(kind) - kind.count("dead"))
            found[key] = Found(float(judged.auroc.nanmean()), defining, float("nan"))
            print(
                f"{config.layer}, seed {key[0]}, {pool}: AUROC {found[key].auroc:.4f}, defining {defining:.4f}",
                flush=True,
            )
        if edits:
            count = Separating(config, context, cut, measures_of(context, cut, config.edit, activations, None))
            for (number, pool), chosen in selected.items():
                key = seeds[number], pool
                found[key] = found[key]._replace(separate=count(number, saes[number], chosen))
                print(f"{config.layer}, seed {key[0]}, {pool}: separate {found[key].separate:.0f}", flush=True)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="SETTING", help="any of salve's")
    parser.add_argument("--sites", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--no-edits", action="store_true", help="leave out what takes longest")
    given = parser.parse_args()
    register()
    shown = table(f"{len(given.seeds)} SAEs at each site", ("site", "pool", *Found._fields))
    for site in given.sites:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = resolve(compose("config", [f"layer={site}", *given.settings]))
        store = Store(Path(config.output_dir) / "artifacts")
        found = at_site(config, store, given.seeds, not given.no_edits)
        for pool in POOLS:
            of_pool = torch.tensor([found[seed, pool] for seed in given.seeds]).mean(dim=0).tolist()
            shown.add_row(site, pool, *(f"{value:.3f}" for value in of_pool))
    Console().print(shown)


if __name__ == "__main__":
    main()
