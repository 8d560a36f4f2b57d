"""SAEs that are trained together come out as those that are trained alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from salve.activations import Block, Captured
from salve.artifacts import Artifact, NotMade, Store
from salve.backbones.tail import LinearTail
from salve.processes.trainer import _Checkpoints
from salve.sae import VARIANTS, SparseAutoencoder, make_sae
from salve.sae import module as sae_module
from salve.sae.ensemble import SAEEnsemble
from salve.stages import BackboneSettings, SAESettings, StageContext, can_share, train_sae, train_saes
from salve.stages import train as train_stage
from salve.types import UserError
from tests.unit.sae_examples import plain_trainer

ROWS, WIDTH, CLASSES = 70, 12, 3
SETTINGS = SAESettings(
    variant="linear_l1",
    dictionary_size=8,
    sparsity=0.5,
    k=None,
    centre=False,
    learning_rate=0.01,
    batch_size=16,  # six rows are left of a pass
    steps=18,
    seed=0,
    ensemble=8,
)


@pytest.fixture(autouse=True)
def four_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of a few steps is not measured after each."""
    monkeypatch.setattr("salve.stages.train.PARTS", 4)


class Alone:
    """The ranks of a context that has one, or says that it has several."""

    def __init__(self, several: bool = False) -> None:
        self.several, self.devices = several, [torch.device("cpu")]

    def __call__(self, work: Callable[..., Any], /, *args: Any) -> Any:
        return work(*args)


class SmallContext(StageContext):
    """A context whose activations and head are drawn instead of captured."""

    def activations(self, activations: Artifact, split: str) -> Captured:
        generator = torch.Generator().manual_seed(len(split))
        rows = ROWS if split == "train" else 25
        drawn = torch.randn(rows, WIDTH, generator=generator) * torch.linspace(0.5, 4, WIDTH) + 1
        return Captured(drawn, torch.randint(CLASSES, (rows,), generator=generator))

    def cut(self, classifier: Artifact) -> Any:
        generator = torch.Generator().manual_seed(9)
        return SimpleNamespace(
            linear=LinearTail(
                torch.randn(CLASSES, WIDTH, generator=generator), torch.randn(CLASSES, generator=generator)
            )
        )


@contextmanager
def no_progress(_: str, __: int) -> Iterator[Callable[[int], None]]:
    yield lambda _: None


def trainer(_: str, epochs: int, callbacks: list[pl.Callback]) -> pl.Trainer:
    return plain_trainer(epochs, callbacks=callbacks, plugins=[_Checkpoints()])


Train = Callable[..., list[Artifact]]
#: What a member may have besides.
MORE: dict[str, dict[str, Any]] = {
    "gated": {"learn_b_dec": True},
    # In smaller batches some latent fires alone in a whole batch, as at k = 1 below.
    "jumprelu": {"batch_size": 35},
    "batch_topk": {"auxk": 3},
    "matryoshka": {"auxk": 2, "prefixes": [0.5, 1.0], "start": "data", "learn_b_dec": True},
}


def context_and_inputs(folder: Path) -> tuple[StageContext, Artifact, Artifact]:
    """A context on a store of its own, and the artifacts that SAEs are made from."""
    store = Store(folder)
    inputs = [store.get_or_make(kind, {}, lambda path, _: None) for kind in ("classifier", "activations")]
    data: Any = None
    backbone = BackboneSettings("timm", "none", "random")
    context = SmallContext(store, data, backbone, "last", 0, trainer, torch.device("cpu"), no_progress, Alone())
    return context, inputs[0], inputs[1]


def together(folder: Path, settings: list[SAESettings]) -> list[Artifact]:
    context, *inputs = context_and_inputs(folder)
    return train_saes(context, settings, *inputs)


def alone(folder: Path, settings: list[SAESettings]) -> list[Artifact]:
    context, *inputs = context_and_inputs(folder)
    return [train_sae(context, one, *inputs) for one in settings]


def assert_same(got: list[Artifact], expected: list[Artifact]) -> None:
    """The same keys and files, and numbers to float tolerance."""
    for one, other in zip(got, expected, strict=True):
        assert one.key == other.key
        assert one.record("key.json") == other.record("key.json")
        names = [sorted(path.name for path in artifact.path.iterdir()) for artifact in (one, other)]
        assert names[0] == names[1]
        pd.testing.assert_frame_equal(one.table("history.csv"), other.table("history.csv"), rtol=1e-3, atol=1e-5)
        mine, theirs = one.tensors("sae.safetensors"), other.tensors("sae.safetensors")
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        mine, theirs = one.record("sae.json"), other.record("sae.json")
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert mine[name] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """The kinds of modules that were trained, in order."""
    kinds: list[type] = []
    plain = train_stage.fit

    def spy(context: StageContext, stage: str, module: pl.LightningModule, *args: Any, **kwargs: Any) -> Any:
        kinds.append(type(module))
        return plain(context, stage, module, *args, **kwargs)

    monkeypatch.setattr(train_stage, "fit", spy)
    return kinds


@pytest.mark.parametrize("variant", VARIANTS)
def test_members_are_what_they_would_be_alone(variant: str, tmp_path: Path, fits: list[type]) -> None:
    base = replace(SETTINGS, variant=variant, k=2, centre=variant == "relu_l1", **MORE.get(variant, {}))
    # Every two settings in each of their combinations.
    grid = [
        replace(base, dictionary_size=size, sparsity=sparsity, seed=seed)
        for size, sparsity, seed in ((8, 0.1, 0), (8, 1.0, 3), (6, 0.1, 3), (6, 1.0, 0))
    ]
    found = together(tmp_path / "together", grid)
    assert fits == [SAEEnsemble]
    expected = alone(tmp_path / "alone", grid)
    assert fits[1:] == [SparseAutoencoder] * len(grid)
    assert_same(found, expected)
    # Were the comparison too coarse, two members would pass for each other.
    with pytest.raises(AssertionError):
        assert_same([replace(found[0], key=expected[1].key)], expected[1:2])
    histories = [artifact.table("history.csv")["loss"] for artifact in found]
    assert all(not np.allclose(histories[0], other, rtol=1e-2) for other in histories[1:])


@pytest.mark.parametrize(
    "settings",
    [
        [replace(SETTINGS, dictionary_size=size) for size in (1, 2)],
        [replace(SETTINGS, batch_size=1000, seed=seed) for seed in (0, 1)],
        [replace(SETTINGS, batch_size=69, seed=seed) for seed in (0, 1)],  # one row is left of a pass
        # Not k = 1: fresh, its encoder's gradient is zero but for rounding, which Adam blows up to whole steps.
        [replace(SETTINGS, variant="topk", sparsity=0.0, k=k) for k in (8, 3)],
        [replace(SETTINGS, variant="topk", dictionary_size=size, sparsity=0.0, k=size) for size in (3, 6)],
    ],
    ids=["one latent", "a batch of all rows", "one row left of a pass", "different k", "k of all"],
)
def test_members_at_the_edges(settings: list[SAESettings], tmp_path: Path) -> None:
    assert_same(together(tmp_path / "together", settings), alone(tmp_path / "alone", settings))


def test_every_step_has_a_whole_batch_of_rows_drawn_pass_by_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    plain = SparseAutoencoder.training_step

    def spy(self: SparseAutoencoder, batch: Block, index: int) -> None:
        seen.extend(batch.rows.split(batch.sizes))
        plain(self, batch, index)

    monkeypatch.setattr(SparseAutoencoder, "training_step", spy)
    context, *inputs = context_and_inputs(tmp_path)
    train_sae(context, replace(SETTINGS, seed=5), *inputs)
    assert [len(batch) for batch in seen] == [16] * 18
    train = context.activations(inputs[1], "train").activations
    scaled = train / train.square().mean().sqrt()
    rows, orders = torch.cat(seen), []
    for number in range(4):  # 288 rows: four passes, and eight rows of a fifth
        generator = torch.Generator().manual_seed(5 * 100_003 + number)
        orders.append(torch.randperm(ROWS, generator=generator))
        torch.testing.assert_close(rows[number * ROWS : (number + 1) * ROWS], scaled[orders[-1]])
    assert not torch.equal(orders[0], orders[1])


def test_a_member_that_diverges_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    good = [replace(SETTINGS, seed=seed) for seed in (0, 1)]
    bad = replace(SETTINGS, sparsity=3e38)
    context, *inputs = context_and_inputs(tmp_path / "together")
    with pytest.raises(UserError, match=r"1 of 3 SAEs diverged: .*sae\.sparsity=3e\+38"):
        train_saes(context, [good[0], bad, good[1]], *inputs)
    found = train_saes(replace(context, store=context.store.only_found()), good, *inputs)
    assert_same(found, alone(tmp_path / "alone", good))
    with pytest.raises(NotMade):
        train_saes(replace(context, store=context.store.only_found()), [bad], *inputs)
    assert not [path for path in (tmp_path / "together" / "unfinished").iterdir() if path.is_dir()]


class Killed(BaseException):
    """Stands for a kill."""


class Die(pl.Callback):
    """Dies when the epoch begins."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.begun: list[int] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise Killed
        self.begun.append(trainer.current_epoch)


def test_a_killed_ensemble_goes_on_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    settings = [
        replace(SETTINGS, variant="relu_l1", sparsity=sparsity, seed=s) for s in (0, 1) for sparsity in (0.1, 1)
    ]
    context, *inputs = context_and_inputs(tmp_path / "killed")

    def with_(callback: pl.Callback) -> StageContext:
        return replace(context, trainer=lambda stage, epochs, rest: trainer(stage, epochs, [*rest, callback]))

    with pytest.raises(Killed):
        train_saes(with_(Die(2)), settings, *inputs)
    assert not list((tmp_path / "killed").glob("sae/*"))
    watch = Die(-1)
    found = train_saes(with_(watch), list(reversed(settings)), *inputs)
    assert watch.begun == [2, 3]
    calm = together(tmp_path / "calm", settings)
    assert [artifact.digest for artifact in reversed(found)] == [artifact.digest for artifact in calm]
    assert list(calm[0].table("history.csv")["step"]) == [4, 9, 13, 18]


def test_what_a_killed_training_left_is_of_use_in_a_group_that_has_only_it_to_make(tmp_path: Path) -> None:
    a, b = (replace(SETTINGS, seed=seed) for seed in (0, 1))
    context, *inputs = context_and_inputs(tmp_path / "killed")
    dying = replace(context, trainer=lambda stage, epochs, rest: trainer(stage, epochs, [*rest, Die(2)]))
    with pytest.raises(Killed):
        train_sae(dying, a, *inputs)
    train_sae(context, b, *inputs)
    found = train_saes(context, [b, a, a], *inputs)
    assert [artifact.digest for artifact in found[:2]] == [one.digest for one in alone(tmp_path / "calm", [b, a])]
    assert found[2] == found[1]


def test_only_what_is_missing_is_trained(tmp_path: Path, fits: list[type]) -> None:
    a, b, c, d = (replace(SETTINGS, seed=seed, steps=9) for seed in range(4))
    context, *inputs = context_and_inputs(tmp_path)
    [before] = train_saes(context, [a], *inputs)
    # One that is alone takes the way of one alone, and has its bits.
    assert fits == [SparseAutoencoder]
    assert before.digest == alone(tmp_path / "alone", [a])[0].digest
    fits.clear()
    found = train_saes(context, [b, a, c], *inputs)
    assert fits == [SAEEnsemble]
    assert [artifact.reused for artifact in found] == [False, True, False]
    assert found[1].digest == before.digest
    train_saes(context, [c, d, a], *inputs)
    assert fits == [SAEEnsemble, SparseAutoencoder]
    again = train_saes(context, [a, b, c, d, a], *inputs)
    assert len(fits) == 2
    assert all(artifact.reused for artifact in again)
    # The same SAE asked for twice is one member.
    twice = train_saes(context, [replace(a, seed=7), replace(a, seed=8), replace(a, seed=7)], *inputs)
    assert twice[0].path == twice[2].path != twice[1].path


@pytest.mark.parametrize(
    ("change", "fits_together"),
    [
        ({"sparsity": 2.0, "dictionary_size": 3, "seed": 4, "k": 1, "ensemble": 1}, True),
        *(
            ({name: value}, False)
            for name, value in {"variant": "relu_l1", "centre": True, "epochs": 5, "steps": 19}.items()
        ),
        *(({name: value}, False) for name, value in {"learning_rate": 0.1, "batch_size": 8, "warmup": 0.2}.items()),
        *(({name: value}, False) for name, value in {"learn_b_dec": True, "start": "data", "resample": 2}.items()),
        ({"decoder": "random"}, False),
    ],
)
def test_what_may_differ(change: dict[str, Any], fits_together: bool, tmp_path: Path) -> None:
    other = replace(SETTINGS, **change)
    assert can_share(SETTINGS, other) == can_share(other, SETTINGS) == fits_together
    if not fits_together:
        with pytest.raises(UserError, match=f"sae.{next(iter(change))}: .* and "):
            together(tmp_path, [SETTINGS, other])
        assert not (tmp_path / "sae").exists()


def test_who_is_resampled_is_trained_alone(tmp_path: Path, fits: list[type]) -> None:
    one = replace(SETTINGS, variant="relu_l1", resample=2)
    assert not can_share(one, replace(one, seed=1))
    with pytest.raises(UserError, match=r"sae\.resample=0"):
        together(tmp_path, [one, replace(one, seed=1)])
    alone(tmp_path, [one])
    assert fits == [SparseAutoencoder]


def test_the_key_of_an_sae_names_all_that_it_depends_on(tmp_path: Path) -> None:
    used = replace(SETTINGS, variant="relu_l1", start="data", resample=2)
    for settings, artifact in zip((SETTINGS, used), alone(tmp_path, [SETTINGS, used]), strict=True):
        key = artifact.record("key.json")
        assert key["settings"] == settings.scientific()
        assert (key["seed"], key["shuffled_within"]) == (settings.seed, None)
        assert artifact.record("sae.json").items() >= settings.scientific().items()


def test_epochs_take_the_place_of_steps(tmp_path: Path) -> None:
    [passes] = alone(tmp_path, [replace(SETTINGS, epochs=2)])
    settings = passes.record("key.json")["settings"]
    assert settings["epochs"] == 2
    assert "steps" not in settings
    record = passes.record("sae.json")
    assert (record["epochs"], record["steps"]) == (2, 9)  # 140 rows, 16 at a time
    assert record["passes"] == pytest.approx(9 * 16 / ROWS)
    [steps] = alone(tmp_path, [replace(SETTINGS, steps=9)])
    assert steps.path.joinpath("sae.safetensors").read_bytes() == passes.path.joinpath("sae.safetensors").read_bytes()
    # A key that named steps nobody took would make the same SAE twice.
    assert alone(tmp_path, [replace(SETTINGS, epochs=2, steps=7)])[0].reused


def test_activations_that_are_not_finite_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SmallContext.activations

    def broken(self: SmallContext, activations: Artifact, split: str) -> Captured:
        captured = plain(self, activations, split)
        captured.activations[3, 2] = torch.nan
        return captured

    monkeypatch.setattr(SmallContext, "activations", broken)
    with pytest.raises(UserError, match="activations at last are NaN or infinite"):
        alone(tmp_path, [SETTINGS])


def test_a_killed_ensemble_with_thresholds_and_dead_latents_ends_with_the_same_bits(tmp_path: Path) -> None:
    base = replace(SETTINGS, variant="batch_topk", k=2, sparsity=0.0, auxk=3, dictionary_size=24)
    settings = [replace(base, seed=seed) for seed in (0, 1)]
    for train, name in (
        (train_saes, "together"),
        (lambda context, one, *rest: train_sae(context, one[0], *rest), "alone"),
    ):
        context, *inputs = context_and_inputs(tmp_path / name)
        dying = replace(context, trainer=lambda stage, epochs, rest: trainer(stage, epochs, [*rest, Die(2)]))
        with pytest.raises(Killed):
            train(dying, settings, *inputs)
        found = train(context, settings, *inputs)
        calm, *inputs = context_and_inputs(tmp_path / f"{name} calm")
        expected = train(calm, settings, *inputs)
        digests = [[one.digest for one in (made if isinstance(made, list) else [made])] for made in (found, expected)]
        assert digests[0] == digests[1]


def test_several_devices_are_refused(tmp_path: Path) -> None:
    context, *inputs = context_and_inputs(tmp_path)
    with pytest.raises(UserError, match="one device"):
        train_saes(replace(context, ranks=Alone(several=True)), [SETTINGS, replace(SETTINGS, seed=1)], *inputs)


# The choice of batch_topk depends on all rows; tests/unit/test_sae_ranks.py has real ranks.
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant not in ("batch_topk", "matryoshka")])
@pytest.mark.parametrize("rows", [8, 7, 1])
def test_ranks_with_their_shares_give_the_gradient_of_the_whole_batch(
    variant: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks, of which some have a row more than others, or none at all."""
    sae = make_sae(variant, 6, 9, torch.Generator().manual_seed(0), **({"k": 3} if variant == "topk" else {}))
    module = SparseAutoencoder(sae, 0.3, 0.01, head=lambda a: a)
    trained = [parameter for parameter in sae.parameters() if parameter.requires_grad]
    gradients: list[tuple[Tensor, ...]] = []
    for name in ("optimizers", "lr_schedulers"):
        monkeypatch.setattr(module, name, MagicMock())
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "manual_backward", lambda loss: gradients.append(torch.autograd.grad(loss, trained)))
    batch = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
    module.training_step([batch], 0)
    monkeypatch.setattr(sae_module, "batch_share", lambda local: 4 * local / rows)
    for rank in range(4):
        module.training_step([batch[rank::4]], 0)
    expected, *parts = gradients
    for whole, *shares in zip(expected, *parts, strict=True):
        torch.testing.assert_close(sum(shares) / 4, whole)
    if rows == 1:
        assert not any(gradient.any() for gradient in parts[3])
