"""Composition: sequences of edits of classes whose channels are known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from experiments.beyond.composition import EXPERIMENT, analyse
from experiments.beyond.composition.measures import MOST, edits_of, half_of, orders_of, sequences
from experiments.claims import load_claims
from experiments.testbeds import TESTBEDS
from salve.backbones import Reader, Site
from salve.backbones.tail import LinearTail
from salve.editing import edited_logits
from salve.sae import make_sae

CLASSES = ["ant", "bee", "cow", "dog"]
ALPHAS = [0.0, 0.5, 1.0, 1.5, 2.0]
#: Each class has two channels of its own.
OWN = torch.eye(4).repeat_interleave(2, dim=0)


def a_study(decoder: Tensor) -> Any:
    """One SAE whose latent k is class k's; an image of a class is active at the two channels of its class alone."""
    labels = torch.arange(16) % 4
    activations = (1 + torch.arange(16)[:, None] / 100) * OWN[:, labels].T
    head = nn.Linear(8, 4)
    head.weight.data, head.bias.data = OWN.T.clone(), torch.tensor([0.0, 0.1, 0.2, 0.3])
    tail = LinearTail(head.weight.detach(), head.bias.detach())
    images = SimpleNamespace(activations=activations, labels=labels)

    def curves(split: str, mode: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        right = edited_logits(tail, activations, decoder[:, CLASSES.index(name)], ALPHAS).argmax(dim=2) == labels
        return np.array(ALPHAS), np.stack([right[:, labels == k].double().mean(dim=1) for k in range(4)], axis=1)

    sae = make_sae("linear_l1", 8, 4, torch.Generator().manual_seed(0))
    sae.decoder.data = decoder
    run = SimpleNamespace(
        **{"seed": 0, "sae": sae, "curves": curves, "artifact": lambda kind: kind},
        flat_settings={"edit.scale": "unit", "edit.channels": "all", "backbone.name": "toy"},
        selected=pd.DataFrame({"latent": [0.0, 1, 2, 3], "sign": [1.0] * 4}, index=CLASSES),
    )
    site = Site("last", (Reader("weight"),), 8)
    context = SimpleNamespace(cut=lambda classifier: SimpleNamespace(model=head, site=site))
    known = {"testbed": TESTBEDS["scenes"], "classes": CLASSES, "runs": [run], "tail": tail, "context": context}
    return SimpleNamespace(**known, select=images, test=images)


def test_edits_that_share_no_channel_cost_the_others_nothing() -> None:
    found = analyse([a_study(OWN / 2**0.5)])
    steps = found.tables["steps"]
    sequence = steps[steps["how"] == "sequence"]
    assert sequence["edits"].tolist() == list(range(4)) * 5
    assert sequence["kept"].dropna().eq(1).all()
    # Class dog wins where all is closed, so that its own edit never takes it: three classes can be edited.
    assert (found.tables["capacities"][["predicted", "measured", "edits"]] == 3).to_numpy().all()
    assert found.tables["classes"]["closed"].dropna().eq(0).all()  # dog has no edit
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() == {name for name in load_claims() if name.startswith("composition.")}
    assert (values["composition.bits"], values["composition.kept"]) == (1, 1)
    assert np.isnan(values["composition.capacity"])  # nothing is lost, so there is nothing to rank


def test_sequences_are_those_of_the_weights_edited_one_after_the_other() -> None:
    """Latent 1 also closes the channels of class 0: plain loops over the head's weights say what it costs."""
    decoder = OWN.clone()
    decoder[:2, 1] = 0.6
    study = a_study(torch.nn.functional.normalize(decoder, dim=0))
    (run,) = study.runs
    edits = edits_of(study, run)
    steps, classes, _ = sequences(study, run, edits)
    for number, order in enumerate(orders_of(edits.labels)):
        weight, edited = study.tail.weight.double(), list[int]()
        for k, label in enumerate(order, start=1):
            at = edits.labels.index(label)
            for j in range(8):
                weight[:, j] = weight[:, j] * max(0.0, 1 - edits.alphas[at] * abs(float(edits.vectors[at, j])))
            edited.append(label)
            logits = study.test.activations.double() @ weight.T + study.tail.bias.double()
            right = (logits.argmax(dim=1) == study.test.labels).numpy()
            rest = ~np.isin(study.test.labels.numpy(), edited)
            row = steps[(steps["order"] == number) & (steps["edits"] == k) & (steps["how"] == "sequence")].iloc[0]
            assert row["edited"] == pytest.approx(right[~rest].mean())
            assert np.isnan(row["kept"]) if not rest.any() else row["kept"] == pytest.approx(right[rest].mean())
    # Class 0 loses channels to the edit of class 1, and to no other.
    ant = classes[classes["class"] == "ant"]
    assert set((ant["closed"] > 0).tolist()) == {True, False}
    assert classes[classes["class"] != "ant"]["closed"].dropna().lt(1).all()


def test_what_half_is() -> None:
    assert [half_of(count) for count in (1, 2, 9, 10, 100)] == [1, 1, 4, 5, MOST]
    assert EXPERIMENT.module == "experiments.beyond.composition"
