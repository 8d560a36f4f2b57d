# SPDX-License-Identifier: MIT
"""Search for good settings with Optuna: ask it for trials, run them, and tell it their results.

Hydra's own Optuna plugin is not used: it needs an Optuna below 3, starts from the first trial at every command, and
never finishes the trials that were running when it was killed.
"""

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from salve.run.schema import SearchSettings
from salve.settings import is_computed
from salve.sweep.plan import Argument, Combination, Run, refuse_idle_axis
from salve.types import UserError

JOURNAL = "optuna.journal"
#: The space counts as exhausted after this many proposals in a row that were made before.
REPEATS = 100

#: The measures (:func:`salve.report.metrics.run_metrics`) that may be objectives. All are of the select or the train
#: split: a search chooses, and the test split is there to report on the choice.
MEASURES = (
    *("select_fve", "select_cosine", "select_l0", "select_downstream_accuracy", "select_downstream_kl"),
    *("select_kl_recovered_from_mean", "select_kl_recovered_from_zero"),
    *("dead_fraction", "almost_dead_fraction", "dense_fraction", "purity"),
    *("select_separating", "select_on_target_drop", "select_off_target_drift", "select_selectivity"),
    "alpha_used_median",
)


class Search:
    """A search in a sweep's folder, which a later command continues.

    Args:
        settings: the number of trials, and the objectives.
        overrides: of the command; those that are sweeps span the space.
        sweep: the sweep's folder; the study is kept there.
        seed: of Optuna's sampler.

    Raises:
        UserError: Optuna is not installed, nothing varies, or the study in the folder has another space, other
            settings or other objectives.
    """

    def __init__(self, settings: SearchSettings, overrides: Sequence[Override], sweep: Path, seed: int) -> None:
        try:
            import optuna
        except ImportError:
            raise UserError("A search needs Optuna, which is not installed: pip install 'salve[optuna]'.") from None
        _check(settings)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._states = optuna.trial.TrialState
        self._settings, self._sweep, self._seed = settings, sweep, seed
        swept = [override for override in overrides if override.is_sweep_override()]
        self._fixed = [
            Argument(override.get_key_element(), override.get_value_element_as_str(), False)
            for override in overrides
            if not override.is_sweep_override()
        ]
        self._space = {override.get_key_element(): _distribution(override, optuna) for override in swept}
        if not self._space:
            raise UserError("A search needs settings to vary, such as 'sae.sparsity=tag(log, interval(0.3, 60))'.")
        self._study = self._open(sweep, optuna)
        self._sampler = optuna.samplers.TPESampler

    def _open(self, sweep: Path, optuna: Any) -> Any:
        from optuna.storages.journal import JournalFileBackend

        journal = sweep / JOURNAL
        journal.parent.mkdir(parents=True, exist_ok=True)
        try:
            study = optuna.create_study(
                study_name="salve",
                storage=optuna.storages.JournalStorage(JournalFileBackend(str(journal))),
                directions=list(self._settings.objectives.values()),
                load_if_exists=True,
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{journal} cannot be read as the study of a search; remove it and give the same command again: runs "
                "that are finished are found."
            ) from error
        about = {
            "space": {key: repr(distribution) for key, distribution in self._space.items()},
            "settings": [f"{k}={v}" for k, v, _ in self._fixed if is_computed(k) and k != "trainer"],
            "objectives": self._settings.objectives,
        }
        before = study.user_attrs.get("about", about)
        if different := [name for name in about if about[name] != before[name]]:
            raise UserError(
                f"{journal} holds a search with other {' and '.join(different)}; give this search another sweep.name, "
                "or repeat the earlier command to continue that one."
            )
        study.set_user_attr("about", about)
        return study

    def _trials(self, *states: Any) -> list[Any]:
        """Trials in these states, without proposals that repeat an earlier one."""
        found = self._study.get_trials(deepcopy=False, states=states)
        return [trial for trial in found if not trial.user_attrs.get("repeats")]

    @property
    def done(self) -> int:
        """The number of trials that have ended."""
        return len(self._trials(self._states.COMPLETE, self._states.FAIL))

    def run_trials(self, plan_one: Callable[[Combination], Run], make: Callable[[list[Run]], None]) -> list[Run]:
        """Run trials until there are as many as wanted, those of earlier commands included.

        Args:
            plan_one: composes and checks a combination.
            make: makes runs, save those that are finished.

        Returns:
            The runs of this command; their folders say how they ended.

        Raises:
            UserError: no trial of a batch can be run; the message gives the reason of the first.
        """
        runs: list[Run] = []
        while batch := self._batch():
            planned: dict[int, Run] = {}
            impossible: list[str] = []
            for number, params in batch.items():
                drawn = [Argument(key, _text(params[key]), True) for key in self._space]
                try:
                    planned[number] = plan_one([*self._fixed, *drawn])
                except UserError as error:
                    impossible.append(str(error))
                    self._study.tell(number, state=self._states.FAIL, skip_if_finished=True)
            if not planned:
                raise UserError(impossible[0])
            make(list(planned.values()))
            for number, run in planned.items():
                self._tell(number, run)
            runs += planned.values()
        return runs

    def _batch(self) -> dict[int, dict[str, Any]]:
        """The next trials, as parameters by number: first those that an earlier command left open, then new ones."""
        wanted = self._settings.trials - self.done
        open_trials = self._trials(self._states.RUNNING)
        batch = {trial.number: trial.params for trial in open_trials if trial.params.keys() == self._space.keys()}
        ended = self._trials(self._states.COMPLETE, self._states.FAIL)
        known = [trial.params for trial in ended] + list(batch.values())
        repeats = 0
        while len(batch) < min(self._settings.parallel, wanted) and repeats < REPEATS:
            # Each proposal has a seed of its own, or a continued search would repeat its first proposals.
            count = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = self._sampler(seed=(self._seed * 100_003 + count) % 2**32)
            trial = self._study.ask(self._space)
            if trial.params in known:
                repeats += 1
                trial.set_user_attr("repeats", True)
                self._study.tell(trial, state=self._states.FAIL)
                continue
            repeats = 0
            known.append(trial.params)
            batch[trial.number] = trial.params
        return batch

    def _tell(self, number: int, run: Run) -> None:
        metrics = run.folder(self._sweep).metrics()
        values = [metrics.get(name) for name in self._settings.objectives]
        if all(isinstance(value, int | float) and isfinite(value) for value in values):
            self._study.tell(number, values, skip_if_finished=True)
        elif run.folder(self._sweep).diverged() and (worst := self._worst()):
            # The worst values so far keep Optuna away from here; it learns nothing from a failed trial.
            self._study.tell(number, worst, skip_if_finished=True)
        else:
            self._study.tell(number, state=self._states.FAIL, skip_if_finished=True)

    def _worst(self) -> list[float]:
        """The worst value of each objective so far; empty if no trial has any."""
        measured = [trial.values for trial in self._trials(self._states.COMPLETE)]
        worst = {"maximize": min, "minimize": max}
        directions = self._settings.objectives.values()
        return [worst[way](values) for way, values in zip(directions, zip(*measured, strict=True), strict=False)]


def _check(settings: SearchSettings) -> None:
    if not settings.objectives:
        raise UserError(f"sweep.search.objectives is empty; choose from {', '.join(MEASURES)}.")
    for name, direction in settings.objectives.items():
        if f"select_{name}" in MEASURES:
            raise UserError(
                f"sweep.search.objectives: {name} is measured on test images, by which nothing may be chosen; use "
                f"select_{name}."
            )
        if name not in MEASURES:
            raise UserError(
                f"sweep.search.objectives: {name} is no measure of a run; the measures are {', '.join(MEASURES)}."
            )
        if direction not in ("maximize", "minimize"):
            raise UserError(f"sweep.search.objectives.{name} has {direction}, which is neither maximize nor minimize.")
    for key in ("trials", "parallel"):
        if getattr(settings, key) < 1:
            raise UserError(f"sweep.search.{key}={getattr(settings, key)} must be at least 1.")


def _text(value: Any) -> str:
    """A value that Optuna drew, as on the command line."""
    return value if isinstance(value, str) else repr(value)


def _distribution(override: Override, optuna: Any) -> Any:
    """The distribution that Optuna draws a swept setting from."""
    key, value = override.get_key_element(), override.value()
    refuse_idle_axis(key)
    distributions = optuna.distributions
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        low, high, log = value.start, value.end, "log" in value.tags
        if isinstance(low, int) or "int" in value.tags:
            return distributions.IntDistribution(int(low), int(high), log=log)
        return distributions.FloatDistribution(low, high, log=log)
    if isinstance(value, RangeSweep) and isinstance(value.start, int) and isinstance(value.step, int):
        numbers = list(value.range())
        return distributions.IntDistribution(numbers[0], numbers[-1], step=value.step)
    return distributions.CategoricalDistribution(list(override.sweep_string_iterator()))
