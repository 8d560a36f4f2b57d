"""Searches that are stopped and continued, on runs whose measures are formulas of their settings."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from salve.artifacts import write_record
from salve.integrity import sealed
from salve.run.folder import MANIFEST, METRICS, RunFolder
from salve.run.schema import Config, SearchSettings
from salve.sweep.plan import Combination, Run, run_key
from salve.sweep.search import Search
from salve.types import Diverged, UserError
from tests import composing

optuna = pytest.importorskip("optuna")

SPACE = ("sae.sparsity=tag(log, interval(0.1, 10))", "sae.dictionary_size=choice(32, 64)")
BOTH = {"select_fve": "maximize", "select_l0": "minimize"}


@pytest.fixture(scope="module")
def base() -> Config:
    return composing.settings()


class Bench:
    """Plans and makes runs in a folder, without computing, and records them."""

    def __init__(self, folder: Path, base: Config) -> None:
        self.folder, self.base = folder, base
        self.made: list[tuple[float, int]] = []
        self.dies_after = 10**9

    def plan_one(self, combination: Combination) -> Run:
        values = {key: value for key, value, _ in combination}
        sparsity, size = float(values["sae.sparsity"]), int(values["sae.dictionary_size"])
        config = replace(self.base, sae=replace(self.base.sae, sparsity=sparsity, dictionary_size=size))
        return Run(run_key(config), {key: value for key, value, swept in combination if swept}, config)

    def make(self, runs: list[Run]) -> None:
        for run in runs:
            folder = RunFolder(self.folder / run.key)
            if folder.state() == "finished":
                continue
            if len(self.made) == self.dies_after:
                raise KeyboardInterrupt
            folder.prepare(run.config)
            sae = run.config.sae
            self.made.append((sae.sparsity, sae.dictionary_size))
            metrics = {"select_fve": 1 - sae.sparsity / 20, "select_l0": sae.dictionary_size / sae.sparsity}
            write_record(folder.path / METRICS, metrics)
            write_record(folder.path / MANIFEST, sealed({"artifacts": {}, "files": {}}))

    def search(self, trials: int, *overrides: str, objectives: dict[str, str] = BOTH) -> list[Run]:
        parsed = OverridesParser.create().parse_overrides(list(overrides or SPACE))
        search = Search(SearchSettings(trials, 2, objectives), parsed, self.folder, seed=0)
        return search.run_trials(self.plan_one, self.make)

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        storage = optuna.storages.JournalStorage(
            optuna.storages.journal.JournalFileBackend(str(self.folder / "optuna.journal"))
        )
        return optuna.load_study(study_name="salve", storage=storage).get_trials()


@pytest.fixture
def bench(tmp_path: Path, base: Config) -> Bench:
    return Bench(tmp_path, base)


def test_a_search_continues_where_it_was_stopped_and_repeats_nothing(bench: Bench) -> None:
    assert len(bench.search(4)) == 4
    assert len(bench.search(4)) == 0  # enough already
    first = list(bench.made)
    assert len(bench.search(7)) == 3
    assert bench.made[:4] == first
    assert len(set(bench.made)) == 7
    for trial in bench.trials():
        params = trial.params
        size = int(params["sae.dictionary_size"])
        assert trial.values == pytest.approx([1 - params["sae.sparsity"] / 20, size / params["sae.sparsity"]])


def test_a_trial_that_was_open_when_the_search_was_killed_is_finished_first(bench: Bench) -> None:
    bench.dies_after = 3  # in the midst of the second pair
    with pytest.raises(KeyboardInterrupt):
        bench.search(6)
    states = [trial.state.name for trial in bench.trials()]
    assert states == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    left = [trial.params["sae.sparsity"] for trial in bench.trials()[2:]]
    bench.dies_after = 10**9
    runs = bench.search(6)
    assert [run.config.sae.sparsity for run in runs[:2]] == left
    assert [trial.state.name for trial in bench.trials()] == ["COMPLETE"] * 6
    assert len(set(bench.made)) == len(bench.made) == 6


def test_an_exhausted_space_ends_the_search(bench: Bench) -> None:
    runs = bench.search(20, "sae.sparsity=choice(1, 2)", "sae.dictionary_size=range(32, 65, 32)")
    assert sorted((run.config.sae.sparsity, run.config.sae.dictionary_size) for run in runs) == [
        *((1, 32), (1, 64), (2, 32), (2, 64)),
    ]


def test_one_objective_is_improved(bench: Bench) -> None:
    bench.search(30, objectives={"select_fve": "maximize"})
    late = [sparsity for sparsity, _ in bench.made[15:]]
    early = [sparsity for sparsity, _ in bench.made[:10]]
    assert sum(late) / len(late) < sum(early) / len(early)


def test_a_run_without_the_measure_fails_its_trial_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "metrics", lambda _: {"select_fve": None, "select_l0": 3.0})
    bench.search(2)
    assert [trial.state.name for trial in bench.trials()] == ["FAIL", "FAIL"]


def test_a_search_with_another_space_is_not_continued(bench: Bench) -> None:
    bench.search(2)
    with pytest.raises(UserError, match=r"holds a search with other space; give this search another sweep.name"):
        bench.search(4, "sae.sparsity=interval(1, 2)", SPACE[1])
    with pytest.raises(UserError, match=r"other settings"):
        bench.search(4, *SPACE, "sae.epochs=3")
    with pytest.raises(UserError, match=r"other objectives"):
        bench.search(4, objectives={"select_fve": "minimize", "select_l0": "minimize"})
    bench.search(4, *SPACE, "cluster=joblib", "sweep.search.trials=4")


@pytest.mark.parametrize(
    ("objectives", "said"),
    [
        ({"fvee": "maximize"}, r"fvee is no measure of a run; the measures are .*fve.*selectivity"),
        ({"select_fve": "up"}, r"select_fve has up, which is neither maximize nor minimize"),
        ({"selectivity": "maximize"}, r"measured on test images.*use select_selectivity"),
        ({}, r"sweep.search.objectives is empty"),
    ],
)
def test_objectives_are_checked(bench: Bench, objectives: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        bench.search(2, objectives=objectives)


@pytest.mark.parametrize("content", [b"\xff\x00{[\n", b"{[\n", b'{"a": 1}\n'])
def test_a_study_that_is_damaged_is_refused_in_a_sentence(bench: Bench, content: bytes) -> None:
    bench.search(1)
    (bench.folder / "optuna.journal").write_bytes(content)
    with pytest.raises(UserError, match=r"optuna\.journal cannot be read as the study of a search; remove it"):
        bench.search(2)
    (bench.folder / "optuna.journal").write_bytes(b"")
    bench.search(1)
    assert len(bench.made) == 1  # the run that was there is found


def test_a_search_over_nothing_is_refused(bench: Bench) -> None:
    with pytest.raises(UserError, match=r"^A search needs settings to vary"):
        bench.search(2, "sae.epochs=3")


def test_a_space_in_which_nothing_is_possible_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Combination) -> Run:
        raise UserError("sae.k=9 must lie between 1 and 8.")

    monkeypatch.setattr(bench, "plan_one", refuse)
    with pytest.raises(UserError, match=r"^sae.k=9"):
        bench.search(4)


def test_a_run_that_diverged_counts_as_the_worst_so_far_and_another_failure_as_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, turn = bench.make, 0

    def make(runs: list[Run]) -> None:
        nonlocal turn
        turn += 1
        if turn in (1, 3):
            plain(runs)
            return
        for run, error in zip(
            runs, (Diverged("The training of the SAE diverged."), UserError("No disk.")), strict=True
        ):
            RunFolder(bench.folder / run.key).prepare(run.config)
            RunFolder(bench.folder / run.key).fail(error)

    monkeypatch.setattr(bench, "make", make)
    bench.search(6)
    trials = bench.trials()
    assert [trial.state.name for trial in trials] == [
        "COMPLETE",
        "COMPLETE",
        "COMPLETE",
        "FAIL",
        "COMPLETE",
        "COMPLETE",
    ]
    fve, l0 = zip(*(trial.values for trial in trials[:2]), strict=True)
    assert trials[2].values == [min(fve), max(l0)]


def test_a_search_that_begins_with_a_divergence_knows_no_worst(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(runs: list[Run]) -> None:
        for run in runs:
            RunFolder(bench.folder / run.key).prepare(run.config)
            RunFolder(bench.folder / run.key).fail(Diverged("The training of the SAE diverged."))

    monkeypatch.setattr(bench, "make", make)
    bench.search(2)
    assert [trial.state.name for trial in bench.trials()] == ["FAIL", "FAIL"]
