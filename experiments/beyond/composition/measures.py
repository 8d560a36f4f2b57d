"""Sequences of edits: what they do to every class, what the gates say of it, and the bits of the weights."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from experiments.compare import intervals, strength_to
from experiments.runs import SAERun, Study, Values, suppressed
from experiments.salve2025.critical.measures import contribution_of
from salve.editing import Edit, GateFile, apply_edit_files, edited_logits, gate, make_edit_files, undo_edit_file
from salve.editing.capacity import capacity, closed_shares, kept_by_gates, untouched
from salve.metrics import per_class_accuracy

#: How many orders are drawn, and the most edits in one.
ORDERS, MOST = 5, 50
#: Numbers of edits at which the sequence is compared with a joint edit, besides half of the classes.
JOINT = (1, 2, 5, 10, 20, 50)
#: Edits in the sequence that is applied to the network's weights, of which the middle one is undone.
UNDONE = 5
#: A class is kept while it has more than this share of its accuracy.
KEPT = 0.5


class Edits(NamedTuple):
    """The edits of an SAE, of the classes that some strength takes to ``LEVEL`` on select.

    Attributes:
        labels: ``[E]``. alphas: ``[E]``, their strengths. vectors: ``[E, M]``, contributions. grid: strengths that a
            joint edit may have.
    """

    labels: list[int]
    alphas: list[float]
    vectors: Float[Tensor, "E M"]
    grid: list[float]

    def gates(self, classes: int) -> Float[Tensor, "C M"]:
        """The gate of each class's edit, float64; ones for a class without one."""
        found = torch.ones(classes, self.vectors.shape[1], dtype=torch.float64)
        for label, alpha, vector in zip(self.labels, self.alphas, self.vectors.double(), strict=True):
            found[label] = gate(vector, alpha)
        return found


def edits_of(study: Study, run: SAERun) -> Edits:
    found = [one for one in suppressed(run, study.classes) if one.edit.reached]
    vectors = [contribution_of(run, one.name).detach() for one in found]
    rows = torch.stack(vectors) if vectors else torch.empty(0, study.tail.weight.shape[1])
    grid = list(found[0].alphas) if found else []
    return Edits([one.own for one in found], [one.edit.alpha for one in found], rows, grid)


def orders_of(labels: Sequence[int]) -> list[list[int]]:
    """Orders of the edited classes, drawn from a seed of their own."""
    generator = np.random.default_rng(0)
    return [generator.permutation(labels).tolist()[:MOST] for _ in range(ORDERS)]


def sequences(study: Study, run: SAERun, edits: Edits) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """What every sequence of an SAE's edits does on test.

    Returns:
        One row per order, number of ``edits`` and ``how`` (sequence or joint): ``edited``, mean accuracy of the classes
        edited; ``kept`` of the others, and ``before``, theirs without an edit; ``predicted``, the share of them that
        the gates say is kept. One row per order and class that is not edited when half are: ``closed``, by the gates
        (:func:`salve.editing.capacity.closed_shares`), and ``left``, the share of its accuracy. One row per order: both
        capacities.
    """
    count, gates = len(study.classes), edits.gates(len(study.classes))
    key = {"testbed": study.testbed.name, "seed": run.seed}
    steps, classes, capacities = list[dict](), list[dict](), list[dict]()
    before = _accuracy(study, study.test.activations)
    half = half_of(len(edits.labels))
    for number, order in enumerate(orders_of(edits.labels)):
        here = key | {"order": number}
        together = torch.cat([torch.ones_like(gates[:1]), gates[order].cumprod(dim=0)])
        accuracy = np.stack([_accuracy(study, study.test.activations * one.float()) for one in together])
        kept, others = kept_by_gates(gates, order), untouched(count, order)
        for k in range(len(order) + 1):
            rest = others[k].numpy()
            found = {"predicted": _mean(kept[k].numpy()[rest]), "before": _mean(before[rest])}
            rows = {"sequence": accuracy[k]}
            if k and k in (*JOINT, half):
                rows["joint"] = _joint(study, edits, order[:k])
            for how, one in rows.items():
                ends = {"edited": _mean(one[~rest]), "kept": _mean(one[rest])}
                steps.append(here | {"edits": k, "how": how} | ends | found)
        closed, left = closed_shares(gates, order)[half], accuracy[half] / before
        for own in np.flatnonzero(others[half]):
            row = {"class": study.classes[own], "closed": float(closed[own]), "left": left[own]}
            classes.append(here | {"edits": half} | row)
        both = {"predicted": capacity(kept, order)}
        both["measured"] = capacity(torch.as_tensor(accuracy > KEPT * before), order)
        capacities.append(here | both | {"edits": len(order)})
    return pd.DataFrame(steps), pd.DataFrame(classes), pd.DataFrame(capacities)


def half_of(edits: int) -> int:
    """How many edits are half of all."""
    return max(1, min(edits // 2, MOST))


def _mean(values: Values) -> float:
    """Of the values that are known; NaN if none is."""
    known = values[~np.isnan(values.astype(float))]
    return float(known.mean()) if len(known) else np.nan


def _accuracy(study: Study, activations: Tensor) -> Values:
    """Of every class on test ``[C]``."""
    predictions = study.tail(activations).argmax(dim=1)
    return per_class_accuracy(predictions, study.test.labels, len(study.classes)).numpy()


def _joint(study: Study, edits: Edits, chosen: Sequence[int]) -> Values:
    """The accuracy of every class on test, of one edit of all chosen classes at the strength at which select has them
    at ``LEVEL`` in the mean; NaN where no strength takes them there."""
    vectors = edits.vectors[[edits.labels.index(label) for label in chosen]]
    logits = edited_logits(study.tail, study.select.activations, vectors, edits.grid)
    select = [per_class_accuracy(one.argmax(dim=1), study.select.labels, len(study.classes)) for one in logits]
    alpha = strength_to(np.array(edits.grid), torch.stack(select)[:, list(chosen)].mean(dim=1).numpy())
    if not np.isfinite(alpha):
        return np.full(len(study.classes), np.nan)
    return _accuracy(study, study.test.activations * gate(vectors, alpha))


def bits_of(study: Study, run: SAERun, edits: Edits) -> list[bool]:
    """For each order, whether the network's own weights get the same bits applied forwards and backwards, and whether
    undoing the middle edit gives the bits of the others alone."""
    cut, settings = study.context.cut(run.artifact("classifier")), run.flat_settings
    state = {name: tensor.cpu() for name, tensor in cut.model.state_dict().items()}
    named = []
    for label, alpha in zip(edits.labels, edits.alphas, strict=True):
        latent = run.selected.loc[study.classes[label]]
        look = {"scale": settings["edit.scale"], "channels": settings["edit.channels"], "sign": int(latent["sign"])}
        named.append((study.classes[label], [Edit(int(latent["latent"]), float(alpha), **look)]))
    files = make_edit_files(cut.model, cut.site, run.sae, named, run.flat_settings["backbone.name"])
    found = []
    for order in orders_of(range(len(files))):
        chosen = [files[k] for k in order[:UNDONE]]
        middle = chosen[len(chosen) // 2]
        rest = [one for one in chosen if one is not middle]
        forwards, held = state, list[GateFile]()
        for one in chosen:
            forwards, held = apply_edit_files([one], forwards, held), [*held, one]
        backwards = apply_edit_files(chosen[::-1], state)
        undone = undo_edit_file(middle, forwards, rest)
        alone = apply_edit_files(rest, state) if rest else state
        pairs = ((forwards, backwards), (undone, alone))
        found.append(all(torch.equal(one[name], other[name]) for one, other in pairs for name in state))
    return found


def summary_of(steps: pd.DataFrame) -> pd.DataFrame:
    """One row per testbed, ``how`` and number of edits: mean over SAEs and orders of each measure, with half the
    interval over SAEs (``<measure>_half``)."""
    keys, measures = ["testbed", "how", "edits"], ["edited", "kept", "before", "predicted"]
    seeds = steps.groupby([*keys, "seed"], sort=False)[measures].mean().reset_index()
    return pd.DataFrame(
        [dict(zip(keys, at, strict=True)) | intervals(dict(rows[measures].items()))
         for at, rows in seeds.groupby(keys, sort=False)]
    )  # fmt: skip
