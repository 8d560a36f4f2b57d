# SPDX-License-Identifier: MIT
"""Train SAEs on captured activations, alone or several together: the second step of stage ``discover``."""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from salve.activations import ActivationsData, AnyRows, Captured, Schedule, WholeData
from salve.artifacts import Artifact, write_record, write_table
from salve.backbones.cut import Cut
from salve.sae import SAE, Member, SAEEnsemble, SparseAutoencoder, make_sae, save_sae
from salve.sae.models import code_of
from salve.settings import Precision, SAESettings
from salve.stages.context import StageContext, settings_of_key
from salve.stages.measure import check_activations, check_sae, measure_sae
from salve.stages.through_tail import measure_through_tail
from salve.stages.training import fit
from salve.types import Diverged, UserError

log = logging.getLogger(__name__)


#: Number of measurements in a training, whatever its steps and images.
PARTS = 40
#: Settings in which SAEs that are trained together may differ.
VARIES = ("dictionary_size", "sparsity", "k", "seed")


def can_share(a: SAESettings, b: SAESettings) -> bool:
    """Whether two SAEs can be trained together: they differ only in :data:`VARIES`, and none is resampled."""
    return not _differences(a, b) and not a.resample


def _differences(a: SAESettings, b: SAESettings) -> list[str]:
    mine, other = asdict(a), asdict(b)
    return [name for name in mine if name not in (*VARIES, "ensemble", "pool") and mine[name] != other[name]]


def train_sae(context: StageContext, settings: SAESettings, classifier: Artifact, activations: Artifact) -> Artifact:
    """Train one SAE.

    Returns:
        Artifact ``sae``: ``sae.safetensors``, which takes raw activations, ``sae.json`` and ``history.csv``.
    """
    [artifact] = train_saes(context, [settings], classifier, activations)
    return artifact


def train_saes(
    context: StageContext, settings: Sequence[SAESettings], classifier: Artifact, activations: Artifact
) -> list[Artifact]:
    """Train several SAEs, together where possible.

    SAEs that are in the store are not trained again. A single missing one is trained alone, as are SAEs whose
    activations do not fit into memory.

    Returns:
        One artifact ``sae`` for each of the settings; see :func:`train_sae`.

    Raises:
        UserError: the settings differ in more than :data:`VARIES`, there are several devices, or the activations are
            the same for every image.
        Diverged: some trainings became NaN or were refused by :func:`check_sae`. The artifacts of the others are kept.
    """
    for other in settings[1:]:
        if unlike := _differences(settings[0], other):
            raise UserError(
                f"SAEs that are trained together may differ in {', '.join(VARIES)}, not in sae.{unlike[0]}: "
                f"{getattr(settings[0], unlike[0])} and {getattr(other, unlike[0])}."
            )
    if len(settings) > 1 and settings[0].resample:
        raise UserError("SAEs whose dead latents are resampled cannot be trained together; set sae.resample=0.")
    if len(settings) > 1 and context.ranks.several:
        raise UserError("SAEs are trained together on one device; set trainer.devices=1, or sae.ensemble=1.")

    train, select, test = (context.activations(activations, split) for split in ("train", "select", "test"))
    within = context.shuffled_within(len(train.rows) + len(select.rows), train.rows.shape[1], settings[0].batch_size)
    if within and len(settings) > 1:
        log.info("The activations do not fit into memory (trainer.memory): SAEs are trained one by one.")
        return [train_sae(context, one, classifier, activations) for one in settings]

    def make(folders: Mapping[int, Path], scratch: Path) -> None:
        cut = context.cut(classifier)
        inputs = _TrainingInputs.of(context, settings[0], cut, train, select, test, within)
        train_these = _train_alone if len(folders) == 1 else _train_together
        train_these(context, inputs, {folder: settings[i] for i, folder in folders.items()}, scratch)

    added = {"shuffled_within": within, **context.trained_with.get("discover", {}), **code_of(settings[0].variant)}
    keys_settings = [
        settings_of_key(one.scientific(), classifier, activations) | {"seed": one.seed} | added for one in settings
    ]
    found = context.store.get_or_make_many("sae", keys_settings, make)
    if diverged := [one for one, artifact in zip(settings, found, strict=True) if artifact is None]:
        named = "; ".join(", ".join(f"sae.{name}={getattr(one, name)}" for name in VARIES) for one in diverged)
        raise Diverged(
            f"The training of {len(diverged)} of {len(settings)} SAEs diverged: {named}; lower their learning rate."
        )
    return [artifact for artifact in found if artifact is not None]


def _train_alone(
    context: StageContext, inputs: "_TrainingInputs", wanted: Mapping[Path, SAESettings], scratch: Path
) -> None:
    [(folder, settings)] = wanted.items()
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    sae = inputs.untrained(settings)
    schedule = _schedule(settings, len(inputs.rows))
    data = ActivationsData(
        inputs.rows, inputs.select_rows, inputs.select.row_labels, schedule, settings.seed, inputs.within
    )
    module = SparseAutoencoder(
        sae,
        settings.sparsity,
        settings.learning_rate,
        inputs.head(),
        auxk=settings.auxk,
        resample=settings.resample,
        patience=schedule.patience(settings.resample) if settings.auxk or settings.resample else 0,
        precision=cast(Precision, settings.precision),
        warmup=settings.warmup,
        decay=settings.decay,
    )
    parts = _parts(schedule, inputs.within)
    seeded = replace(context, seed=settings.seed)
    history = fit(seeded, "discover", module, {"datamodule": data}, scratch, epochs=parts)
    try:
        inputs.write(folder, settings, sae.cpu(), _by_step(history, schedule, parts))
    except Diverged:
        shutil.rmtree(scratch, ignore_errors=True)  # the next attempt must not resume from its checkpoints
        raise


def _train_together(
    context: StageContext, inputs: "_TrainingInputs", wanted: Mapping[Path, SAESettings], scratch: Path
) -> None:
    """Train SAEs as an ensemble; removes the folders of those that diverge."""
    common = next(iter(wanted.values()))
    members = [Member(inputs.untrained(one), one.sparsity, one.seed) for one in wanted.values()]
    schedule = _schedule(common, len(inputs.rows))
    data = WholeData(inputs.rows, inputs.select_rows, inputs.select.row_labels, schedule)
    ensemble = SAEEnsemble(
        members,
        schedule,
        common.learning_rate,
        inputs.head(),
        auxk=common.auxk,
        patience=schedule.patience(),
        precision=cast(Precision, common.precision),
        warmup=common.warmup,
        decay=common.decay,
    )
    parts = _parts(schedule)
    fit(context, "discover", ensemble, {"datamodule": data}, scratch, epochs=parts)
    for number, (folder, settings) in enumerate(wanted.items()):
        sae, rows = ensemble.trained(number)
        history = _by_step(pd.DataFrame(rows), schedule, parts)
        try:
            if not np.isfinite(history.to_numpy()).all():
                raise Diverged
            inputs.write(folder, settings, sae, history)
        except Diverged:
            shutil.rmtree(folder)


def _schedule(settings: SAESettings, rows: int) -> Schedule:
    """The schedule of a training on so many rows."""
    if settings.epochs is not None:
        return Schedule.of_epochs(rows, settings.batch_size, settings.epochs)
    return Schedule(rows, settings.batch_size, settings.steps)


def _parts(schedule: Schedule, within: int | None = None) -> int:
    """The number of measurements, :data:`PARTS` at most: each part has a step and, from disk, a block of rows."""
    blocks = schedule.steps * schedule.batch_size // within if within else PARTS
    return max(1, min(PARTS, schedule.steps, blocks))


def _by_step(history: pd.DataFrame, schedule: Schedule, parts: int) -> pd.DataFrame:
    """Index a history by the number of steps done instead of the Trainer's epoch."""
    done = [schedule.part(int(epoch), parts).stop for epoch in history["epoch"]]
    return history.drop(columns="epoch").assign(step=done)[["step", *history.columns.drop("epoch")]]


@dataclass(frozen=True)
class _TrainingInputs:
    """What SAEs are trained on: captured activations, and the classifier's head behind them.

    Attributes:
        train, select, test: raw activations.
        rows, select_rows: of train and select, divided by ``scale``; in memory if they fit.
        within: number of rows shuffled at a time if they do not fit, else None.
        context, cut: the network, for what lies behind the site.
        b_dec: the initial ``b_dec``, in raw units. scale: training sees ``a / scale``.
        facts: for the file's header.
    """

    train: Captured
    select: Captured
    test: Captured
    rows: AnyRows
    select_rows: AnyRows
    within: int | None
    context: StageContext
    cut: Cut
    b_dec: Tensor
    scale: float
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        context: StageContext,
        settings: SAESettings,
        cut: Cut,
        train: Captured,
        select: Captured,
        test: Captured,
        within: int | None,
    ) -> "_TrainingInputs":
        raw = train.rows if within else train.rows[:]
        b_dec = _mean(raw) if settings.centre else torch.zeros(raw.shape[1])
        # One number, so that mean ‖a‖² = M and λ means the same at every site.
        scale = _root_mean_square(raw, b_dec)
        if not math.isfinite(scale):
            raise UserError(
                f"The activations at {context.layer} are NaN or infinite for some images: no SAE can be trained."
            )
        check_activations(train, context.layer)
        rows, select_rows = (_divided(part, scale) for part in (raw, select.rows if within else select.rows[:]))
        facts = {"backbone": context.backbone.name, "site": context.layer, "scale": scale}
        return cls(train, select, test, rows, select_rows, within, context, cut, b_dec, scale, facts)

    def untrained(self, settings: SAESettings) -> SAE:
        """An SAE at the start of its training."""
        generator = torch.Generator().manual_seed(settings.seed)
        sae = make_sae(settings.variant, len(self.b_dec), settings.dictionary_size, generator, **settings.options())
        if settings.decoder == "random":
            sae.freeze_decoder()
        sae.b_dec.copy_(self.b_dec / self.scale)
        if settings.start == "data":
            drawn = torch.randperm(len(self.rows), generator=generator)[: sae.dictionary_size]
            sae.start_from(self.rows[drawn], _mean(self.rows))
        if settings.learn_b_dec:
            sae.learn_b_dec()
        return sae

    def head(self) -> nn.Linear | None:
        """The classifier's head, for reconstructions in the units of training; None where more lies behind the site."""
        if self.cut.linear is None:
            return None
        outputs, width = self.cut.linear.weight.shape
        head = nn.Linear(width, outputs).requires_grad_(False)
        head.weight.copy_(self.cut.linear.weight * self.scale)
        head.bias.copy_(self.cut.linear.bias)
        return head

    def write(self, folder: Path, settings: SAESettings, sae: SAE, history: pd.DataFrame) -> None:
        """Fold and measure a trained SAE, and write the artifact's files.

        Raises:
            Diverged: see :func:`check_sae`.
        """
        sae.eval().fold(self.scale)
        save_sae(folder / "sae.safetensors", sae, self.facts)
        write_table(folder / "history.csv", history)
        measures = measure_sae(sae, self.train, {"select": self.select, "test": self.test}, self.cut.linear)
        if self.cut.linear is None:
            measures |= measure_through_tail(self.context, self.cut, sae, _mean(self.train.rows))
        schedule = _schedule(settings, len(self.rows))
        facts = {
            **settings.scientific(),
            "steps": schedule.steps,
            "passes": schedule.passes,
            "shuffled_within": self.within,
            "width": sae.width,
        }
        check_sae(measures, self.select, self.facts["site"])
        write_record(folder / "sae.json", {**facts, **measures})


def _divided(rows: AnyRows, scale: float) -> AnyRows:
    return rows / scale if isinstance(rows, Tensor) else rows.scaled(scale)


def _mean(rows: AnyRows) -> Tensor:
    """The mean row ``[M]``, summed in float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(4096):
        total += block.sum(dim=0, dtype=torch.float64)
    return (total / len(rows)).float()


def _root_mean_square(rows: AnyRows, b_dec: Tensor) -> float:
    """``√ mean (a − b_dec)²`` over rows and channels, summed in float64; not finite if an activation is not."""
    total = sum(float((block - b_dec).to(torch.float64, copy=True).square_().sum()) for block in rows.split(4096))
    return math.sqrt(total / (len(rows) * rows.shape[1]))
