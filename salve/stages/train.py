"""Stage ``discover``: train SAEs on captured activations."""

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

from salve.artifacts import Artifact, write_record, write_table
from salve.backbones import AnyRows, Captured
from salve.sae import (
    SAE,
    ActivationsData,
    Course,
    Member,
    SAEEnsemble,
    SparseAutoencoder,
    WholeData,
    make_sae,
    save_sae,
)
from salve.settings import NO_SETTING, Precision, SAESettings
from salve.stages.job import Job, recipe_of
from salve.stages.measure import check_activations, check_sae, measure_sae
from salve.types import Diverged, UserError

log = logging.getLogger(__name__)


#: A training is measured so many times, however many steps and images there are.
PARTS = 40
#: What may differ among SAEs that are trained together.
VARIES = ("dictionary_size", "sparsity", "k", "seed")


def can_share(a: SAESettings, b: SAESettings) -> bool:
    """Whether two SAEs can be trained together: they differ at most in size, λ, k and seed, and none is resampled."""
    return not _differences(a, b) and not a.resample


def _differences(a: SAESettings, b: SAESettings) -> list[str]:
    mine, other = asdict(a), asdict(b)
    return [name for name in mine if name not in (*VARIES, *NO_SETTING) and mine[name] != other[name]]


def train_sae(job: Job, settings: SAESettings, classifier: Artifact, activations: Artifact) -> Artifact:
    """The SAE: artifact ``sae`` with ``sae.safetensors`` (takes raw activations), ``sae.json`` and ``history.csv``."""
    [artifact] = train_saes(job, [settings], classifier, activations)
    return artifact


def train_saes(
    job: Job, settings: Sequence[SAESettings], classifier: Artifact, activations: Artifact
) -> list[Artifact]:
    """An artifact ``sae`` for each of several SAEs; what is missing is trained together, or alone if it is only one.

    Raises:
        UserError: their settings differ in more than what can be trained together, there are several devices, or the
            activations are the same for every image.
        Diverged: the training of some came to NaN, or to what :func:`check_sae` refuses; the others' artifacts are
            there.
    """
    for other in settings[1:]:
        if unlike := _differences(settings[0], other):
            raise UserError(
                f"SAEs that are trained together differ only in {', '.join(VARIES)}, not in sae.{unlike[0]}: "
                f"{getattr(settings[0], unlike[0])} and {getattr(other, unlike[0])}."
            )
    if len(settings) > 1 and settings[0].resample:
        raise UserError("SAEs whose dead latents are resampled are trained one by one; set sae.resample=0.")
    if len(settings) > 1 and job.ranks.several:
        raise UserError("SAEs are trained together on one device; set trainer.devices=1, or sae.ensemble=1.")

    train, select, test = (job.activations(activations, split) for split in ("train", "select", "test"))
    within = job.shuffled_within(len(train) + len(select), train.rows.shape[1], settings[0].batch_size)
    if within and len(settings) > 1:
        log.info("The activations do not fit into memory (trainer.memory): SAEs are trained one by one.")
        return [train_sae(job, one, classifier, activations) for one in settings]

    def make(folders: Mapping[int, Path], scratch: Path) -> None:
        ground = _Ground.of(job, settings[0], job.head(classifier), train, select, test, within)
        fit = _train_alone if len(folders) == 1 else _train_together
        fit(job, ground, {folder: settings[i] for i, folder in folders.items()}, scratch)

    order = {"shuffled_within": within} if within else {}
    recipes = [recipe_of(one.scientific(), classifier, activations) | {"seed": one.seed} | order for one in settings]
    found = job.store.get_or_make_many("sae", recipes, make)
    diverged = []
    for one, artifact in zip(settings, found, strict=True):
        try:
            if artifact is None:
                raise Diverged
            check_sae(artifact.record("sae.json"), select, job.layer)  # an earlier version may have made it
        except Diverged:
            if len(settings) == 1:
                raise
            diverged.append(one)
    if diverged:
        named = "; ".join(", ".join(f"sae.{name}={getattr(one, name)}" for name in VARIES) for one in diverged)
        raise Diverged(
            f"The training of {len(diverged)} of {len(settings)} SAEs diverged: {named}; lower their learning rate."
        )
    return [artifact for artifact in found if artifact is not None]


def _train_alone(job: Job, ground: "_Ground", wanted: Mapping[Path, SAESettings], scratch: Path) -> None:
    [(folder, settings)] = wanted.items()
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    sae = ground.untrained(settings)
    course = _course(settings, len(ground.rows))
    data = ActivationsData(ground.rows, ground.select_rows, ground.select.labels, course, settings.seed, ground.within)
    module = SparseAutoencoder(
        sae,
        settings.sparsity,
        settings.learning_rate,
        ground.head(),
        auxk=settings.auxk,
        resample=settings.resample,
        patience=course.patience(settings.resample) if settings.auxk or settings.resample else 0,
        precision=cast(Precision, settings.precision),
        warmup=settings.warmup,
        decay=settings.decay,
    )
    parts = _parts(course, ground.within)
    fit = replace(job, seed=settings.seed).fit
    history = fit("discover", module, {"datamodule": data}, scratch, epochs=parts)
    try:
        ground.write(folder, settings, sae.cpu(), _by_step(history, course, parts))
    except Diverged:
        shutil.rmtree(scratch, ignore_errors=True)  # else the next attempt would go on from its checkpoints
        raise


def _train_together(job: Job, ground: "_Ground", wanted: Mapping[Path, SAESettings], scratch: Path) -> None:
    """Folders of those that diverge are removed."""
    common = next(iter(wanted.values()))
    members = [Member(ground.untrained(one), one.sparsity, one.seed) for one in wanted.values()]
    course = _course(common, len(ground.rows))
    data = WholeData(ground.rows, ground.select_rows, ground.select.labels, course)
    ensemble = SAEEnsemble(
        members,
        course,
        common.learning_rate,
        ground.head(),
        auxk=common.auxk,
        patience=course.patience(),
        precision=cast(Precision, common.precision),
        warmup=common.warmup,
        decay=common.decay,
    )
    parts = _parts(course)
    job.fit("discover", ensemble, {"datamodule": data}, scratch, epochs=parts)
    for number, (folder, settings) in enumerate(wanted.items()):
        sae, rows = ensemble.trained(number)
        history = _by_step(pd.DataFrame(rows), course, parts)
        try:
            if not np.isfinite(history.to_numpy()).all():
                raise Diverged
            ground.write(folder, settings, sae, history)
        except Diverged:
            shutil.rmtree(folder)


def _course(settings: SAESettings, rows: int) -> Course:
    """Of a training on so many rows."""
    if settings.epochs is not None:
        return Course.of_epochs(rows, settings.batch_size, settings.epochs)
    return Course(rows, settings.batch_size, settings.steps)


def _parts(course: Course, within: int | None = None) -> int:
    """In how many parts, each followed by a measurement, a training is done: none reads less than a block of a disk."""
    blocks = course.steps * course.batch_size // within if within else PARTS
    return max(1, min(PARTS, course.steps, blocks))


def _by_step(history: pd.DataFrame, course: Course, parts: int) -> pd.DataFrame:
    """The measures by how many steps were done, instead of by the Trainer's epoch."""
    done = [course.part(int(epoch), parts).stop for epoch in history["epoch"]]
    return history.drop(columns="epoch").assign(step=done)[["step", *history.columns.drop("epoch")]]


@dataclass(frozen=True)
class _Ground:
    """What SAEs are trained on: captured activations, and the classifier's head behind them.

    Attributes:
        train, select, test: activations. rows, select_rows: of the first two, in the units of training, in memory if
            they fit.
        within: rows that are shuffled at a time, if they do not fit. weight, bias: of the head.
        shift, scale: training sees ``(a − shift) / scale``, with the shift inside the SAE.
        facts: for the file's header.
    """

    train: Captured
    select: Captured
    test: Captured
    rows: AnyRows
    select_rows: AnyRows
    within: int | None
    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: float
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        job: Job,
        settings: SAESettings,
        head: tuple[Tensor, Tensor],
        train: Captured,
        select: Captured,
        test: Captured,
        within: int | None,
    ) -> "_Ground":
        raw = train.rows if within else train.rows[:]
        shift = _mean(raw) if settings.centre else torch.zeros(raw.shape[1])
        # One scalar, so that mean ‖a‖² = M and λ means the same on every site.
        scale = _root_mean_square(raw, shift)
        if not math.isfinite(scale):
            raise UserError(
                f"The activations at {job.layer} are NaN or infinite for some images: no SAE can be trained."
            )
        check_activations(train, job.layer)
        rows, select_rows = (_divided(part, scale) for part in (raw, select.rows if within else select.rows[:]))
        facts = {"backbone": job.backbone.name, "site": job.layer, "scale": scale}
        return cls(train, select, test, rows, select_rows, within, *head, shift, scale, facts)

    def untrained(self, settings: SAESettings) -> SAE:
        """An SAE at the start of its training."""
        generator = torch.Generator().manual_seed(settings.seed)
        sae = make_sae(settings.variant, len(self.shift), settings.dictionary_size, generator, **settings.options())
        sae.shift.copy_(self.shift / self.scale)
        if settings.start == "data":
            drawn = torch.randperm(len(self.rows), generator=generator)[: sae.dictionary_size]
            sae.start_from(self.rows[drawn], _mean(self.rows))
        if settings.learn_shift:
            sae.learn_shift()
        return sae

    def head(self) -> nn.Linear:
        """The classifier behind the site, for reconstructions in the units of training."""
        head = nn.Linear(self.weight.shape[1], self.weight.shape[0]).requires_grad_(False)
        head.weight.copy_(self.weight * self.scale)
        head.bias.copy_(self.bias)
        return head

    def write(self, folder: Path, settings: SAESettings, sae: SAE, history: pd.DataFrame) -> None:
        """The artifact's files, of an SAE as its training left it.

        Raises:
            Diverged: see :func:`check_sae`.
        """
        sae.eval().fold(self.scale)
        save_sae(folder / "sae.safetensors", sae, self.facts)
        write_table(folder / "history.csv", history)
        measures = measure_sae(sae, self.train, {"select": self.select, "test": self.test}, self.weight, self.bias)
        order = {"shuffled_within": self.within} if self.within else {}
        course = _course(settings, len(self.rows))
        facts = {**settings.scientific(), "steps": course.steps, "passes": course.passes, "width": sae.width}
        check_sae(measures, self.select, self.facts["site"])
        write_record(folder / "sae.json", {**facts, **measures, **order})


def _divided(rows: AnyRows, scale: float) -> AnyRows:
    return rows / scale if isinstance(rows, Tensor) else rows.scaled(scale)


def _mean(rows: AnyRows) -> Tensor:
    """The mean row ``[M]``, summed in float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for block in rows.split(4096):
        total += block.sum(dim=0, dtype=torch.float64)
    return (total / len(rows)).float()


def _root_mean_square(rows: AnyRows, shift: Tensor) -> float:
    """``√ mean (a − shift)²`` over rows and channels, summed in float64; not finite if an activation is not."""
    total = sum(float((block - shift).double().square().sum()) for block in rows.split(4096))
    return math.sqrt(total / (len(rows) * rows.shape[1]))
