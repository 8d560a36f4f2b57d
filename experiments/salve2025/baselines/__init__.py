"""The permanent gate against steering and a rank-one edit of the head, at a matched effect.

Every method takes a class to ``LEVEL`` at a strength of its own, and is judged by what the other classes lose there. To
add a method, add an entry to :func:`experiments.salve2025.baselines.methods.methods`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from experiments.claims import Measured
from experiments.compare import CONFIDENCE, LEVEL_TEXT
from experiments.experiment import Experiment, Findings, Picture
from experiments.runs import SAERun, Study
from experiments.salve2025.baselines.figure import baselines_figure
from experiments.salve2025.baselines.methods import (
    ABLATION,
    BIAS,
    GATE,
    RANK_ONE,
    STEERING,
    Chosen,
    Reader,
    compare_methods,
    summarise,
)
from salve.report.text import plural, points


def chosen_by(run: SAERun) -> Chosen:
    """Columns and signs of the latents that an SAE has for the classes; sign 0 for a class without one."""
    latents = torch.tensor(run.selected["latent"].fillna(0).to_numpy(int))
    signs = torch.tensor(run.selected["sign"].where(run.selected["latent"].notna(), 0).to_numpy(int))
    return Chosen(run.sae.decoder.detach()[:, latents].T, signs)


def edits_of(study: Study) -> pd.DataFrame:
    """Every method's edit of every class on a testbed: see :func:`compare_methods`."""
    splits = ((split.activations, split.labels) for split in (study.train, study.select, study.test))
    reader = Reader(study.tail, *splits)
    return compare_methods(reader, {run.seed: chosen_by(run) for run in study.runs}, study.classes)


def analyse(studies: Sequence[Study]) -> Findings:
    """See the module."""
    found = Findings.together([_analyse(study) for study in studies])
    images = " and ".join(f"{len(study.test.labels)} of {study.testbed.title}" for study in studies)
    caption = (
        "What it costs the other classes to take one class away, on test images, each method at the strength that "
        f"leaves {LEVEL_TEXT} of the class's select images (at the right: for how many classes there is one, "
        "and what it leaves of their test images). Selectivity: what the class loses less the mean absolute change of "
        "the others; 0 for a class that no strength takes there. Second column: the gate's less the method's. KL: of "
        "the others' predictions from those without the edit. Large markers: mean over classes and SAEs, with "
        f"{100 * CONFIDENCE:.0f} % intervals over SAEs that end where an axis does (of differences: paired, and for "
        f"all methods together; the head's edits need no SAE). Dots: classes. Test images: {images}."
    )
    picture = Picture(baselines_figure(found.tables["edits"]), caption)
    return replace(found, paragraph=f"{found.paragraph}\n\n{WHY}", pictures={"baselines": picture})


def _analyse(study: Study) -> Findings:
    testbed, edits = study.testbed, edits_of(study)
    summary = summarise(edits)
    tables = {"edits": edits.assign(testbed=testbed.title), "methods": summary.assign(testbed=testbed.title)}
    words = f"{testbed.title}: {paragraph(summary, edits)}"
    return Findings(words, {}, tables, measured_of(testbed.name, summary))


#: What the comparison can show, whatever the numbers are.
WHY = (
    "What this can show: where only the class's own logit falls, as with its bias, no right answer for another class "
    "can be lost; what changes there is gain. So behind a linear head no edit of the representation loses fewer images "
    "of the others than one of the head, and steering is there itself a change of the biases, the same for every "
    "image. Accuracy at the last site can show that an edit is clean, not that a gate is the better kind of edit; that "
    "takes a deeper site, where what follows is not linear."
)


def measured_of(testbed: str, summary: pd.DataFrame) -> list[Measured]:
    """The numbers that decide: how far the gate is ahead of rivals, and the latent's direction of random ones."""
    rows = summary[summary["direction"] != "random"].set_index("method")
    found = []
    for claim, rival in (("steering", STEERING), ("rank_one", RANK_ONE)):
        row = rows.loc[rival]
        text = (
            f"{_points(row['ahead'], row['ahead_half'], signed=True)} points: "
            f"{_points(rows.loc[GATE, 'selectivity'])} against {_points(row['selectivity'])}"
        )
        found.append(Measured(f"baselines.{claim}", testbed, float(row["ahead"]), text))
    least = rows.loc[rows["over_random"].idxmin()]
    text = (
        f"{least.name}, the least ahead: {_points(least['over_random'], least['over_random_half'], signed=True)} points"
    )
    return [*found, Measured("baselines.random", testbed, float(least["over_random"]), text)]


def paragraph(summary: pd.DataFrame, edits: pd.DataFrame) -> str:
    """What the numbers say about one testbed; see :func:`summarise` and :func:`compare_methods`."""
    rows = summary[summary["direction"] != "random"].set_index("method")
    random = summary[summary["direction"] == "random"].set_index("method")
    gate, rivals = rows.loc[GATE], rows.drop(index=GATE)
    verdicts = {name: _verdict(row["ahead"], row["ahead_half"]) for name, row in rivals.iterrows()}
    sentences = [
        f"{_headline(list(verdicts.values()))} (selectivity {_points(gate['selectivity'], gate['selectivity_half'])} "
        f"points, mean of {plural(gate['classes'], 'class')} and {plural(gate['seeds'], 'SAE')}; the strengths chosen "
        f"leave {_points(gate['after'])} % of a class's test images, and the others' accuracy changes by "
        f"{_points(gate['drift'])} points, {_points(gate['lost'])} of them lost)."
    ]
    for verdict, words in VERDICTS.items():
        each = [
            f"{IN_WORDS.get(name, name)} ({_points(row['ahead'], row['ahead_half'], signed=True)})"
            for name, row in rivals.iterrows()
            if verdicts[name] == verdict
        ]
        if each:
            sentences.append(f"It is {words} {_listed(each)}.")
    chance, kl, bias = random["selectivity"], rows["kl"], rows.loc[BIAS]
    ablated = edits[(edits["method"] == ABLATION) & (edits["direction"] == "latent") & edits["selectivity"].notna()]
    alone = float((ablated["reached"] & (ablated["alpha"] <= 1)).mean())
    sentences += [
        f"Lowering the class's bias needs neither SAE nor data and reaches {_points(bias['selectivity'])} points; "
        f"the others change by {_points(bias['drift'])}, {_points(bias['lost'])} of them lost.",
        f"Along random directions gate, steering and ablation have {_points(chance.min())} to {_points(chance.max())} "
        f"points, and take {random['reached'].min():.1f} to {random['reached'].max():.1f} classes to "
        f"{LEVEL_TEXT} of their select images.",
        f"The others' predictions move least under {IN_WORDS.get(kl.idxmin(), kl.idxmin())} (KL {kl.min():.3f} nats; "
        f"gate {gate['kl']:.3f}).",
        f"The strength that select chooses for directional ablation does no more than project the latent's direction "
        f"out in {100 * alone:.0f} % of edits.",
    ]
    return " ".join(sentences)


#: What the difference in selectivity between the gate and a rival says, with its interval.
VERDICTS = {
    "more": "more selective than",
    "less": "less selective than",
    "same": "not told apart from",
    "single": "compared by one SAE, hence without an interval, with",
}
#: Names of methods inside a sentence, where they differ.
IN_WORDS = {RANK_ONE: "the rank-one edit", BIAS: "a lower bias of the class"}


def _verdict(ahead: float, half: float) -> str:
    if math.isnan(half):
        return "single"
    return "more" if ahead > half else "less" if ahead < -half else "same"


def _headline(verdicts: Sequence[str]) -> str:
    more, of = verdicts.count("more"), len(verdicts)
    if "single" in verdicts:
        return "At a matched effect, one SAE's gate is compared with its rivals"
    if more == of:
        return "At a matched effect the gate is cleaner than all of its rivals"
    share = f"cleaner than {more} of its {of}" if more else "not cleaner than its"
    return f"At a matched effect the gate is {share} rivals"


def _points(share: float, half: float = math.nan, signed: bool = False) -> str:
    """In percentage points, with half the interval where there is one."""
    text = points(share, signed)
    return text if math.isnan(half) else f"{text} ± {points(half, signed=False)}"


def _listed(parts: Sequence[Any]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


EXPERIMENT = Experiment(
    "baselines",
    "Steering and rank-one baselines",
    ("resnet18", "vit"),
    analyse,
    quick=("sae.seed=0,1", "sae.epochs=20"),
)
