"""Rivals: all edit methods at a matched effect, at the last site and inside. When is the gate worth its SAE?"""

from collections.abc import Collection

import pandas as pd

from experiments.claims import Measured
from experiments.compare import with_half
from experiments.experiment import Experiment, Findings, Picture, main, measured, per_testbed, said
from experiments.runs import Study
from salve.backbones import head_site
from salve.edit_settings import RETRAINED
from salve.report.text import plural, points
from salve.sweep.compare import QUICK, statement
from salve.sweep.compared import edits_of_run, forest_figure, table_of

#: What an SAE's latent must beat to be worth anything.
CONTROLS = ("random_gate", "random_latent", "random_decoder")
#: Inside a network a linear SAE explains little, and the margin says little of what closing a latent does.
INSIDE = ("sae=topk", "sae.dictionary_size=256", "sae.k=16", "discover.select=effect")
SITES = {
    "resnet18": ("layer=layer4.1.conv2,layer4.0.conv1", *INSIDE),
    "vit": ("layer=blocks.11.mlp.fc2,blocks.10.mlp.fc1", *INSIDE),
    "scenes": ("layer=layer4.0.conv2",),
}


@per_testbed
def analyse(study: Study) -> Findings:
    edits = pd.concat([table for run in study.runs for table in edits_of_run(run)], ignore_index=True)
    head = head_site(study.context.cut(study.runs[0].artifact("classifier")).model)
    return findings(study, edits.assign(backbone=study.testbed.title), (head.name, *head.aliases))


def findings(study: Study, edits: pd.DataFrame, last: Collection[str]) -> Findings:
    """What edits (:func:`salve.sweep.compared.edits_of`) say; ``last`` are the names of the last site."""
    table = table_of(edits)
    picture = Picture.of(forest_figure(table), "rivals.methods", study)
    at_last = table[table["site"].isin(last)].set_index("method")
    words = [_scope(study, table), statement(table)]
    if "gate" in at_last.index:
        uses = at_last.loc["gate", ["images", "labels"]]
        ahead = at_last.index[at_last["selectivity"] >= at_last.loc["gate", "selectivity"]]
        free = ", ".join(ahead.drop(["gate", RETRAINED], errors="ignore"))
        words.append(said("rivals.uses", study, gate=uses, free=free or said("rivals.none")))
    tables = {"edits": edits, "methods": table}
    return Findings(" ".join(words), {f"rivals-{study.testbed.name}": picture}, tables, _measured(study, table, last))


def _scope(study: Study, table: pd.DataFrame) -> str:
    classes, sites = plural(int(table["classes"].max()), "class"), plural(table["site"].nunique(), "site")
    return said("rivals.measured", study, edited=classes, sites=sites)


def _measured(study: Study, table: pd.DataFrame, last: Collection[str]) -> list[Measured]:
    at_last, gates = table[table["site"].isin(last)].set_index("method"), table[table["method"] == "gate"]
    found = []
    controls = at_last[at_last.index.isin(CONTROLS)]
    if len(controls) and "gate" in at_last.index:
        closest = controls.loc[controls["ahead"].idxmin()]
        lead = with_half(closest, "ahead", signed=True)
        found.append(measured("rivals.controls", study, closest["ahead"], control=closest.name, lead=lead))
    if "rank_one" in at_last.index and len(gates):
        best, rival = gates.loc[gates["selectivity"].idxmax()], at_last.loc["rank_one"]
        gap = best["selectivity"] - rival["selectivity"]
        found.append(measured("rivals.anywhere", study, gap, gap=points(gap), best=best, rival=rival))
    inner = gates[~gates["site"].isin(last)]
    if len(inner):
        share = inner["reached"].mean()
        found.append(measured("rivals.inside", study, share, sites=plural(len(inner), "inner site")))
    return found


EXPERIMENT = Experiment(
    "rivals", "Rivals: other edits at a matched effect", analyse, quick=QUICK, group="beyond", sites=SITES
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
