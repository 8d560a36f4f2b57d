"""A search for good settings by Optuna, which is asked for trials and told what became of them.

Hydra's own Optuna plugin needs an Optuna older than 3, runs its number of trials anew at every start, and leaves the
trials open that were being run when it was killed; so Optuna's ask-and-tell is driven here, over the same launchers.
"""

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from salve.run.schema import SearchSettings
from salve.sweep.plan import Run, is_computed, refuse_idle_axis
from salve.types import UserError

JOURNAL = "optuna.journal"
#: Proposals in a row that were made before, from which on the space counts as exhausted.
REPEATS = 100

#: Numbers of ``metrics.json`` that a search may go by (:func:`salve.report.metrics.run_metrics`), of the select and the
#: train split. A search chooses, and what the test split shows is there to report on the choice.
MEASURES = (
    *("select_fve", "select_cosine", "select_l0", "select_downstream_accuracy", "select_downstream_kl"),
    *("select_kl_recovered_from_mean", "select_kl_recovered_from_zero"),
    *("dead_fraction", "almost_dead_fraction", "dense_fraction", "purity"),
    *("select_separating", "select_on_target_drop", "select_off_target_drift", "select_selectivity"),
    "alpha_used_median",
)

Combination = list[tuple[str, str, bool]]


class Search:
    """Proposes runs until there are as many trials as wanted, those of earlier commands included.

    Args:
        settings: trials and objectives. overrides: of the command; those that are sweeps span the space.
        sweep: the sweep's folder, which also holds the study. seed: of the proposals.

    Raises:
        UserError: no Optuna, nothing to vary, or a study in the folder that is about something else.
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
            (override.get_key_element(), override.get_value_element_as_str())
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
                f"{journal} cannot be read as the study of a search; remove it and give the same command again, which "
                "finds the runs that are finished."
            ) from error
        about = {
            "space": {key: repr(distribution) for key, distribution in self._space.items()},
            "settings": [f"{k}={v}" for k, v in self._fixed if is_computed(k) and k != "trainer"],
            "objectives": self._settings.objectives,
        }
        before = study.user_attrs.get("about", about)
        if different := [name for name in about if about[name] != before[name]]:
            raise UserError(
                f"{journal} holds a search with other {' and '.join(different)}; give this one another sweep.name, or "
                "repeat the earlier command to go on with it."
            )
        study.set_user_attr("about", about)
        return study

    def _trials(self, *states: Any) -> list[Any]:
        """Trials in these states, without proposals that were turned down."""
        found = self._study.get_trials(deepcopy=False, states=states)
        return [trial for trial in found if not trial.user_attrs.get("repeats")]

    @property
    def done(self) -> int:
        """Trials that have ended."""
        return len(self._trials(self._states.COMPLETE, self._states.FAIL))

    def go_on(self, plan_one: Callable[[Combination], Run], make: Callable[[list[Run]], None]) -> list[Run]:
        """Run what is missing.

        Args:
            plan_one: checks a combination and names its run. make: has runs made that are not finished.

        Returns:
            The runs of this command; their folders say what became of them.

        Raises:
            UserError: no trial of a batch can be run; the message is the first one's reason.
        """
        runs: list[Run] = []
        while batch := self._batch():
            planned: dict[int, Run] = {}
            impossible: list[str] = []
            for number, params in batch.items():
                axes = [(key, _text(params[key]), True) for key in self._space]
                try:
                    planned[number] = plan_one([*((key, value, False) for key, value in self._fixed), *axes])
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
        """The next trials by number: first those that an earlier command left open, then new ones."""
        wanted = self._settings.trials - self.done
        open_trials = self._trials(self._states.RUNNING)
        batch = {trial.number: trial.params for trial in open_trials if trial.params.keys() == self._space.keys()}
        ended = self._trials(self._states.COMPLETE, self._states.FAIL)
        known = [trial.params for trial in ended] + list(batch.values())
        repeats = 0
        while len(batch) < min(self._settings.parallel, wanted) and repeats < REPEATS:
            # Another seed for each, or a search that goes on would draw again what it began with.
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
            # Told as failed, Optuna would learn nothing, and propose what lies beside it again.
            self._study.tell(number, worst, skip_if_finished=True)
        else:  # failed, or without a value; Optuna learns nothing from it
            self._study.tell(number, state=self._states.FAIL, skip_if_finished=True)

    def _worst(self) -> list[float]:
        """The worst that each objective has come to so far; empty if nothing has."""
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
                f"sweep.search.objectives: {name} is measured on test images, which report and must not choose; use "
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
    """A value of Optuna's as it is written on the command line."""
    return value if isinstance(value, str) else repr(value)


def _distribution(override: Override, optuna: Any) -> Any:
    """What Optuna draws from, for one swept setting."""
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
