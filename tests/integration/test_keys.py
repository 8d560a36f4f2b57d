"""Which artifacts a setting makes others of: every setting changes a key, or stands here with the reason why not."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers.logger import DummyLogger
from rich.console import Console

from salve.artifacts import Artifact, Store
from salve.processes.ranks import Ranks
from salve.run.build import build_context
from salve.run.execute import _run_stages
from salve.run.schema import Config
from salve.stages.tcav import LEAST
from salve.sweep.plan import is_computed
from tests.composing import settings
from tests.integration.conftest import FEW, NARROW, SMALL

#: Another value of each setting, and the first artifact whose key it changes; those made from it change as well.
CHANGES: dict[str, tuple[str, str]] = {
    "seed": ("1", "classifier"),
    "data.batch_size": ("10", "classifier"),
    "data.seed": ("1", "classifier"),
    "data.image_size": ("48", "classifier"),
    "data.train_per_class": ("9", "classifier"),
    "data.select_per_class": ("5", "classifier"),
    "data.test_per_class": ("5", "classifier"),
    "data.spurious_correlation": ("0.25", "classifier"),
    "data.clutter": ("0.25", "classifier"),
    "data.defining_rate": ("0.5", "classifier"),
    "data.min_crop_scale": ("1.0", "classifier"),
    "backbone.name": ("resnet14t", "classifier"),
    "backbone.weights": ("WEIGHTS", "classifier"),
    "backbone.args.channels": ("[8,16,24,40]", "classifier"),
    "backbone.args.output_stride": ("16", "classifier"),
    "backbone.preprocess.size": ("48", "classifier"),
    "backbone.preprocess.resize": ("48", "classifier"),
    "backbone.preprocess.interpolation": ("bilinear", "classifier"),
    "backbone.preprocess.mean": ("[0,0,0]", "classifier"),
    "backbone.preprocess.std": ("[1,1,1]", "classifier"),
    "finetune.mode": ("probe", "classifier"),
    "finetune.epochs": ("3", "classifier"),
    "finetune.learning_rate": ("0.0002", "classifier"),
    "finetune.weight_decay": ("0.2", "classifier"),
    "finetune.label_smoothing": ("0.2", "classifier"),
    "finetune.warmup": ("0.2", "classifier"),
    "finetune.patience": ("7", "classifier"),
    "finetune.without": ("[storm]", "classifier"),
    "trainer.precision": ("bf16-true", "classifier"),
    "trainer.memory": ("1e-6", "sae"),
    "trainer.accumulate_grad_batches": ("2", "classifier"),
    "trainer.gradient_clip_val": ("1", "classifier"),
    "trainer.gradient_clip_algorithm": ("value", "classifier"),
    "trainer.limit_train_batches": ("0.5", "classifier"),
    "trainer.min_epochs": ("1", "classifier"),
    "trainer.min_steps": ("1", "classifier"),
    "trainer.deterministic": ("true", "classifier"),
    "trainer.benchmark": ("true", "classifier"),
    "trainer.inference_mode": ("false", "classifier"),
    "trainer.detect_anomaly": ("true", "classifier"),
    "trainer.profiler": ("simple", "classifier"),
    "trainer.log_every_n_steps": ("7", "classifier"),
    "trainer.enable_model_summary": ("true", "classifier"),
    "callbacks.x._target_": ("pytorch_lightning.callbacks.Callback", "classifier"),
    "sae.variant": ("relu_l1", "sae"),
    "sae.dictionary_size": ("25", "sae"),
    "sae.sparsity": ("4", "sae"),
    "sae.k": ("3", "sae"),
    "sae.centre": ("true", "sae"),
    "sae.learning_rate": ("0.002", "sae"),
    "sae.batch_size": ("16", "sae"),
    "sae.epochs": ("4", "sae"),
    "sae.warmup": ("0.1", "sae"),
    "sae.decay": ("0.1", "sae"),
    "sae.seed": ("1", "sae"),
    "sae.learn_b_dec": ("true", "sae"),
    "sae.start": ("data", "sae"),
    "sae.decoder": ("random", "sae"),
    "sae.resample": ("1", "sae"),
    "sae.precision": ("bf16", "sae"),
    "discover.threshold": ("0.4", "features"),
    "discover.select": ("largest", "features"),
    "discover.dominant": ("2", "features"),
    "validate.pictures": ("3", "validate"),
    "validate.top_images": ("3", "validate"),
    "validate.localise_images": ("3", "validate"),
    "validate.pointing_tolerance": ("3", "validate"),
    "validate.random_latents": ("3", "validate"),
    "validate.faithfulness_steps": ("3", "validate"),
    "validate.maximisation_steps": ("3", "validate"),
    "validate.concepts": ("{reddish: CONCEPT}", "validate"),
    "edit.alpha": ("[0,2]", "control"),
    "edit.modes": ("[suppress]", "control"),
    "edit.scale": ("max", "control"),
    "edit.channels": ("aligned", "control"),
    "edit.sets": ("[[storm,3]]", "control"),
    "edit.evaluate": ("0", "control"),
    "edit.by_class": ("true", "control"),
}

#: Stages that make an artifact and all that a run has before it.
UP_TO = {
    "classifier": ["finetune"],
    "sae": ["discover"],
    "features": ["discover"],
    "validate": ["validate"],
    "control": ["validate", "control"],
}

#: Settings that a run's key depends on and no artifact's, or that this backbone, data and SAE do not have.
NOT_IN_ANY: dict[str, str] = {
    "stages": "which artifacts there are, not what is in them",
    "capture.positions": "this backbone's site is a vector",
    "layer": "this backbone has one site only; activations of another have its name in their key",
    "data._target_": "another class has other settings",
    "data.shortcut": "it changes no image of a split",
    "evaluate": "of evaluations; test_evaluation.py",
    **{
        f"mark.{name}": "there is no mark; that of images is in their fingerprint, test_data_marks.py"
        for name in (
            *("kind", "rates", "rate", "held_out_rates", "held_out_rate", "seed"),
            *("size", "place", "colour", "strength", "text"),
        )
    },
    "backbone.library": "torchvision has no model of this name",
    "backbone._target_": "another network has other arguments; the classifier's key has its name and its code",
    "backbone.preprocess.squash": "it is what this backbone does already",
    "edit.images": "at the last site, all images are measured; at others, test_stage_diagnose.py",
    "edit.resolution": "at the last site, all strengths are measured",
    "edit.method": "other methods only suppress; test_compare.py",
    "edit.args": "of other methods than the gate; test_compare.py",
    **{
        f"compare.{name}": "stage compare is not in this run; test_compare.py"
        for name in (
            "methods",
            "images",
            "targets",
            "relearn",
            "on_select",
            "retrained",
            "variants.random_gate.method",
            "variants.random_gate.direction",
            "variants.random_latent.method",
            "variants.random_latent.direction",
            "variants.random_decoder.method",
            "variants.random_decoder.sae.decoder",
            "variants.random_decoder.sae.start",
        )
    },
    **{
        f"audit.{name}": "stage audit is not in this run; test_repair.py"
        for name in ("labels", "suspects", "top_images")
    },
    **{
        f"repair.{name}": "stage repair is not in this run; test_repair.py"
        for name in ("suspects", "methods", "sizes", "strengths", "max_accuracy_loss", "images", "rivals")
    },
    "measures": "numbers of a run, and no artifact; test_own_measures.py",
    "sae.args": "of a variant of one's own; test_extension.py",
    "sae.pool": "the latents of a vector are those of the image",
    "sae.steps": "sae.epochs, which is set here, takes their place",
    "sae.bandwidth": "of jumprelu",
    "sae.prefixes": "of matryoshka",
    "sae.base": "of matryoshka",
    "sae.auxk": "of variants with TopK",
}


class Keys(Store):
    """A store in which everything is found: contents are those of a real run, digests follow the keys."""

    def __init__(self, contents: Mapping[str, Artifact]) -> None:
        super().__init__(Path())
        self._contents = contents

    def get_or_make_many(
        self, kind: str, keys_settings: Sequence[Mapping[str, Any]], make: Callable[..., None]
    ) -> list[Artifact | None]:
        keys = [self._key(key_settings) for key_settings in keys_settings]
        return [Artifact(kind, key, self._contents[kind].path, key, reused=True) for key in keys]


def composed(*overrides: str) -> Config:
    """Small settings with other values."""
    return settings(*SMALL, *FEW, *NARROW, *overrides)


def keys(whole_run: tuple[Path, dict[str, Artifact]], config: Config) -> dict[str, str]:
    context = build_context(config, Keys(whole_run[1]), lambda _: DummyLogger(), Console(quiet=True), Ranks("cpu"))
    return {kind: artifact.key for kind, artifact in _run_stages(config, context).items()}


def leaves(settings: Mapping[str, Any], above: str = "") -> list[str]:
    found = []
    for name, value in settings.items():
        inside = isinstance(value, dict) and value
        found += leaves(value, f"{above}{name}.") if inside else [f"{above}{name}"]
    return found


def test_every_setting_is_known_to_change_an_artifact_or_not() -> None:
    known = CHANGES.keys() | NOT_IN_ANY.keys()
    some = composed("callbacks.x._target_=pytorch_lightning.callbacks.Callback")
    missing = [path for path in leaves(asdict(some)) if path not in known and is_computed(path)]
    assert missing == [], "a new setting: say here which artifact it changes, or why none"
    assert not CHANGES.keys() & NOT_IN_ANY.keys()


def test_a_setting_changes_the_key_of_the_artifact_that_depends_on_it(
    whole_run: tuple[Path, dict[str, Artifact]], tmp_path: Path
) -> None:
    for i in range(LEAST):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    before = keys(whole_run, composed())
    assert list(before) == list(whole_run[1])
    wrong = []
    for path, (value, kind) in CHANGES.items():
        value = value.replace("WEIGHTS", str(whole_run[1]["classifier"].file("model.safetensors")))
        value = value.replace("CONCEPT", str(tmp_path))
        plus = "+" if path == "backbone.args.output_stride" and path not in leaves(asdict(composed())) else ""
        # The real run's classifier is no other network's, so that nothing can be read from it for another.
        after = keys(whole_run, composed(f"{plus}{path}={value}", f"stages=[{','.join(UP_TO[kind])}]"))
        first = next((one for one in after if after[one] != before[one]), None)
        if first != kind:
            wrong.append(f"{path}={value}: {first}, not {kind}")
    assert wrong == []


@pytest.mark.parametrize(("able", "effective"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_precision_that_auto_stands_for_is_what_the_classifiers_key_holds(
    whole_run: tuple[Path, dict[str, Artifact]], monkeypatch: pytest.MonkeyPatch, able: bool, effective: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    found = {
        precision: keys(whole_run, composed(f"trainer.precision={precision}", "stages=[finetune]"))["classifier"]
        for precision in ("auto", "32-true", "bf16-mixed", "16-mixed", "16-true", "bf16-true", "64-true")
    }
    assert found["auto"] == found[effective]
    assert found["16-mixed"] == found["bf16-mixed"]  # what Lightning takes for it on a CPU
    assert len(set(found.values())) == 5


def test_what_does_not_fit_into_memory_changes_a_probe_too(whole_run: tuple[Path, dict[str, Artifact]]) -> None:
    probe = ["finetune.mode=probe", "stages=[finetune]"]
    found = [keys(whole_run, composed(*probe, *more)) for more in ([], ["trainer.memory=1e-6"], ["trainer.memory=9"])]
    assert found[0] != found[1]
    assert found[0] == found[2]
