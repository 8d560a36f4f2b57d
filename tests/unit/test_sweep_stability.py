"""Dictionaries of a sweep's seeds compared: which pairs, which latents, and what is said of them."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from salve.artifacts import DONE, _seal, write_record, write_table
from salve.integrity import sealed
from salve.metrics import random_stability, stability
from salve.sae import make_sae, save_sae
from salve.sweep.cli import main
from tests.unit.sae_examples import drawn
from tests.unit.test_sweep_summary import Sweep

WIDTH = 6


class Trained:
    """A sweep and, beside it, the artifacts of its runs."""

    def __init__(self, output: Path) -> None:
        self.artifacts, self.sweep = output / "artifacts", Sweep(output / "sweeps" / "seeds")

    def run(self, decoder: Tensor, dead: tuple[int, ...] = (), on: str = "same", key: str = "", **swept: Any) -> str:
        """A finished run whose SAE has these columns, of which some never fire."""
        run = self.sweep.finish({"fve": 0.5}, **swept)
        key = key or run
        for kind in ("sae", "features"):
            (self.artifacts / kind / key).mkdir(parents=True, exist_ok=True)
        sae = make_sae(swept.get("sae__variant", "linear_l1"), *decoder.shape)
        sae.decoder.data.copy_(decoder)
        save_sae(self.artifacts / "sae" / key / "sae.safetensors", sae)
        frequency = [0.0 if latent in dead else 0.3 for latent in range(decoder.shape[1])]
        write_table(self.artifacts / "features" / key / "latents.csv", pd.DataFrame({"frequency": frequency}))
        for kind in ("sae", "features"):
            (self.artifacts / kind / key / DONE).unlink(missing_ok=True)
            _seal(self.artifacts / kind / key, {})
        made = {"activations": {"key": on, "digest": on, "path": f"../../../artifacts/activations/{on}"}}
        made |= {kind: {"key": key, "path": f"../../../artifacts/{kind}/{key}"} for kind in ("sae", "features")}
        write_record(self.sweep.folder / run / "manifest.json", sealed({"artifacts": made, "files": {}}))
        return run

    def compare(self, *more: str) -> pd.DataFrame:
        assert main([str(self.sweep.folder), "--stability", *more]) == 0
        return pd.read_csv(self.sweep.folder / "stability.csv", dtype={"run_a": str, "run_b": str})


def columns(seed: int, size: int = 5) -> Tensor:
    return torch.nn.functional.normalize(drawn(WIDTH, size, seed=seed, dtype=torch.float32), dim=0)


def test_pairs_are_runs_that_differ_in_the_seed_of_the_sae_alone(tmp_path: Path) -> None:
    trained = Trained(tmp_path)
    small = [trained.run(columns(s), sae__sparsity=1.0, sae__seed=s) for s in range(3)]
    large = [trained.run(columns(10 + s), sae__sparsity=5.0, sae__seed=s) for s in range(2)]
    trained.run(columns(20), sae__sparsity=5.0, sae__seed=0, on="another classifier", seed=1)
    again = trained.run(columns(0), key=small[0], sae__sparsity=1.0, sae__seed=0, seed=2)  # the same SAE once more
    trained.sweep.plan(sae__sparsity=9.0, sae__seed=0)
    found = trained.compare()
    pairs = {frozenset(pair) for pair in zip(found["run_a"], found["run_b"], strict=True)}
    # The repeated SAE is compared with those of the other seeds, never with itself.
    expected = [small[:2], small[1:3], small[::2], large, [again, small[1]], [again, small[2]]]
    assert pairs == {frozenset(pair) for pair in expected}
    assert len(found) == len(pairs)
    assert sorted(found["sae.sparsity"]) == [1.0] * 5 + [5.0]
    own = found[(found["run_a"] == large[0]) & (found["run_b"] == large[1])].iloc[0]
    measured = stability(columns(10), columns(11), signed=True)
    chance = random_stability(WIDTH, 5, 5, signed=True)
    for name in ("matched_cosine", "shared_fraction"):
        assert own[name] == pytest.approx(float(measured[name]), rel=1e-6)
        assert own[f"random_{name}"] == pytest.approx(float(chance[name]), rel=1e-6)


@pytest.mark.parametrize(("variant", "cosine", "flipped"), [("linear_l1", 1.0, 2 / 3), ("relu_l1", None, 0.0)])
def test_dead_latents_do_not_count_and_signs_do_only_where_latents_have_them(
    tmp_path: Path, variant: str, cosine: float | None, flipped: float
) -> None:
    trained, first = Trained(tmp_path), columns(0)
    second = columns(1)
    second[:, [4, 2, 0]] = first[:, :3] * torch.tensor([1.0, -1.0, -1.0])
    for seed, (decoder, dead) in enumerate([(first, (3, 4)), (second, (1, 3))]):
        trained.run(decoder, dead, sae__variant=variant, sae__seed=seed)
    [row] = trained.compare().to_dict("records")
    assert (row["latents_a"], row["latents_b"]) == (3, 3)
    assert row["flipped_fraction"] == pytest.approx(flipped)
    if cosine is None:
        assert row["matched_cosine"] < 0.9
    else:
        assert row["matched_cosine"] == pytest.approx(cosine)
        assert row["shared_fraction"] == 1.0


def test_the_terminal_shows_means_beside_chance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = Trained(tmp_path)
    for seed in range(3):
        trained.run(columns(0), sae__seed=seed)
        trained.run(columns(seed), dead=tuple(range(5)), sae__sparsity=2.0, sae__seed=seed)  # nothing fires
    trained.compare()
    shown = capsys.readouterr().out
    [same, dead] = [line.split() for line in shown.splitlines() if line.strip().startswith(("2 ", "5 "))][-2:]
    chance = float(random_stability(WIDTH, 5, 5, signed=True)["matched_cosine"])
    assert sorted([same[:4], dead[:4]]) == [["2", "3", "0", "–"], ["5", "3", "5", "1"]]
    assert f"({chance:.3g})" in shown
    assert "stability.csv" in shown


def test_what_cannot_be_compared_is_said_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = Trained(tmp_path)
    trained.run(columns(0), on="one", seed=0)
    trained.run(columns(1), on="other", seed=1)
    command = [str(trained.sweep.folder), "--stability"]
    assert main(command) == 2
    assert "no two finished runs that differ in sae.seed alone" in capsys.readouterr().err
    assert main([*command, "--artifacts", str(tmp_path / "elsewhere")]) == 2
    error = capsys.readouterr().err
    assert "elsewhere" in error
    assert "--artifacts <output_dir>/artifacts" in error
    assert not (trained.sweep.folder / "stability.csv").exists()


def test_a_sweep_that_was_moved_finds_its_saes_where_it_is_told(tmp_path: Path) -> None:
    trained = Trained(tmp_path / "here")
    for seed in range(2):
        trained.run(columns(seed), sae__seed=seed)
    before = trained.compare()
    trained.sweep.folder = trained.sweep.folder.rename(tmp_path / "moved")
    pd.testing.assert_frame_equal(trained.compare("--artifacts", str(trained.artifacts)), before)
