"""When a reader is warned of an SAE."""

from typing import Any

import pytest

from salve.sae import remarks

GOOD = {"steps": 2000, "passes": 85.3, "dictionary_size": 256, "width": 512, "l0": 25.0, "dead_fraction": 0.1}


def test_of_a_good_sae_there_is_nothing_to_say() -> None:
    assert remarks(GOOD) == []
    assert remarks({}) == []
    assert remarks({**GOOD, "l0": None, "dead_fraction": None}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 180, "passes": 60.0}, "had only 180 steps (60 passes"),
        ({"l0": 124.0}, "L0 of 124 is not sparse: an image has 512 channels, the SAE 256 latents"),
        (
            {"l0": 20.0, "width": 64},
            "L0 of 20 is not sparse",
        ),
        (
            {"select_fve": 0.1},
            "explains 10% of the variance of select images' activations (FVE 0.1): edits act",
        ),
        (
            {"select_fve": -0.02},
            "select images' activations worse than their mean would (FVE -0.02)",
        ),
        ({"dead_fraction": 0.93, "dictionary_size": 512}, "476 of 512 latents are dead"),
    ],
)
def test_one_fault_is_one_sentence_that_names_it(change: dict[str, Any], said: str) -> None:
    [sentence] = remarks({**GOOD, **change})
    assert said in sentence


def test_every_fault_is_told() -> None:
    assert len(remarks({**GOOD, "steps": 9, "l0": 200.0, "dead_fraction": 0.9})) == 3
    # Nothing is advised against what an SAE needs that explains too little.
    few = " ".join(remarks({**GOOD, "steps": 9, "l0": 200.0, "dead_fraction": 0.9, "select_fve": 0.2}))
    assert "Lower sae.sparsity" in few
    assert "Raise sae.sparsity" not in few
    assert "smaller" not in few
    # At the limits nothing is wrong yet.
    assert remarks({**GOOD, "steps": 500, "l0": 64.0, "dead_fraction": 0.5, "select_fve": 0.5}) == []
