"""The audit finds a planted shortcut: the tag that stands beside the clinics of the train images."""

from pathlib import Path

import pytest
from rich.console import Console

from salve.run.execute import execute
from tests.composing import settings

#: As in the recipe repair/quickstart, at the strength of the shortcut that the method promises to find.
SCENES = (
    *("experiment=repair/quickstart", "data.spurious_correlation=0.95", "stages=[audit]", "trainer=cpu"),
    *("audit.suspects=3", "audit.top_images=1", "validate.pictures=1"),
)


@pytest.mark.nightly
@pytest.mark.timeout(900)  # it trains a network and an SAE; beside other work this takes minutes
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_planted_shortcut_is_among_the_first_suspects_and_first_with_labels(seed: int, tmp_path: Path) -> None:
    first = {}
    for labels in (0, 25):
        config = settings(*SCENES, f"seed={seed}", f"audit.labels={labels}", f"output_dir={tmp_path}")
        found = execute(config, tmp_path / f"run-{labels}", "salve (test)", Console(quiet=True))
        table = found["audit"].table("suspects.csv")
        own = table[table["class"] == "clinic"].set_index("rank")
        # Ablating the latent that carries the tag undoes what the tag turns into clinics.
        first[labels] = own.index[own["counterfactual"] > 0.5]
    assert len(first[0]), "without labels the tag's latent is among the first three"
    assert 1 in first[25], "with 25 labels a group it is the first"
