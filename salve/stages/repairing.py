# SPDX-License-Identifier: MIT
"""The search for a repair on select images: what is edited, how, how strongly, and with which biases."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from salve.artifacts import Artifact
from salve.backbones.cut import Cut
from salve.editing.methods import FittedEdit, Fitting, Target, make_method
from salve.editing.methods.change import Affine, Change
from salve.editing.methods.pruning import closing, welch
from salve.editing.recalibrate import group_accuracies
from salve.editing.reweighting import heads_of_halves, reweighted_head
from salve.repair_settings import RepairSettings
from salve.sae import SAE
from salve.stages.candidates import ALONE, UNTOUCHED, Candidate
from salve.stages.context import StageContext
from salve.stages.grouped import Grouped, Running, grouped, of_split, train_shares
from salve.stages.judging import Judge
from salve.stages.repair_suspects import Suspects
from salve.stages.retraining import Retraining
from salve.stages.sampled import fitting_of
from salve.stages.targets import balanced
from salve.types import UserError

#: Rows of activations, at most, that erasers are fitted to.
ROWS = 1 << 15
#: Of LEACE's eraser, as a share of a channel's mean variance: few images are known for the width of a site.
RIDGE = 0.1
#: Shares of the channels that pruning closes, in per cent.
PRUNED = (1.0, 2.0, 5.0, 10.0, 20.0)


#: Edits that are fitted to the images whose attribute is known; they are judged on halves of them.
FITTED_TO_KNOWN = ("leace", "inlp", "pruning")
#: Methods that need to know the attribute of some images.
NEED_LABELS = (*FITTED_TO_KNOWN, "dfr", "group_dro")


class Search:
    """Tries repairs on select images.

    How each is judged, see :class:`.Judge`.

    Args:
        context, settings: of the run. cut: the network. activations: captured at its site. sae: of the site.
        suspects: to take out.
        labels: images of each group whose attribute is known, as the audit drew them; 0 for none.
    """

    def __init__(
        self,
        context: StageContext,
        settings: RepairSettings,
        cut: Cut,
        activations: Artifact,
        sae: SAE,
        suspects: Suspects,
        labels: int,
    ) -> None:
        self._activations = activations
        self._halves: dict[str, tuple[Tensor, FittedEdit, FittedEdit]] = {}
        #: Why methods were left out.
        self.left_out: list[str] = []
        self._context, self._settings, self._cut, self._sae, self.suspects = context, settings, cut, sae, suspects
        every = of_split(context, "select")
        self._plain = every.at(torch.tensor(balanced(every.labels, settings.images)), paired=False)
        known = grouped(context, "select") if labels else None
        self._known = self._plain if known is None else known.drawn(labels, context.seed)
        self._labelled = known is not None
        #: Images whose attribute chooses, and those whose attribute could be known.
        self.labelled, self.could_be_labelled = (0, 0) if known is None else (len(self._known), len(known))
        self.labelled_images: set[int] = set(self._known.numbers.tolist()) if self._labelled else set()
        self._on_plain = Running(context, cut, self._plain)
        self._on_known = Running(context, cut, self._known) if self._labelled else self._on_plain
        before = self._on_plain.logits()
        self._judge = Judge(
            *(self._known, self._plain, self._labelled, self._on_known.logits() if self._labelled else before, before),
            *(suspects.classes, len(context.classes), context.seed),
            train_shares(context, self._known) if self._labelled else None,
            settings.max_accuracy_loss,
        )
        self.accuracy_before = self._judge.accuracy_before

    @property
    def chosen_by(self) -> Grouped | None:
        """The labelled images that choose; None without labels."""
        return self._known if self._labelled else None

    def untouched(self) -> Candidate:
        """The network as it is."""
        known = self._judge.before
        return self._judged(UNTOUCHED, (), 0.0, None, None, known, torch.zeros(known.shape[1]))

    def alone(self) -> Candidate:
        """No edit: recalibration alone."""
        return self._candidate(ALONE, (), 0.0, None, None)

    def retrained(self, methods: Sequence[str], retraining: Retraining) -> list[Candidate]:
        """Networks that rivals train again. Group DRO needs labels, and is left out without."""
        found = []
        for method in methods:
            if method in NEED_LABELS and not self._labelled:
                continue
            with self._context.progress(f"training again: {method}", retraining.tries(method)) as advance:
                try:
                    for alpha, network in retraining.networks(method):
                        found.append(self._trained(method, alpha, network))
                        advance(1)
                except UserError as error:
                    self.left_out.append(str(error))
        return found

    def _trained(self, method: str, alpha: float, network: Artifact) -> Candidate:
        """A network with its score on select images. Its biases stay as they are."""
        cut = self._context.cut(network)
        known, plain = (
            Running(self._context, cut, images, room=0).logits()[:, : len(self._context.classes)]
            for images in (self._known, self._plain)
        )
        found = self._judged(method, (), alpha, None, None, known, torch.zeros(known.shape[1]), plain)
        return replace(found, network=network)

    def candidates(self, methods: Sequence[str], permanent: bool = True) -> Iterator[Candidate]:
        """Every method, number of latents and strength.

        Args:
            methods: of :data:`.repair_settings.REPAIRS` and :data:`.repair_settings.RIVALS`.
            permanent: whether weights must be able to hold it.
        """
        for method, size, strengths in self._fits(methods):
            latents = self.suspects.latents[:size] if size else ()
            if method == "dfr":
                yield self._new_head()
                continue
            if (fitted := self._fitted_or_none(method, size)) is None:
                continue
            for alpha in strengths:
                change = fitted.at(alpha)
                if permanent and self._permanent(change) is None:
                    break
                yield self._candidate(method, latents, alpha, self._usable(change), fitted)

    def tries(self, methods: Sequence[str]) -> int:
        """How many candidates there are at most."""
        return sum(len(strengths) for _, _, strengths in self._fits(methods))

    def _fits(self, methods: Sequence[str]) -> Iterator[tuple[str, int, Sequence[float]]]:
        """Each method, how many latents it edits (0 for none), and at which strengths."""
        sizes = sorted({min(size, len(self.suspects.latents)) for size in self._settings.sizes} - {0})
        strengths = self._settings.strengths
        with_labels = self._labelled and self.suspects.value is not None
        for method in methods:
            if method == "reconstruction":
                yield method, 0, (1.0,)
            elif method in NEED_LABELS:
                if with_labels:
                    yield method, 0, {"pruning": PRUNED, "dfr": (1.0,)}.get(method, strengths)
            else:
                yield from ((method, size, strengths) for size in sizes)

    def _fitted_or_none(self, method: str, size: int) -> FittedEdit | None:
        """None where the method cannot be fitted, such as to a latent that never fires: the others may still help."""
        try:
            return self._fitted(method, size)
        except UserError as error:
            self.left_out.append(str(error))
            return None

    def _fitted(self, method: str, size: int) -> FittedEdit:
        if method in FITTED_TO_KNOWN:
            first = self._judge.first
            if bool(first.all()):
                raise UserError(f"{method} needs two labelled images of a group: each half of them judges the other's.")
            self._halves[method] = first, self._fitted_to(method, first), self._fitted_to(method, ~first)
            return self._fitted_to(method, torch.ones_like(first))
        if method == "latent_eraser":  # needs no attribute, so it can use all train images
            target = self._target(size)._replace(classes=self.suspects.classes)
            return make_method(method, {"ridge": RIDGE}).fit(self._of_train, target)
        return make_method(method, {}).fit(self._fitting(), self._target(size))

    def _fitted_to(self, method: str, which: Tensor) -> FittedEdit:
        """An edit that is fitted to some of the images that are known."""
        if method == "pruning":
            return self._pruned(which)
        return make_method(method, {"ridge": RIDGE}).fit(self._fitting(which), self._target(0))

    def _of_known(self, method: str, alpha: float, change: Change | None) -> Tensor:
        """The logits of the images that are known; under an edit that was fitted to them, of each half under the edit
        that was fitted to the other half."""
        if method not in self._halves:
            return self._on_known.logits(change)
        first, *fits = self._halves[method]
        of_first, of_second = (self._on_known.logits(self._usable(fit.at(alpha))) for fit in fits)
        return torch.where(first[:, None], of_second, of_first)

    def _new_head(self) -> Candidate:
        """The head of :func:`.reweighted_head`, trained on the images that are known; each half judges the other's."""
        cut, known = replace(self._context, layer="last").cut_of(self._cut.model), self._known
        count = len(cut.order)
        rows, plain = (
            (running if self._cut.linear is not None else Running(self._context, cut, images)).rows()
            for running, images in ((self._on_known, known), (self._on_plain, self._plain))
        )
        given = (rows, known.labels, known.group, count, self._context.seed)
        head, halves = reweighted_head(*given, objects=known.object), heads_of_halves(*given, objects=known.object)
        (reader,) = cut.site.readers
        state, units = cut.model.state_dict(), cut.order
        weight, bias = state[reader.weight].clone(), state[reader.bias].clone()
        weight[units] = head.weight.reshape(weight[units].shape).to(weight)
        bias[units] = head.bias.to(bias)
        change = Change(weights=lambda: {reader.weight: weight, reader.bias: bias})
        on_known, on_plain = halves.logits(rows, known.object, head), halves.logits(plain, self._plain.object, head)
        return self._judged("dfr", (), 1.0, change, None, on_known, torch.zeros(count), on_plain)

    def _pruned(self, which: Tensor) -> FittedEdit:
        """Channels whose attributions speak least for the worst group among some of the images that are known.

        See :class:`.Pruning`, whose attributions and test these are; the target is all groups but the worst.
        """
        group = self._known.group[which]
        by_group = group_accuracies(self._judge.right(self._judge.before)[which], group, int(group.max()) + 1)
        worst = int(by_group.nan_to_num(2.0).argmin())
        if int((group == worst).sum()) < 2:
            raise UserError("pruning needs four labelled images of the worst group: two in each half.")
        return closing(welch(self._attributions[which], group != worst), self._cut)

    @cached_property
    def _attributions(self) -> Tensor:
        """Of the images that are known: the effect of each channel on the image's lead."""
        return self._on_known.attributions(self._known.labels)

    def _permanent(self, change: Change) -> Change | None:
        """The change as weights can hold it: an eraser's shift is left to the biases where a reader cannot hold it.

        An eraser without its shift leaves as little of the attribute; it moves the mean activation. None if the
        readers cannot hold the rest either.
        """
        if not change.permanent and isinstance(change.activations, Affine) and change.activations.left is not None:
            change = replace(change.activations, shift=None).change(self._cut.model, self._cut.site)
        return change if change.permanent else None

    def _usable(self, change: Change) -> Change:
        """The change as weights can hold it, or else as it is."""
        return self._permanent(change) or change

    def _target(self, size: int) -> Target:
        suspects = self.suspects
        own = suspects.classes if suspects.value is None else (suspects.value,)
        return Target(suspects.name, own, suspects.latents[:size], suspects.signs[:size], ("",) * size)

    @cached_property
    def _of_train(self) -> Fitting:
        """The captured activations of the train images."""
        return fitting_of(self._context, self._cut, self._activations, self._sae, self._context.seed)

    def _fitting(self, which: Tensor | None = None) -> Fitting:
        """The activations of images that are known, each position with its image's value of the attribute, or without
        labels its class. ``which``: of the images; None for all."""
        values, count = self._known.labels, len(self._context.classes)
        if self._labelled:
            values, count = self._known.value, len(self._known.values)
        rows = self._known_rows  # [n, P, M]
        if which is not None:
            rows, values = rows[which], values[which]
        labels = values.repeat_interleave(rows.shape[1])
        rows = rows.flatten(0, 1)
        if len(rows) > ROWS:
            chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self._context.seed))[:ROWS]
            rows, labels = rows[chosen], labels[chosen]
        return Fitting(self._cut, rows, labels, count, self._sae)

    @cached_property
    def _known_rows(self) -> Tensor:
        """The activations of the images that are known ``[n, P, M]``."""
        return torch.cat(list(self._on_known.activations()))

    def _candidate(
        self, method: str, latents: tuple[int, ...], alpha: float, change: Change | None, fitted: FittedEdit | None
    ) -> Candidate:
        known, shifts = self._judge.with_new_biases(self._of_known(method, alpha, change))
        return self._judged(method, latents, alpha, change, fitted, known, shifts)

    def _judged(
        self,
        method: str,
        latents: tuple[int, ...],
        alpha: float,
        change: Change | None,
        fitted: FittedEdit | None,
        known: Tensor,
        shifts: Tensor,
        plain: Tensor | None = None,
    ) -> Candidate:
        """A candidate with its score on select images.

        ``known`` are the logits of those whose groups are known, with the biases by which they are judged; ``plain``
        are those of all without new biases, if they are not of the change.
        """
        if plain is None:
            plain = self._on_plain.logits(change) if self._judge.labelled else known - shifts
        return Candidate(method, latents, alpha, change, shifts, *self._judge.of(known, plain + shifts), fitted)
