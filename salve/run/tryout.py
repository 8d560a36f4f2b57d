# SPDX-License-Identifier: MIT
"""Try everything that a run will do on a few images, before anything is trained."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import torch
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from salve.artifacts import Store, digest_of
from salve.backbones import Site
from salve.backbones.cut import Cut
from salve.editing import Edit, apply_edit_file, edited_logits, gate, make_edit_file, undo_edit_file
from salve.editing.gating import check_finite
from salve.processes.ranks import Ranks
from salve.repair_settings import RETRAINED
from salve.run.build import build_context
from salve.run.schema import Config
from salve.sae import SAE, make_sae
from salve.saliency import grad_fam, maximise, own_maps
from salve.saliency.common import NoMap
from salve.stages import StageContext
from salve.stages.compare import check_compare
from salve.stages.control import method_of
from salve.stages.repair_suspects import check_repair
from salve.stages.targets import refuse_signed
from salve.stages.tcav import concept_files
from salve.system import first_line
from salve.types import Split, UserError

#: Lightning's precisions that convert the weights, with the type that they convert them to.
TRUE = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
#: Differences below this share of the largest number are rounding errors.
SAME = 1e-6
#: Lightning's precisions that convert only the products, with the type that they convert them to.
MIXED = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def try_out(config: Config, context: StageContext) -> None:
    """Do with four images what the stages of a run will do: two of train, one of each other split.

    The images are loaded and go through the backbone and an untrained SAE of the run's variant. Stage ``validate`` adds
    a saliency map and a step of activation maximisation, ``control`` an edit that is made, applied and undone, and full
    fine-tuning one step of training. Torch's random state is left as it was.

    Args:
        config: the run's settings.
        context: built from them.

    Raises:
        UserError: one of these fails; the reason stands in brackets.
    """
    stages = set(config.stages) - {"report"}
    if not stages:
        return
    if "compare" in stages:
        check_compare(config.compare, context.classes, config.sae)
    if "control" in stages:
        method_of(config.edit)
    if "validate" in stages:
        concept_files(config.validate.concepts)
    with torch.random.fork_rng(devices=[]):
        model, fits = context.build()
        if "compare" in stages and config.compare.retrained and not _trains_head(config, fits):
            raise UserError(
                "compare.retrained=true trains the network again without a class, but the weights fit the data and are "
                f"not trained (backbone.weights={config.backbone.weights}); give the weights from before fine-tuning."
            )
        again = [name for name in config.repair.rivals if name in RETRAINED] if "repair" in stages else []
        if again and not _trains_head(config, fits):
            raise UserError(
                f"repair.rivals names {again[0]}, which trains the network again, but the weights fit the data and are "
                f"not trained (backbone.weights={config.backbone.weights}); give the weights from before fine-tuning, "
                "or set finetune.mode=full."
            )
        samples = _load(context)
        model.to(context.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        if "repair" in stages:
            check_repair(context, config.repair, config.audit.labels, model, config.sae.dictionary_size)
        cut = context.cut_of(model)
        activations, logits = _run(cut, samples)
        _refuse_constant(config, context, samples, activations if _trains_head(config, fits) else logits, cut.site)
        if stages - {"finetune"}:
            sae = _untrained(config, cut.site, samples, activations)
            if "validate" in stages:
                _look(config, context, model, cut.site, sae, samples)
            if stages & {"control", "diagnose"} and config.edit.channels == "aligned" and bool((activations < 0).any()):
                raise refuse_signed(cut.site.name)
            if "control" in stages:
                _check_sets(config, context)
                _edit(config, context, cut, sae, samples, activations)
        if _trains_head(config, fits) and config.finetune.mode != "probe":
            _train(context, model, samples)  # last, because it changes the model


@dataclass(frozen=True)
class _Samples:
    """Images ``[4, 3, S, S]`` on the context's device, their labels ``[4]``, and their splits and numbers in them."""

    images: Tensor
    labels: Tensor
    names: list[tuple[Split, int]]

    def check(self, rows: Tensor, what: str) -> None:
        """Check that every image's row of ``[n, …]`` is finite.

        Raises:
            UserError: a row is not; it names the first such image.
        """
        for finite, (split, number) in zip(rows.flatten(1).isfinite().all(dim=1).tolist(), self.names, strict=True):
            if not finite:
                raise UserError(
                    f"The {what} are NaN or infinite for image {number} of the {split} split; check the weights "
                    "(backbone.weights) and the image."
                )


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn any error into a UserError with the sentence ``what``, in which {} stands for the reason."""
    try:
        yield
    except Exception as error:
        said = first_line(error)
        if isinstance(error, UserError):
            said = said.removeprefix(f"{type(error).__name__}: ")
        raise UserError(what.replace("{}", f"({said})")) from error


def _load(context: StageContext) -> _Samples:
    assert context.data.preprocess is not None, "the data are bound to the backbone before any stage runs"
    transform, items, names = context.data.preprocess.eval_transform(), [], list[tuple[Split, int]]()
    for split in get_args(Split):
        with _refusing(f"The first images of the {split} split cannot be used {{}}."):
            found = [
                (transform(image), label) for image, label in context.data.first(split, 2 if split == "train" else 1)
            ]
        items += found
        names += [(split, number) for number in range(len(found))]
    images, labels = torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])
    for one in context.evaluation:
        with _refusing(f"The first image of the evaluation set {one.name} cannot be used {{}}."):
            transform(one.raw[0][0])
    samples = _Samples(images.to(context.device, memory_format=torch.channels_last), labels.to(context.device), names)
    samples.check(samples.images, "pixels")
    return samples


def _trains_head(config: Config, fits: bool) -> bool:
    return config.finetune.mode in ("full", "probe") or (config.finetune.mode == "auto" and not fits)


def _refuse_constant(config: Config, context: StageContext, samples: _Samples, rows: Tensor, site: Site) -> None:
    """Refuse given weights with which the network says the same of different images.

    A network with random weights may begin that way, and learn.

    Args:
        rows: ``[n, …]``, the logits, or the activations where a fresh head is trained on them.

    Raises:
        UserError: all rows are the same.
    """
    if not (samples.images != samples.images[:1]).any() or (
        context.backbone.weights == "random" and config.finetune.mode != "probe"
    ):
        return
    if (rows - rows[:1]).abs().max() <= SAME * rows.abs().max():
        raise UserError(
            f"With backbone.weights={context.backbone.weights} the network says the same of different images: its "
            f"activations at {site.name} or its outputs do not depend on them, as with weights of zero; check the file."
        )


def _run(cut: Cut, samples: _Samples) -> tuple[Tensor, Tensor]:
    """The site's activations ``[n, P, M]`` and the logits ``[n, outputs]``, both checked to be finite."""
    model, site = cut.model, cut.site
    name, size = type(model).__name__, samples.images.shape[-1]
    own = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0, 0))[-1]
    hint = f", such as {own}, for which it is made" if own not in (0, size) else ""
    says = f"This {name} cannot read {size} × {size} images {{}}; set backbone.preprocess.size to another size{hint}."
    with _refusing(says), torch.no_grad():
        logits = cut.logits(samples.images)
        activations = cut.read(samples.images)
    expected = (len(samples.names), site.count, site.width)
    if activations.shape != expected:
        raise UserError(
            f"The site {site.name} of this {name} should give {site.count} × {site.width} numbers for each image, "
            f"but gave {list(activations.shape)} for {len(samples.names)} images: it cannot be worked with."
        )
    samples.check(activations, f"activations at {site.name}")
    samples.check(logits, "logits")
    with torch.no_grad():
        tail = cut.tail(samples.images) if cut.linear is None else cut.linear.to(activations)
        read = tail(activations)
    if read.shape != logits.shape or (read - logits).abs().max() > 1e-2 * logits.abs().max().clamp(min=1e-6):
        raise UserError(
            f"The outputs of this {name} are not what its layers behind {site.name} ({site.readers[0].path}) make of "
            "the activations there, so that an edit of its weights would not do what salve says of it."
        )
    return activations.float(), logits.float()


def _untrained(config: Config, site: Site, samples: _Samples, activations: Tensor) -> SAE:
    settings = config.sae
    with _refusing(f"No SAE with sae.variant={settings.variant} can be made for {site.width} channels {{}}."):
        generator = torch.Generator().manual_seed(0)
        sae = make_sae(settings.variant, site.width, settings.dictionary_size, generator, **settings.options()).eval()
        sae.to(activations.device)
        with torch.no_grad():
            reconstruction, _ = sae(activations.flatten(0, 1))
    samples.check(reconstruction.view_as(activations), "reconstructions of an untrained SAE")
    return sae


def _look(config: Config, context: StageContext, model: nn.Module, site: Site, sae: SAE, samples: _Samples) -> None:
    """Make saliency maps, where there are any, and a step of activation maximisation, as stage ``validate`` does."""
    preprocess = context.data.preprocess
    assert preprocess is not None, "the data are bound to the backbone before any stage runs"
    says = f"Stage validate cannot be run with this {type(model).__name__} {{}}; leave validate out of stages."
    with _refusing(says):
        image, pool = samples.images[-1:], config.sae.pool
        with suppress(NoMap):
            own_maps(model, site.name, sae, image, [0])
        with suppress(NoMap):
            grad_fam(model, site.name, sae, image, [0], pool=pool)
        if config.validate.maximisation_steps:
            maximise(model, site.name, sae, [0], preprocess, size=preprocess.size, steps=1, pool=pool)


def _check_sets(config: Config, context: StageContext) -> None:
    latents = config.sae.dictionary_size
    for member in (member for members in config.edit.sets for member in members):
        if str(member) not in context.classes and not (isinstance(member, int) and 0 <= member < latents):
            raise UserError(
                f"edit.sets names {member}, which is neither a class ({', '.join(context.classes)}) nor a latent "
                f"from 0 to {latents - 1}."
            )


def _edit(config: Config, context: StageContext, cut: Cut, sae: SAE, samples: _Samples, activations: Tensor) -> None:
    """Make, apply and undo an edit, and compute the logits at the largest strength.

    Apply and undo check by checksums that the weights changed and came back.
    """
    name = type(cut.model).__name__
    for reader in cut.site.readers:
        weight = cut.model.get_parameter(reader.weight)
        if not weight.any():  # some fresh heads are all zeros, which no edit changes
            nn.init.normal_(weight)
    edit = Edit(0, 1.0, "suppress", config.edit.scale, config.edit.channels)  # type: ignore[arg-type]
    with _refusing(f"The weights of this {name} cannot be edited {{}}; leave control out of stages."):
        state = {name: tensor.detach().cpu() for name, tensor in cut.model.state_dict().items()}
        backbone = f"{context.backbone.library}/{context.backbone.name}"
        edit_file = make_edit_file(cut.model, cut.site, sae.cpu(), [edit], backbone)
        undo_edit_file(edit_file, apply_edit_file(edit_file, state))
    vector, alpha = edit_file.contributions[0], config.edit.alpha[-1]
    for mode in config.edit.modes:
        if cut.linear is not None:
            rows = activations[:, 0].detach().cpu()
            edited_logits(cut.linear.to(rows), rows, vector, [alpha], mode)  # type: ignore[arg-type]
            continue
        with torch.no_grad():
            logits = cut.tail(samples.images).gated(gate(vector, alpha, mode).to(samples.images))  # type: ignore[arg-type]
        check_finite(logits, torch.tensor(alpha))


def _train(context: StageContext, model: nn.Module, samples: _Samples) -> None:
    """Do a step of fine-tuning, in its precision, on two images, or on one if a batch has one."""
    rows = min(context.data.batch_size, sum(split == "train" for split, _ in samples.names))
    name, precision, device = type(model).__name__, context.precision, context.device.type
    images, labels = samples.images[:rows], samples.labels[:rows]
    if kind := TRUE.get(precision):
        model, images = model.to(kind), images.to(kind)
    inside = torch.autocast(device, MIXED[precision]) if precision in MIXED else nullcontext()
    normalises = any(isinstance(part, _BatchNorm) for part in model.modules())
    says = f"This {name} cannot be trained in trainer.precision={precision} {{}}."
    if rows == 1 and normalises:
        says = (
            f"This {name} cannot be trained on one image at a time, since its BatchNorm compares the images of a batch "
            "{}; set data.batch_size=2 or more, or finetune=probe."
        )
    with _refusing(says):
        model.train()
        with inside:
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
    if not loss.isfinite():
        raise UserError(
            f"The first step of training this {name} in trainer.precision={precision} gives a loss of {float(loss)}; "
            "set trainer.precision=32-true, or check the weights."
        )


@dataclass(frozen=True)
class _Trial:
    """Settings that are compared by ``key`` alone: by the part of them that matters to what is tried."""

    key: str
    config: Config = field(compare=False)


def try_once(config: Config) -> None:
    """Call :func:`try_out` on the CPU, for a run of a sweep; once for all runs with the same backbone, data and stages.

    Raises:
        UserError: see there.
    """
    parts: list[Any] = [
        config.data,
        config.mark,
        config.evaluate,
        config.backbone,
        config.layer,
        config.stages,
        config.finetune.mode,
    ]
    parts += [config.audit.labels, config.repair]
    key = digest_of([str(part) for part in (*parts, config.sae.variant, config.edit.channels, config.edit.sets)])
    if (why := _tried(_Trial(key, config))) is not None:
        raise UserError(why)


@lru_cache(maxsize=256)
def _tried(trial: _Trial) -> str | None:
    """What is wrong, or None."""
    # The machine that plans a sweep may lack the devices that its jobs will have.
    here = replace(trial.config.trainer, accelerator="cpu", devices=1, precision="32-true")
    config = replace(trial.config, trainer=here, sae=replace(trial.config.sae, precision="float32"))
    store = Store(Path(config.output_dir) / "artifacts")
    try:
        try_out(
            config,
            build_context(
                config, store, lambda _: DummyLogger(), Console(quiet=True, markup=False, emoji=False), Ranks("cpu")
            ),
        )
    except UserError as error:
        return str(error)
    return None
