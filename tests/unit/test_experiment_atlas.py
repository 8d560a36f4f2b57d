"""The feature atlas: purity of what excites a latent, the tables, and the figures on runs that are made up."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments.claims import load_claims
from experiments.salve2025.atlas import (
    analyse,
    atlas_figure,
    classes_table,
    faithful,
    means_figure,
    own_share,
    shown_latents,
)
from experiments.testbeds import TESTBEDS
from salve.sae import make_sae

CLASSES = ["church", "golf ball", "tench"]
LABELS = torch.tensor([0] * 6 + [1] * 6 + [2] * 3)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("most", [1, 4, 100])
def test_own_share_is_what_sorting_says(sign: int, most: int) -> None:
    latents = torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0))
    order = sorted(range(len(LABELS)), key=lambda n: -sign * float(latents[n, 2]))[:most]
    expected = sum(int(LABELS[n]) == 1 for n in order) / len(order)
    assert own_share(latents, LABELS, 2, sign, 1, most) == pytest.approx(expected)


def test_each_listed_latent_is_shown_once_in_order() -> None:
    rows = [("a", 1, 7), ("a", 2, 3), ("a", 3, 9), ("b", 1, 3), ("b", 2, 5)]
    table = pd.DataFrame(rows, columns=["class", "rank", "latent"])
    assert shown_latents(table, 2) == [7, 3, 5]
    assert shown_latents(table, 1) == [7, 3]


def test_a_map_is_faithful_if_it_beats_a_random_one_both_ways() -> None:
    scores = {"insertion": [0.8, 0.8, 0.4], "random_insertion": [0.5, 0.5, 0.5]}
    scores |= {"deletion": [0.3, 0.6, 0.3], "random_deletion": [0.5, 0.5, 0.5]}
    assert faithful(pd.DataFrame(scores)).tolist() == [True, False, False]


class OneRun:
    """A run: its SAE, and tables and tensors by name, empty where there is none."""

    def __init__(self, files: dict[str, Any], sae: Any, selected: pd.DataFrame) -> None:
        self._files, self.sae, self.selected = files, sae, selected

    def table(self, _: str, name: str) -> pd.DataFrame:
        return self._files.get(name, pd.DataFrame())

    def tensors(self, _: str, name: str) -> dict[str, Any]:
        return {key: torch.from_numpy(values) for key, values in self._files[name].items()}

    def files(self, _: str) -> list[str]:
        return list(self._files)


def a_study(activations: Tensor, maximised: bool = True) -> Any:
    """Church has latent 0, tench latent 1 with the sign −1, golf ball none; one latent is shared."""
    sae = make_sae("linear_l1", 4, 3).requires_grad_(False)
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(4)[:3])
    seen = np.random.default_rng(0)
    kinds = ["class-defining", "cross-class", "dead"]
    dominant = [
        ("church", 1, 0, 1, 0.9, kinds[0]),
        ("church", 2, 1, 1, 0.3, kinds[1]),
        ("tench", 1, 1, -1, 0.4, kinds[1]),
    ]
    files: dict[str, Any] = {
        "dominant.csv": pd.DataFrame(dominant, columns=["class", "rank", "latent", "sign", "share", "kind"]),
        "latents.csv": pd.DataFrame({"latent": [0, 1, 2], "kind": kinds}),
        "class_means.safetensors": {"class_means": seen.normal(size=(3, 3))},
        "top.csv": pd.DataFrame({"class": ["church", "tench"], "rank": [1, 1], "label": ["church", "golf ball"]}),
        "saliency.safetensors": {
            "images": seen.integers(0, 255, (3, 2, 3, 8, 8)).astype(np.uint8),
            "maps": seen.random((3, 2, 8, 8)),
        },
        "localisation.csv": pd.DataFrame(
            {
                **{"class": ["church", "tench"], "latent": [0, 1], "insertion": [0.9, 0.9], "deletion": [0.1, 0.9]},
                **{"random_insertion": [0.5, 0.5], "random_deletion": [0.5, 0.5]},
            }
        ),
    }
    if maximised:
        files["maximisation.csv"] = pd.DataFrame({"class": ["church", "tench"], "final_value": [100.0, 0.0]})
        files["maximisation.safetensors"] = {"images": seen.integers(0, 255, (3, 3, 8, 8)).astype(np.uint8)}
    selected = {
        "latent": [0, pd.NA, 1],
        "sign": [1, pd.NA, -1],
        "share": [0.9, np.nan, 0.4],
        "kind": [kinds[0], "", kinds[1]],
    }
    run = OneRun(files, sae, pd.DataFrame(selected, index=CLASSES))
    test = SimpleNamespace(activations=activations, labels=LABELS)
    return SimpleNamespace(testbed=TESTBEDS["scenes"], classes=CLASSES, runs=(run,), test=test)


def separable() -> Tensor:
    """Channel 0 is high for church, channel 1 low for tench."""
    activations = torch.zeros(len(LABELS), 4)
    activations[LABELS == 0, 0] = torch.linspace(1, 2, 6)
    activations[LABELS == 2, 1] = -1.0
    return activations


def test_a_class_is_described_by_its_latent_in_the_sense_of_its_sign() -> None:
    table = classes_table(a_study(separable())).set_index("class")
    assert list(table.index) == ["church", "tench"]  # golf ball has no latent
    assert table.loc["church", "own_share"] == pytest.approx(6 / len(LABELS))  # fewer images than are asked for
    assert table.loc["tench", "strongest"] == 1
    assert table.loc["church", "strongest"] == 2
    assert table.loc["tench", "expected_share"] == pytest.approx(3 / 15)


def test_claims_are_shares_of_the_classes_that_have_a_latent() -> None:
    found = analyse([a_study(separable())])
    values = {one.claim: one.value for one in found.measured}
    assert values.keys() <= load_claims().keys()
    assert values["atlas.defining"] == 0.5
    assert values["atlas.faithful"] == 0.5
    assert values["atlas.maximised"] == 0.5  # church's image beats the strongest real one, tench's 0 does not
    assert "1 class-defining, 1 cross-class, 0 diffuse, 1 dead" in found.paragraph
    assert "for all classes but tench" in found.paragraph


def test_what_was_not_made_is_not_claimed_or_drawn() -> None:
    study = a_study(separable(), maximised=False)
    assert "atlas.maximised" not in {one.claim for one in analyse([study]).measured}
    blank = atlas_figure(study).axes[1].images[0].get_array()
    assert blank is not None
    assert (blank == 255).all()


def test_images_of_another_class_are_framed() -> None:
    figure = atlas_figure(a_study(separable()))
    # For each class: its words, the maximised image, and two pairs of an image with its overlay.
    assert len(figure.axes) == 2 * (1 + 1 + 4)
    framed = [axes.spines["top"].get_visible() for axes in figure.axes]
    strongest_of_church, strongest_of_tench = 2, 8
    assert framed[strongest_of_tench]
    assert not framed[strongest_of_church]


def test_the_heat_map_marks_each_class_s_latent() -> None:
    axes = means_figure(a_study(separable())).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1"]
    marked: Any = axes.lines[0].get_xydata()
    assert marked.tolist() == [[0, 0], [1, 2]]
