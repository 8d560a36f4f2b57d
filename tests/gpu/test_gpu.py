"""On a CUDA GPU: every stage and what they are made of agree with the CPU, or with plain torch.

``SALVE_GPU_TESTS_ON=cpu`` runs the same tests on the CPU, with gloo in the place of NCCL. They need PyTorch, Lightning,
torchmetrics, timm and Hydra; without beartype the shapes of tensors are not checked (tests/conftest.py).
"""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.strategies import DDPStrategy
from safetensors.torch import load_file
from torch import Tensor, distributed

from salve.activations import ActivationsData, Schedule, WholeData, load_captured
from salve.artifacts import Artifact, Store
from salve.backbones import find_site
from salve.backbones.tail import LinearTail
from salve.data import ConceptsData, Preprocess
from salve.diagnosis import critical_strength
from salve.distributed import rank_and_world_size
from salve.editing import edited_logits
from salve.metrics import fraction_of_variance_explained
from salve.processes.followers import Followers
from salve.processes.ranks import Ranks
from salve.sae import SAE, VARIANTS, Member, SAEEnsemble, SparseAutoencoder, make_sae
from salve.saliency import grad_fam, maximise
from salve.stages.training import quiet_lightning
from tests.gpu.conftest import CHANNELS, DEVICE, NEEDS_IT, ON, Run
from tests.unit.sae_examples import SMALL as SMALL_SAES
from tests.unit.test_capture import Noise, captured, cut_at_last, no_progress

BACKEND = "nccl" if ON == "cuda" else "gloo"
pytestmark = NEEDS_IT

WIDTH, CLASSES, ROWS, BATCH, EPOCHS = 16, 4, 512, 32, 12


def classifier() -> Any:
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=CLASSES, channels=CHANNELS, output_stride=8).eval()


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted() -> Tensor:
    """Rows ``[N, M]`` in which two of twelve directions are added, in units where ``mean ‖a‖² = M``."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.zeros(ROWS, 12).scatter_(1, torch.rand(ROWS, 12, generator=generator).topk(2, dim=1).indices, 1.0)
    rows = codes @ torch.randn(12, WIDTH, generator=generator) + 0.05 * torch.randn(ROWS, WIDTH, generator=generator)
    return rows / rows.square().mean().sqrt()


def head() -> torch.nn.Linear:
    torch.manual_seed(1)
    return torch.nn.Linear(WIDTH, CLASSES).requires_grad_(False)


def sae_of(variant: str) -> SAE:
    return make_sae(variant, WIDTH, 24, torch.Generator().manual_seed(0), **SMALL_SAES.get(variant, {}))


def trainer(device: str = ON, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        accelerator=device, devices=1, max_epochs=EPOCHS, enable_checkpointing=False, **{**quiet, **options}
    )


def schedule() -> Schedule:
    return Schedule.of_epochs(ROWS, BATCH, EPOCHS)


def train(sae: SAE, sparsity: float, device: str = ON, precision: Any = "float32", **options: Any) -> SAE:
    """Train one SAE on the planted rows; it comes back on the CPU."""
    rows = planted()
    data = ActivationsData(rows, rows[:64], torch.zeros(64, dtype=torch.long), schedule(), 3)
    module = SparseAutoencoder(sae, sparsity, 1e-2, head(), precision=precision)
    torch.manual_seed(0)
    with quiet_lightning():
        trainer(device, **options).fit(module, datamodule=data)
    return sae.cpu().eval()


@cache
def plainly_trained(variant: str, sparsity: float) -> SAE:
    """On the device, in float32, alone; read only."""
    return train(sae_of(variant), sparsity)


@torch.no_grad()
def fve(sae: SAE) -> float:
    return float(fraction_of_variance_explained(planted(), sae(planted())[0]))


# -- every stage


@pytest.fixture(scope="module")
def whole_run(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return run(tmp_path_factory.mktemp("whole"))


def test_every_stage_runs(whole_run: dict[str, Artifact]) -> None:
    assert list(whole_run) == [
        "classifier",
        "activations",
        "sae",
        "features",
        "atlas",
        "validate",
        "control",
        "diagnose",
    ]


def test_the_exported_network_is_what_was_measured(whole_run: dict[str, Artifact]) -> None:
    """Plain timm on the CPU captures the same activations, and is right as often."""
    model: Any = timm.create_model("resnet10t", num_classes=10, channels=list(CHANNELS), output_stride=8).eval()
    model.load_state_dict(load_file(whole_run["classifier"].file("model.safetensors")), strict=True)
    data = ConceptsData(20, image_size=32, train_per_class=8, select_per_class=4, test_per_class=4)
    data.bind(Preprocess(32, None))
    images, labels = (torch.cat(parts) for parts in zip(*data.loader("test"), strict=True))
    stored = load_captured(whole_run["activations"].path, "test")
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(model.fc(stored.activations), logits, rtol=2e-2, atol=2e-2)
    right = (logits.argmax(1) == labels).double()
    expected = [float(right[labels == k].mean()) for k in range(10)]
    found = whole_run["features"].table("classes.csv")["test_accuracy"]
    assert found.tolist() == pytest.approx(expected, abs=0.251)  # one of the four images of a class


def test_edits_of_the_network_do_what_the_cached_activations_say(whole_run: dict[str, Artifact]) -> None:
    table = whole_run["control"].table("evaluation.csv")
    assert len(table) == 10
    assert table["accuracy_edited"].tolist() == pytest.approx(table["accuracy_cached"].tolist(), abs=0.051)


def test_the_same_run_again_finds_everything(
    whole_run: dict[str, Artifact], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: pytest.fail("something was trained again"))
    again = run(whole_run["sae"].path.parents[3])
    assert all(again[kind].reused and again[kind].digest == one.digest for kind, one in whole_run.items())


def test_bf16_fine_tunes_to_what_float32_does(run: Run, tmp_path: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        (tmp_path / precision).mkdir()
        done = run(tmp_path / precision, "stages=[finetune]", f"trainer.precision={precision}")
        history = done["classifier"].table("history.csv")
        losses[precision] = history[history["split"] == "train"]["loss"].tolist()
        state = load_file(done["classifier"].file("model.safetensors"))
        assert {tensor.dtype for tensor in state.values() if tensor.is_floating_point()} == {torch.float32}
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
    assert losses["bf16-mixed"] != losses["32-true"]


# -- capture


def test_captured_activations_are_the_networks(tmp_path: Path) -> None:
    model, data = classifier(), Noise()
    on_cpu = copy.deepcopy(model)
    artifact = captured(Store(tmp_path), cut_at_last(model.to(DEVICE)), data, Ranks(DEVICE.type), no_progress)
    for split in ("train", "select", "test"):
        images, labels = (torch.cat(parts) for parts in zip(*data.loader(split), strict=True))
        stored = load_captured(artifact.path, split)
        assert torch.equal(stored.labels, labels)
        assert stored.activations.device.type == "cpu"
        with torch.no_grad():
            torch.testing.assert_close(on_cpu.fc(stored.activations), on_cpu(images), rtol=1e-3, atol=1e-4)


# -- SAEs


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_sae_trains_to_what_it_does_on_the_cpu(variant: str) -> None:
    expected = fve(train(sae_of(variant), 0.1, "cpu"))
    assert expected > 0.5
    assert fve(plainly_trained(variant, 0.1)) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_trains_to_what_float32_does(variant: str) -> None:
    exact, mixed = plainly_trained(variant, 0.1), train(sae_of(variant), 0.1, precision="bf16")
    assert {tensor.dtype for tensor in mixed.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert not torch.allclose(mixed.decoder, exact.decoder, atol=1e-6)
    assert fve(mixed) > fve(exact) - 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_members_of_an_ensemble_are_what_they_are_alone(variant: str) -> None:
    sparsities = (0.1, 0.4)
    rows, plan = planted(), schedule()
    ensemble = SAEEnsemble([Member(sae_of(variant), sparsity, 3) for sparsity in sparsities], plan, 1e-2, head())
    data = WholeData(rows, rows[:64], torch.zeros(64, dtype=torch.long), plan)
    torch.manual_seed(0)
    with quiet_lightning():
        trainer().fit(ensemble, datamodule=data)
    for number, sparsity in enumerate(sparsities):
        together = ensemble.trained(number)[0].cpu().eval()
        assert fve(together) == pytest.approx(fve(plainly_trained(variant, sparsity)), abs=0.02)


# -- ranks


def measured_together(rows: Tensor) -> tuple[int, int, str, Tensor]:
    """What one rank sees within a piece of work: its place, the backend, and a sum over all ranks."""
    total = rows.to(DEVICE).sum(dim=0)
    distributed.all_reduce(total)
    return (*rank_and_world_size(), distributed.get_backend(), total.cpu())


def test_a_piece_of_work_runs_in_a_process_group(tmp_path: Path) -> None:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    followers = Followers(store, 1)
    rows = planted()
    rank, size, backend, total = followers.lead(ON, 1, measured_together, (rows,))
    assert (rank, size, backend) == (0, 1, BACKEND)
    torch.testing.assert_close(total, rows.sum(dim=0), rtol=1e-4, atol=1e-3)


def test_ddp_of_one_rank_takes_the_steps_of_no_ddp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    alone = plainly_trained("linear_l1", 0.1)
    strategy = DDPStrategy(static_graph=True, process_group_backend=BACKEND)
    try:
        in_ddp = train(sae_of("linear_l1"), 0.1, strategy=strategy, use_distributed_sampler=False)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    torch.testing.assert_close(in_ddp.state_dict(), alone.state_dict(), rtol=1e-3, atol=1e-4)


# -- maps and strengths


def random_sae(width: int) -> SAE:
    sae = make_sae("relu_l1", width, 12, torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.bias.fill_(0.5)
    return sae.eval()


@pytest.mark.parametrize("site", ["last", "layer4"])
def test_grad_fam_is_the_cpus(site: str) -> None:
    model, images = classifier(), drawn(3, 3, 32, 32)
    layer = find_site(model, "last").name
    at = None if site == "last" else site
    sae = random_sae(CHANNELS[-1])
    expected = grad_fam(copy.deepcopy(model), layer, copy.deepcopy(sae), images, range(6), at=at)
    found = grad_fam(model.to(DEVICE), layer, sae.to(DEVICE), images.to(DEVICE), range(6), at=at)
    assert found.device.type == ON
    assert expected.max() > 0
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-5)


def test_maximised_images_excite_their_latents() -> None:
    model, sae = classifier().to(DEVICE), random_sae(CHANNELS[-1]).to(DEVICE)
    preprocess = Preprocess(size=32, resize=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    found = maximise(model, find_site(model, "last").name, sae, [0, 1], preprocess, size=32, steps=30)
    assert found.images.device.type == ON
    assert bool((found.final_values > found.start_values).all())


@pytest.mark.parametrize("criterion", ["logit", "flip"])
def test_critical_strengths_are_the_cpus_and_the_class_holds_up_to_them(criterion: Any) -> None:
    weight, bias, rows = drawn(CLASSES, WIDTH, seed=1), drawn(CLASSES, seed=2), drawn(200, WIDTH, seed=3).relu()
    contribution = drawn(WIDTH, seed=4)
    labels = (rows @ weight.T + bias).argmax(dim=1)
    given = (rows, contribution, labels)
    expected = critical_strength(LinearTail(weight, bias), *given, criterion)
    tail, (a, b, c) = LinearTail(weight.to(DEVICE), bias.to(DEVICE)), (tensor.to(DEVICE) for tensor in given)
    found = critical_strength(tail, a, b, c, criterion)
    assert found.device.type == ON
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-6)
    assert (expected.isfinite() & (expected > 0)).sum() > 20
    if criterion == "flip":
        # By the definition, image by image: the prediction stays up to 99 % of the strength and has left it at 101 %.
        for n in expected.isfinite().nonzero()[:20, 0].tolist():
            for share, holds in ((0.99, True), (1.01, False)):
                gates = (1 - share * expected[n] * contribution.abs()).clamp_min(0)
                assert bool((weight @ (rows[n] * gates) + bias).argmax() == labels[n]) == holds


@pytest.mark.parametrize("mode", ["suppress", "enhance"])
def test_edited_logits_are_the_cpus(mode: Any) -> None:
    alphas = torch.tensor([0.0, 0.5, 2.0, 10.0])
    given = drawn(CLASSES, WIDTH), drawn(CLASSES), drawn(50, WIDTH, seed=1).relu(), drawn(WIDTH, seed=2), alphas
    expected = edited_logits(LinearTail(*given[:2]), *given[2:], mode)
    weight, bias, rows, contribution, strengths = (tensor.to(DEVICE) for tensor in given)
    found = edited_logits(LinearTail(weight, bias), rows, contribution, strengths, mode)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
