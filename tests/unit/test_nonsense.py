"""A training that came to nonsense is no result: nothing goes on from it, and nothing of it is left."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from salve.artifacts import Artifact
from salve.run.schema import Config
from salve.stages import StageContext, capture, finetune, train, train_sae, train_saes
from salve.stages.targets import targets_of
from salve.types import Diverged, UserError
from tests.unit.test_tryout import built


@pytest.fixture(scope="module")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, StageContext, Artifact, Artifact]:
    config, context = built(tmp_path_factory.mktemp("store"), "finetune.epochs=1", "sae.steps=10", "sae.batch_size=8")
    classifier = finetune(context, config.finetune)
    return config, context, classifier, capture(context, config.capture, classifier)


def left_of(store: Path) -> set[str]:
    return {path.name for path in (store / "sae").glob("*")} | {
        path.name for path in (store / "unfinished").glob("sae-*/scratch/*")
    }


def test_an_sae_that_diverged_is_no_artifact_and_leaves_no_checkpoint(
    testbed: tuple[Config, StageContext, Artifact, Artifact],
) -> None:
    config, context, *inputs = testbed
    bad = replace(config.sae, learning_rate=1e4)
    for _ in range(2):  # the second attempt begins anew, and ends the same
        with pytest.raises(Diverged, match=r"The training of the SAE diverged: .* lower sae\.learning_rate"):
            train_sae(context, bad, *inputs)
        assert left_of(context.store.root) == set()
    assert train_sae(context, config.sae, *inputs).record("sae.json")["select_fve"] > -1e6


def test_of_saes_that_are_trained_together_those_that_came_to_something_are_there(
    testbed: tuple[Config, StageContext, Artifact, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, context, *inputs = testbed
    made = train.SAEEnsemble.trained

    def spoiled(self: train.SAEEnsemble, number: int) -> tuple[object, object]:
        sae, history = made(self, number)
        if number == 1:
            sae.encoder.data.mul_(1e9)
        return sae, history

    monkeypatch.setattr(train.SAEEnsemble, "trained", spoiled)
    two = [replace(config.sae, seed=seed) for seed in (11, 12)]
    with pytest.raises(Diverged, match=r"The training of 1 of 2 SAEs diverged: .*sae\.seed=12; lower"):
        train_saes(context, two, *inputs)
    assert train_sae(context, two[0], *inputs).reused
    assert not train_sae(context, two[1], *inputs).reused


def test_an_sae_none_of_whose_latents_fires_has_nothing_to_edit(tmp_path: Path) -> None:
    pd.DataFrame({"class": ["a", "b"], "latent": [None, None], "sign": [None, None], "kind": [""] * 2}).to_csv(
        tmp_path / "selected.csv", index=False
    )
    pd.DataFrame({"latent": [0], "kind": ["dead"], "top_class": ["a"], "sign": [1]}).to_csv(
        tmp_path / "latents.csv", index=False
    )
    with pytest.raises(UserError, match="No latent of the SAE fires for an image of any class"):
        targets_of(["a", "b"], Artifact("features", "k", tmp_path, "d", True), [])
