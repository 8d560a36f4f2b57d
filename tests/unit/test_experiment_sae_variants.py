"""The comparison of SAE variants: matching, intervals, tables and what is read from runs."""

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from scipy import interpolate, optimize, stats
from scipy.spatial import distance

from experiments.beyond.sae_variants import EXPERIMENT, LOOKS, analyse, comparison_figure, targets_of
from experiments.beyond.sae_variants.measures import (
    ORACLE,
    RANDOM,
    Target,
    alignment,
    at_target,
    class_directions,
    compared,
    edits_of,
    matched,
    reference_summary,
    references_of,
    runs_of,
    summary,
)
from experiments.compare import (
    LEVEL,
    Reader,
    accuracy_at,
    edit_at,
    matched_edit,
    random_directions,
    strength_to,
    t_interval,
)
from experiments.figures import save
from experiments.runs import SAERun, command
from experiments.testbeds import TESTBEDS, Setup
from salve.artifacts import _seal, save_tensors, write_record
from salve.backbones.tail import LinearTail
from salve.integrity import sealed
from salve.run.explain import conf_dir
from salve.run.schema import Config, register
from salve.sae import VARIANTS, make_sae, save_sae
from salve.sweep.plan import combinations, plan

# -- edits at a matched effect


def test_an_edit_is_measured_on_test_where_its_class_crosses_the_level_on_select() -> None:
    generator = np.random.default_rng(0)
    alphas = np.array([0.0, 1, 2, 4, 8, 16])
    mine = np.array([0.9, 0.8, 0.5, 0.12, 0.02, 0.0])
    select, test = (np.column_stack([generator.uniform(0.5, 1, 6), mine, generator.uniform(0.5, 1, 6)]) for _ in "ab")
    test[:, 1] = [0.88, 0.8, 0.6, 0.2, 0.07, 0.0]
    found = matched_edit(alphas, select, test, 1)
    choosing, reporting = (interpolate.interp1d(alphas, split, axis=0) for split in (select, test))
    at = optimize.brentq(lambda alpha: choosing(alpha)[1] - LEVEL, 0, 16)
    after = reporting(at)
    change = (after - test[0])[[0, 2]]
    assert found.reached
    assert found.alpha == pytest.approx(at)
    assert (found.before, found.after) == (0.88, pytest.approx(after[1]))
    assert found.after > 1.5 * LEVEL  # nobody has chosen this one
    assert found.drop == pytest.approx(0.88 - after[1])
    assert (found.drift, found.worst_loss) == pytest.approx((np.abs(change).mean(), max(0, *-change)))
    assert found.selectivity == pytest.approx(found.drop - found.drift)


def test_where_test_had_chosen_another_edit_would_be_reported() -> None:
    alphas = np.array([0.0, 1, 2, 3])
    select = np.array([[0.9, 0.9], [0.5, 0.9], [0.05, 0.7], [0.0, 0.2]])
    test = np.array([[0.9, 0.9], [0.05, 0.9], [0.04, 0.6], [0.0, 0.2]])
    found = matched_edit(alphas, select, test, 0)
    assert (found.alpha, found.after) == (2, pytest.approx(0.04))
    assert found.selectivity == pytest.approx((0.9 - 0.04) - 0.3)
    flattered = matched_edit(alphas, test, test, 0)
    assert (flattered.alpha, flattered.selectivity) == (1, pytest.approx(0.85))


def test_the_first_strength_counts_where_a_class_comes_back() -> None:
    accuracy = np.array([[0.9, 0.9], [0.05, 0.7], [0.8, 0.1], [0.0, 0.0]])
    alphas = np.array([0.0, 1, 2, 3])
    assert strength_to(alphas, accuracy[:, 0]) == 1
    assert edit_at(alphas, accuracy, 0, 1.0).drift == pytest.approx(0.2)


def test_a_strength_between_two_of_the_grid_is_on_the_line_between_them() -> None:
    accuracy = np.array([[1.0, 0.6, math.nan], [0.5, 0.8, math.nan]])
    found = accuracy_at(np.array([0.0, 4]), accuracy, 1.0)
    assert found[:2].tolist() == pytest.approx([0.875, 0.65])
    assert math.isnan(found[2])


def test_gains_and_losses_of_others_do_not_cancel_and_a_gain_is_no_loss() -> None:
    accuracy = np.array([[1.0, 0.5, 0.5], [0.05, 0.8, 0.4]])
    found = edit_at(np.array([0.0, 1]), accuracy, 0, 1.0)
    assert found.drift == pytest.approx(0.2)
    assert found.worst_loss == pytest.approx(0.1)
    assert edit_at(np.array([0.0, 1]), accuracy[:, :2], 0, 1.0).worst_loss == 0


def test_a_class_that_no_strength_brings_down_on_select_is_a_failure_worth_nothing() -> None:
    select, test = np.array([[0.9, 0.9], [0.06, 0.1]]), np.array([[0.9, 0.9], [0.0, 0.1]])
    found = matched_edit(np.array([0.0, 1]), select, test, 0)
    assert not found.reached
    assert (found.alpha, found.drop, found.selectivity) == (math.inf, 0, 0)
    assert math.isnan(found.drift)
    assert math.isnan(found.after)


@pytest.mark.parametrize("before", [math.nan, 0.05, 0.0])
def test_a_class_that_is_lost_or_empty_without_an_edit_says_nothing(before: float) -> None:
    lost, there = np.array([[before, 0.9], [before, 0.9]]), np.array([[0.9, 0.9], [0.0, 0.9]])
    assert math.isnan(strength_to(np.array([0.0, 1]), lost[:, 0]))
    for select, test in ((lost, there), (there, lost), (lost, lost)):
        found = matched_edit(np.array([0.0, 1]), select, test, 0)
        assert not found.reached
        assert math.isnan(found.selectivity)


def test_classes_without_images_are_no_others() -> None:
    accuracy = np.array([[1.0, 0.8, math.nan], [0.05, 0.6, math.nan]])
    assert edit_at(np.array([0.0, 1]), accuracy, 0, 1.0).drift == pytest.approx(0.2)
    assert edit_at(np.array([0.0, 1]), accuracy[:, [0, 2]], 0, 1.0).drift == 0


# -- intervals


def test_the_interval_is_students() -> None:
    values = np.random.default_rng(1).normal(3, 2, 7)
    low, high = stats.t.interval(0.9, 6, loc=values.mean(), scale=stats.sem(values))
    mean, half, count = t_interval([*values, math.nan], 0.9)
    assert (mean - half, mean + half, count) == pytest.approx((low, high, 7))


def test_one_value_has_no_interval() -> None:
    assert t_interval([2.0])[::2] == (2.0, 1)
    assert math.isnan(t_interval([2.0]).half)
    assert math.isnan(t_interval([]).mean)


# -- SAEs at a matched sparsity


def test_between_two_settings_a_value_is_interpolated() -> None:
    x = np.array([9.0, 3.0, 1.0, 27.0])  # in any order
    values = np.column_stack([np.arange(4.0), [1, math.nan, 3, 4]])
    order = np.argsort(x)
    expected = interpolate.interp1d(x[order], values[order], axis=0)(5.0)
    assert np.isnan(expected[1])  # a neighbour's value is not known
    np.testing.assert_allclose(at_target(x, values, 5.0), expected)
    np.testing.assert_allclose(at_target(x, values, 27.0), values[3])


def test_nothing_is_extrapolated() -> None:
    x, values = np.array([1.0, 2.0, math.nan]), np.ones((3, 2))
    assert np.isnan(at_target(x, values, 2.1)).all()
    assert np.isnan(at_target(x, values, 0.9)).all()
    assert np.isnan(at_target(x[:0], values[:0], 1.0)).all()


def table_of(selectivity: dict[str, Sequence[Sequence[float]]], **columns: Any) -> pd.DataFrame:
    """Runs of variants: ``selectivity[variant][knob][seed]``; L0 is 2, 4, 8, … by knob, for every seed. On test it is
    what it is on select, and a tenth more."""
    rows = [
        {
            **{"variant": variant, "knob": knob, "seed": seed, "selectivity": value, "select_selectivity": value},
            **{"select_l0": 2.0 ** (knob + 1), "l0": 2.2 ** (knob + 1), **columns},
        }
        for variant, knobs in selectivity.items()
        for knob, seeds in enumerate(knobs)
        for seed, value in enumerate(seeds)
    ]
    return pd.DataFrame(rows)


def test_at_a_target_every_seed_is_interpolated_by_itself() -> None:
    runs = table_of({"a": [[0.0, 1.0], [1.0, 3.0]], "b": [[0.5, 0.5], [0.7, 0.9]]})
    found = matched(runs, Target("l0", 3), ["selectivity", "l0"])  # halfway between 2 and 4
    assert found["selectivity"].tolist() == pytest.approx([0.5, 2.0, 0.6, 0.7])
    assert found["l0"].tolist() == pytest.approx([(2.2 + 2.2**2) / 2] * 4)  # as test has it


def test_no_seed_chooses_its_own_best_setting() -> None:
    # Seed 2 is best at knob 1 by luck; the others say knob 0.
    runs = table_of({"a": [[0.9, 0.9, 0.5], [0.6, 0.6, 1.0]]})
    found = matched(runs, Target("best"), ["selectivity"])
    # Without seed 2: 0.9 against 0.6. Without seed 0: 0.7 against 0.8, so that seed 0 is judged at knob 1.
    assert found["knob"].tolist() == [1, 1, 0]
    assert found["selectivity"].tolist() == [0.6, 0.6, 0.5]


def test_the_best_setting_is_the_one_that_select_says_is_best() -> None:
    runs = table_of({"a": [[0.9, 0.9, 0.9], [0.6, 0.6, 0.6]]})
    runs["select_selectivity"] = np.where(runs["knob"] == 1, 0.8, 0.7)
    found = matched(runs, Target("best"), ["selectivity"])
    assert found["knob"].tolist() == [1, 1, 1]
    assert found["selectivity"].tolist() == [0.6] * 3  # test would have chosen the other


def test_differences_are_paired_and_hold_together() -> None:
    generator = np.random.default_rng(2)
    values: Any = {name: generator.normal(i, 1, (2, 5)) for i, name in enumerate(("linear_l1", "a", "b"))}
    found = compared(table_of(values), Target("l0", 4), ["selectivity"], ["linear_l1"]).set_index("variant")
    for name in ("a", "b"):
        test = stats.ttest_rel(values[name][1], values["linear_l1"][1])
        low, high = test.confidence_interval(1 - 0.05 / 2)
        row = found.loc[name]
        assert row["difference"] - row["difference_half"] == pytest.approx(low)
        assert row["difference"] + row["difference_half"] == pytest.approx(high)
        assert row["selectivity"] == pytest.approx(values[name][1].mean())
    assert math.isnan(found.loc["linear_l1", "difference"])


def test_a_variant_that_cannot_reach_a_target_says_so() -> None:
    runs = table_of({"linear_l1": [[1, 1], [1, 1]], "a": [[0, 0], [0, 0]], "b": [[0, 0], [0, 0]]})
    runs.loc[(runs["variant"] == "a") & (runs["seed"] == 1), "select_l0"] *= 10  # from 20 to 40
    found = compared(runs, Target("l0", 4), ["selectivity"], ["linear_l1"]).set_index("variant")
    assert (found.loc["a", "seeds"], found.loc["a", "reason"]) == (1, "L0 20 to 4, 1 of 2 seeds")
    assert math.isnan(found.loc["a", "selectivity"])
    assert found.loc["b", "difference"] == -1
    # Where the first baseline is out of reach, the next takes its place.
    found = compared(runs, Target("l0", 4), ["selectivity"], ["a", "b"]).set_index("variant")
    assert set(found["baseline"]) == {"b"}
    assert found.loc["linear_l1", "difference"] == 1


# -- references


def test_a_class_direction_is_its_mean_evidence() -> None:
    weight, activations = torch.randn(3, 5, dtype=torch.float64), torch.rand(12, 5, dtype=torch.float64)
    labels = torch.arange(12) % 3
    found = class_directions(weight, activations, labels)
    for k in range(3):
        own = [weight[k] * activations[n] for n in range(12) if labels[n] == k]
        mean = torch.stack(own).mean(dim=0)
        torch.testing.assert_close(found[k], mean / mean.norm())


def test_alignment_does_not_see_signs() -> None:
    columns, directions = torch.randn(4, 6), torch.randn(4, 6)
    found = alignment(columns, directions)
    for k in range(4):
        a, b = columns[k].abs().numpy(), directions[k].abs().numpy()
        assert float(found[k]) == pytest.approx(1 - distance.cosine(a, b), abs=1e-6)
    torch.testing.assert_close(alignment(-directions, directions), torch.ones(4))


def test_random_directions_are_unit_vectors_of_their_seed() -> None:
    first, again, other = (random_directions(4, 50, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(first.norm(dim=1), torch.ones(4))
    assert torch.equal(first, again)
    assert (first @ other.T).abs().max() < 0.7


def test_references_tell_a_clean_edit_from_a_blunt_one() -> None:
    # Every class has two channels of its own.
    labels = torch.arange(40) % 4
    activations = torch.eye(4).repeat_interleave(2, dim=1)[labels] + 0.01 * torch.rand(40, 8)
    weight, bias = torch.eye(4).repeat_interleave(2, dim=1), torch.zeros(4)
    rows = (activations, labels)
    alphas = {"edit.alpha": torch.linspace(0, 50, 201).tolist()}
    study: Any = SimpleNamespace(
        reader=Reader(LinearTail(weight, bias), rows, rows, rows),
        runs=[SimpleNamespace(seed=seed, flat_settings=alphas) for seed in (0, 1, 1)],
        **{"classes": "abcd", "testbed": TESTBEDS["scenes"]},
    )
    edits = references_of(study)
    found = reference_summary(edits).set_index("reference")
    assert found.loc[ORACLE, "selectivity"] > 0.9
    assert found.loc[ORACLE, "selectivity"] > found.loc[RANDOM, "selectivity"]
    assert edits["reference"].value_counts().to_dict() == {RANDOM: 8, ORACLE: 4}


# -- what is run

KNOBS = ("sae.sparsity", "sae.k")


def commands(testbed: str, quick: bool, *settings: str, folders: dict[str, str] | None = None) -> list[list[str]]:
    setup = Setup(Path("out"), folders or {}, {}, quick=quick, settings=settings)
    return [
        command(EXPERIMENT.config, TESTBEDS[testbed], setup, sweep)
        for sweep in EXPERIMENT.sweeps_for(setup, TESTBEDS[testbed])
    ]


@pytest.mark.parametrize("testbed", EXPERIMENT.testbeds)
@pytest.mark.slow
def test_every_variant_composes(testbed: str, tmp_path: Path) -> None:
    for folder in ("train/n01440764", "train/n02102040", "val/n01440764", "val/n02102040"):
        (tmp_path / folder).mkdir(parents=True)
    register()
    configs: list[Config] = []
    few = ("sae.seed=7", "data.batch_size=8")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        for arguments in commands(testbed, True, *few, folders={"imagenette": str(tmp_path)}):
            overrides = OverridesParser.create().parse_overrides(arguments[1:])
            plan(combinations(overrides), lambda given: compose("config", overrides=given), configs.append)
    assert sorted(config.sae.variant for config in configs) == sorted([*VARIANTS] * 2)  # two settings of each
    for config in configs:
        assert (config.stages, config.edit.modes) == (["discover", "control"], ["suppress"])
        assert (config.sae.seed, config.data.batch_size) == (7, 8)
        assert config.backbone.name == {"scenes": "resnet10t", "resnet18": "resnet18"}[testbed]
    alike = {(c.sae.dictionary_size, c.sae.steps, c.sae.epochs, c.sae.batch_size) for c in configs}
    assert len(alike) == 1


@pytest.mark.parametrize("testbed", EXPERIMENT.testbeds)
def test_a_command_sweeps_the_whole_grid_of_its_family(testbed: str) -> None:
    recipe = yaml.safe_load((conf_dir() / "experiment" / f"{EXPERIMENT.config}.yaml").read_text(encoding="utf-8"))
    seeds = len(recipe["hydra"]["sweeper"]["params"]["sae.seed"].split(","))
    sizes = []
    for arguments in commands(testbed, False, "sae.epochs=2"):
        overrides = OverridesParser.create().parse_overrides(arguments[1:])
        swept = [override for override in overrides if override.is_sweep_override()]
        assert {override.get_key_element() for override in swept} in ({"sae", knob} for knob in KNOBS)
        sizes.append(seeds * len(combinations(overrides)))
        assert arguments[-1] == "sae.epochs=2"
    assert sum(sizes) == 5 * (4 * 7 + 3 * 6)


# -- what runs have found

#: Of a class that is gone on select.
LEFT = 0.02


class Outputs:
    """Runs on disk, as sweeps leave them, of three classes of which the last has no latent."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.runs: list[SAERun] = []
        artifacts = folder / "artifacts"
        (artifacts / "classifier" / "c").mkdir(parents=True)
        write_record(artifacts / "classifier" / "c" / "classifier.json", {"classes": ["x", "y", "z"]})
        head = {"fc.weight": torch.eye(3), "fc.bias": torch.zeros(3)}
        save_tensors(artifacts / "classifier" / "c" / "model.safetensors", head)
        (artifacts / "activations" / "a").mkdir(parents=True)
        rows = {"activations": torch.eye(3), "labels": torch.arange(3)}
        for split in ("train", "select", "test"):
            save_tensors(artifacts / "activations" / "a" / f"{split}-00000.safetensors", rows)
        sae = make_sae("linear_l1", 3, 2)
        sae.decoder.data.copy_(torch.tensor([[0.0, 1.0], [0.6, 0.0], [-0.8, 0.0]]))
        (artifacts / "sae" / "s").mkdir(parents=True)
        save_sae(artifacts / "sae" / "s" / "sae.safetensors", sae, {})
        (artifacts / "features" / "f").mkdir(parents=True)
        chosen = pd.DataFrame({"class": ["x", "y", "z"], "latent": [1, 0, None]})
        chosen.astype({"latent": "Int64"}).to_csv(artifacts / "features" / "f" / "selected.csv", index=False)
        for folder in artifacts.glob("*/*"):
            _seal(folder, {})

    def add(self, variant: str, k: int, seed: int, fall: float) -> None:
        """A run whose classes fall to 0 at α = 1 on select, to ``LEFT`` on test; each other class loses ``fall``."""
        key = f"{self.count:012x}"
        self.count += 1
        run, control = self.folder / "sweeps" / "s" / key, self.folder / "artifacts" / "control" / key
        for path in (run, control):
            path.mkdir(parents=True)
        sae = {"variant": variant, "k" if variant == "topk" else "sparsity": k, "seed": seed}
        settings = {"data": {"_target_": "salve.data.ConceptsData"}, "sae": sae, "edit": {"alpha": [0, 1]}}
        (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        select = {"select_fve": 0.5 + 0.1 * k, "select_l0": float(k)}
        write_record(run / "metrics.json", {"fve": 0.5 + 0.1 * k, "l0": float(k), **select})
        keys = {"control": key, "classifier": "c", "activations": "a", "sae": "s", "features": "f"}
        made = {kind: {"key": value, "path": f"../../../artifacts/{kind}/{value}"} for kind, value in keys.items()}
        write_record(run / "manifest.json", sealed({"artifacts": made, "files": {}}))
        self.runs.append(SAERun(run, self.folder / "artifacts"))
        rows = [
            {"split": split, "mode": mode, "target": target, "alpha": alpha, "class": name, "accuracy": accuracy}
            for split, left in (("select", 0.0), ("test", LEFT))
            for mode in ("suppress", "enhance")
            for target in "xy"
            for name in "xyz"
            for alpha, accuracy in ((0, 1.0), (1, 1.0 if mode == "enhance" else left if name == target else 1 - fall))
        ]
        pd.DataFrame(rows).to_parquet(control / "curves.parquet", index=False)
        _seal(control, {})


@pytest.fixture
def study(tmp_path: Path) -> Any:
    outputs = Outputs(tmp_path)
    for seed in (0, 1):
        for variant in ("topk", "linear_l1"):  # in no order
            for k in (4, 2):
                outputs.add(variant, k, seed, fall=0.1 * (variant == "topk") + 0.01 * k + 0.001 * seed)
    tail, rows = LinearTail(torch.eye(3), torch.zeros(3)), (torch.eye(3), torch.arange(3))
    return SimpleNamespace(
        **{"testbed": TESTBEDS["scenes"], "classes": ["x", "y", "z"], "runs": outputs.runs, "tail": tail},
        **{"reader": Reader(tail, rows, rows, rows), "test": SimpleNamespace(labels=rows[1])},
    )


def test_runs_are_read_with_their_edits(study: Any) -> None:
    every = edits_of(study)
    runs, references = runs_of(study, every), references_of(study)
    assert list(zip(runs["variant"], runs["knob"], runs["seed"], strict=True)) == [
        (variant, k, seed) for variant in ("linear_l1", "topk") for k in (2, 4) for seed in (0, 1)
    ]
    row = runs.iloc[7]  # topk, k 4, seed 1: the level is crossed at α = 0.95
    drift = 0.95 * 0.141
    assert (row["reached"], row["classes"]) == (2, 3)
    assert row["drift"] == pytest.approx(drift)
    taken = 0.95 * (1 - LEFT)
    assert row["selectivity"] == pytest.approx(2 / 3 * (taken - drift))  # nothing for the class without a latent
    assert row["select_selectivity"] == pytest.approx(2 / 3 * (0.95 - drift))
    assert row["after"] == pytest.approx(1 - taken)
    assert row["worst_loss"] == pytest.approx(drift)
    assert row["fve"] == pytest.approx(0.9)
    edits = every[every["run"] == row["run"]].set_index("class")
    assert edits["reached"].tolist() == [True, True, False]
    assert edits.loc["x", "alpha"] == pytest.approx(0.95)
    # The class directions are the channels themselves; latent 1 is the first channel, and 0.6 of latent 0 the second.
    assert edits["alignment"].tolist() == pytest.approx([1.0, 0.6, math.nan], nan_ok=True)
    assert row["alignment"] == pytest.approx(0.8)
    # Along its own channel a class goes and nothing else does: with logits all zero the first class is predicted.
    oracle = references[references["reference"] == ORACLE].set_index("class")
    assert oracle.loc["y", "selectivity"] == pytest.approx(0.95)


@pytest.mark.slow
def test_table_and_figure_show_what_the_runs_found(study: Any, tmp_path: Path) -> None:
    found = analyse([study])
    runs, table, references = found.tables["runs"], found.tables["summary"], found.tables["references"]
    assert set(table["testbed"]) == {"scenes"}
    assert len(table) == 2 * len(targets_of("scenes"))
    pd.testing.assert_frame_equal(table, summary(runs, targets_of("scenes")))
    by = table.set_index(["target", "variant"])
    at_four, beyond = by.loc[("L0 = 4", "topk")], by.loc[("L0 = 8", "topk")]
    mine = runs[(runs["variant"] == "topk") & (runs["knob"] == 4)]["selectivity"]
    assert at_four["selectivity"] == pytest.approx(mine.mean())
    assert (math.isnan(beyond["selectivity"]), beyond["reason"]) == (True, "L0 2 to 4")
    best = by.loc[("own best", "topk"), "selectivity"]
    assert f"topk {100 * best:.1f} ± " in found.paragraph
    # Class x cannot be taken away: it is predicted where all logits are zero.
    assert f"class direction {100 * 2 / 3 * 0.95:.1f}" in found.paragraph

    figure = comparison_figure(runs, table, reference_summary(references))
    against_l0 = figure.axes[0]
    line: Any
    [line] = [line for line in against_l0.get_lines() if line.get_color() == LOOKS["topk"][0]]
    means = runs[runs["variant"] == "topk"].groupby("knob")[["l0", "selectivity"]].mean()
    np.testing.assert_allclose(line.get_xdata(), means["l0"])
    np.testing.assert_allclose(line.get_ydata(), 100 * means["selectivity"])
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        save(comparison_figure(runs, table, reference_summary(references)), folder, "sae-variants")
    for suffix in ("pdf", "png", "svg"):
        first, again = ((tmp_path / folder / f"sae-variants.{suffix}").read_bytes() for folder in ("one", "two"))
        assert first == again
