"""Arguments of Lightning's Trainer, callbacks, and names that are refused with what to use instead."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from hydra.errors import HydraException
from pytorch_lightning.callbacks import Callback, Checkpoint, LearningRateMonitor
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console

from salve.artifacts import Store
from salve.processes.ranks import Ranks
from salve.processes.trainer import TrainerFactory
from salve.run.build import build_context, check_job
from salve.run.explain import explain
from salve.run.refused import OF_TRAINER, RENAMED
from salve.run.schema import CALLBACKS, Config
from salve.settings import TRAINING_STAGES, TrainerSettings
from salve.stages import StageContext
from salve.types import UserError
from tests.composing import changed

Composed = Callable[..., Config]
MINE = "tests.unit.test_trainer_settings.Mine"
MONITOR = "pytorch_lightning.callbacks.LearningRateMonitor"


class Mine(Callback):
    """A user's own callback."""

    def __init__(self, number: int = 0) -> None:
        if number < 0:
            raise RuntimeError("no\nsuch number")
        self.number = number


class MyCheckpoints(Checkpoint):
    """A user's own checkpoints."""


def context(config: Config, folder: Path) -> StageContext:
    return build_context(config, Store(folder), lambda _: DummyLogger(), Console(quiet=True), Ranks("cpu"))


# -- the Trainer


def test_every_argument_of_lightnings_trainer_is_a_setting_or_refused_by_name() -> None:
    of_lightning = set(inspect.signature(pl.Trainer).parameters)
    settings = {item.name for item in fields(TrainerSettings)}
    assert of_lightning <= settings | OF_TRAINER.keys()
    assert not settings & OF_TRAINER.keys()
    assert settings - {"memory"} <= of_lightning
    passed = TrainerSettings("cpu", 1, "auto", "auto", **dict.fromkeys(settings - {*SALVES}, 1))  # type: ignore[arg-type]
    assert {*passed.arguments("finetune")} == settings - {*SALVES}
    assert {*passed.arguments("discover")} < {*passed.arguments("finetune")}


#: Settings of the trainer that salve translates itself.
SALVES = ("accelerator", "devices", "strategy", "precision", "memory")


def test_what_salve_sets_itself_is_refused_with_what_to_use_instead(composed: Composed) -> None:
    with pytest.raises(UserError, match=r"^trainer\.logger cannot be set: choose logger=csv or logger=wandb\.$"):
        composed("+trainer.logger=false")
    for name in OF_TRAINER:
        with pytest.raises(UserError, match=rf"^trainer\.{name} cannot be set: [^\n]*\.$"):
            composed(f"+trainer.{name}=1")


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_is_answered_with_the_new_one(composed: Composed, old: str) -> None:
    said = f"{old} is no setting; its name is {RENAMED[old]}."
    with pytest.raises(UserError) as refused:
        composed(f"+{old}=1")
    assert str(refused.value) == said
    composed(f"{RENAMED[old]}=1")
    with pytest.raises(HydraException) as error:
        changed(f"{old}=1")
    assert explain(error.value) == said


def test_arguments_need_no_plus_and_reach_the_trainer_of_the_stage_that_they_apply_to(
    composed: Composed, tmp_path: Path
) -> None:
    chosen = ["trainer.gradient_clip_val=0.5", "+trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=0.5"]
    config = composed(*chosen, "trainer.detect_anomaly=true", "trainer.log_every_n_steps=3")
    factory = context(config, tmp_path).trainer
    finetune, discover = (factory(stage, 1, [Mine()]) for stage in TRAINING_STAGES)
    assert (finetune.gradient_clip_val, finetune.accumulate_grad_batches) == (0.5, 2)
    assert (discover.gradient_clip_val, discover.accumulate_grad_batches) == (None, 1)
    assert (finetune.limit_train_batches, discover.limit_train_batches) == (0.5, 1.0)
    for trainer in (finetune, discover):
        assert trainer.log_every_n_steps == 3  # type: ignore[attr-defined]
        assert trainer._detect_anomaly
    tests = factory("finetune", 1, [])  # what only measures takes none of them
    assert (tests.gradient_clip_val, tests.limit_train_batches) == (None, 1.0)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.gradient_clip_val=-1", r"gradient_clip_val=-1\.0 must not be negative"),
        ("trainer.accumulate_grad_batches=0", "accumulate_grad_batches=0 must be above 0"),
        ("trainer.gradient_clip_algorithm=max", "gradient_clip_algorithm has max, which is none of norm, value"),
        ("trainer.deterministic=maybe", "deterministic has maybe, which is none of true, false, warn"),
        ("trainer.limit_train_batches=half", "limit_train_batches=half must be a number"),
        ("trainer.profiler=mine", "profiler has mine, which is none of simple, advanced, pytorch"),
    ],
)
def test_a_value_that_the_trainer_cannot_have_is_one_sentence(composed: Composed, override: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"^trainer\.{said}\.$"):
        composed(override)


#: Two callbacks whose states Lightning could not tell apart in a checkpoint.
TWICE = [
    f"callbacks.{name}.{setting}"
    for name in ("a", "b")
    for setting in ("_target_=pytorch_lightning.callbacks.EarlyStopping", "monitor=select_loss")
]


@pytest.mark.parametrize("overrides", [["trainer.limit_train_batches=1.5"], TWICE])
def test_what_lightning_refuses_is_one_sentence_before_any_work(
    composed: Composed, tmp_path: Path, overrides: list[str]
) -> None:
    config = composed(*overrides)
    for check in (check_job, lambda one: context(one, tmp_path)):
        with pytest.raises(UserError, match=r"^Lightning's Trainer cannot be made for stage finetune .*\.$"):
            check(config)


# -- callbacks


def made(context: StageContext, stage: str, *, trains: bool = True) -> list[Callback]:
    """The callbacks that a stage's Trainer has besides those that every Trainer has."""
    own = (Mine, LearningRateMonitor)
    trainer: Any = context.trainer(stage, 1, [pl.Callback()] if trains else [])
    return [one for one in trainer.callbacks if isinstance(one, own)]


def test_a_callback_is_made_anew_for_each_training_of_its_stages(composed: Composed, tmp_path: Path) -> None:
    here = context(
        composed(
            *("callbacks=learning_rate", f"callbacks.mine._target_={MINE}", "callbacks.mine.number=3"),
            *("+callbacks.last._target_=" + MINE, "callbacks.last._stages_=[discover]", "+callbacks.none=null"),
        ),
        tmp_path,
    )
    monitor, mine = made(here, "finetune")
    assert isinstance(monitor, LearningRateMonitor)
    assert isinstance(mine, Mine)
    assert mine.number == 3
    first, second = made(here, "discover")
    assert [type(one) for one in (first, second)] == [Mine, Mine]
    assert first is not made(here, "discover")[0]
    assert made(here, "finetune", trains=False) == []


def test_a_follower_has_a_logger_for_callbacks_that_need_one() -> None:
    factory = TrainerFactory("cpu", None, 1, "32-true", None, False, callbacks={"finetune": (LearningRateMonitor,)})
    assert [type(one) for one in factory("finetune", 1, [Mine()]).loggers] == [DummyLogger]
    assert factory("discover", 1, [Mine()]).loggers == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["callbacks.x.number=3"], r"callbacks\.x names no class; set callbacks\.x\._target_="),
        (["+callbacks.x=3"], r"callbacks\.x names no class"),
        ([f"callbacks.x._target_={MINE}", "callbacks.x._stages_=[control]"], "must be a list of finetune and discover"),
        ([f"callbacks.x._target_={MINE}", "callbacks.x._stages_=finetune"], "must be a list of finetune and discover"),
        (
            [f"callbacks.x._target_={MINE}", "callbacks.x.number._target_=os.getpid"],
            r"callbacks\.x\.number\._target_=os\.getpid: only data, callbacks and backbone name a class",
        ),
        ([f"callbacks.x._target_={MINE}", "sae.ensemble=2"], r"sae\.ensemble=2 .* callbacks\.x .*sae\.ensemble=1"),
    ],
)
def test_settings_of_a_callback_are_a_class_and_plain_values(
    composed: Composed, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        composed(*overrides)


def test_an_ensemble_goes_with_callbacks_of_fine_tuning(composed: Composed) -> None:
    composed("callbacks=learning_rate", "sae.ensemble=2")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("os.system", "is a builtin_function_or_method, not a class"),
        ("pathlib.Path", "does not derive from pytorch_lightning.callbacks.Callback"),
        ("pytorch_lightning.callbacks.Nothing", "has no class Nothing"),
        ("no_such_module.Mine", "there is no module no_such_module"),
        ("pytorch_lightning.callbacks.ModelCheckpoint", "salve keeps the best and the last epoch itself"),
        ("tests.unit.test_trainer_settings.MyCheckpoints", "salve keeps the best and the last epoch itself"),
        ("pytorch_lightning.callbacks.RichProgressBar", "salve shows a bar on a terminal"),
        (MINE, r"cannot be made with the arguments in callbacks.x (RuntimeError: no such number)"),
    ],
)
def test_a_callback_that_cannot_be_made_is_refused_before_any_work(
    composed: Composed, tmp_path: Path, target: str, said: str
) -> None:
    config = composed(f"callbacks.x._target_={target}", *(["callbacks.x.number=-1"] if target == MINE else []))
    for check in (check_job, lambda one: context(one, tmp_path)):
        with pytest.raises(UserError) as refused:
            check(config)
        assert str(refused.value).startswith(f"callbacks.x._target_={target}")
        assert said in str(refused.value)
        assert "\n" not in str(refused.value)


def test_the_callbacks_that_stored_settings_may_name_are_lightnings_and_keep_no_files() -> None:
    for target in CALLBACKS:
        name = target.removeprefix("pytorch_lightning.callbacks.")
        kind: Any = getattr(pl.callbacks, name, None)
        assert kind is None or (issubclass(kind, Callback) and not issubclass(kind, Checkpoint))
    assert MONITOR in CALLBACKS
