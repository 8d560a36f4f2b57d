"""What stages make of measurements: tables worked out by hand."""

import math

import pandas as pd
import pytest
import torch

from salve.data.transforms import Preprocess
from salve.editing import edited_logits
from salve.editing.curves import edit_curves
from salve.stages import DiscoverSettings
from salve.stages.control import slug, summarise
from salve.stages.diagnose import strengths
from salve.stages.diagnose import summarise as summarise_strengths
from salve.stages.discover import feature_tables
from salve.stages.targets import Target
from salve.stages.validate import masks_like

CLASSES = ["a", "b", "c", "d"]


def edit(*rows: list[float]) -> dict[str, object]:
    accuracy = torch.tensor(rows, dtype=torch.float64)
    target = Target("a", (0,), (7,), (-1,), ("class-defining",))
    return summarise(target, [0.0, 1.0, 2.0, 4.0][: len(rows)], accuracy, torch.zeros_like(accuracy), CLASSES)


def test_an_edit_separates_at_the_first_strength_that_does() -> None:
    found = edit([0.9, 0.8, 0.8, 0.8], [0.5, 0.8, 0.8, 0.8], [0.05, 0.8, 0.79, 0.82], [0.0, 0.5, 0.5, 0.5])
    assert (found["alpha"], found["alpha_used"]) == (2.0, 2.0)
    assert found["separates"] is True
    assert found["separates_strictly"] is True
    assert found["accuracy_before"] == pytest.approx(0.9)
    assert found["accuracy_after"] == pytest.approx(0.05)
    assert found["others_mean_change"] == pytest.approx(0.01)
    assert found["others_signed_change"] == pytest.approx(0.01 / 3)
    assert found["others_worst_change"] == pytest.approx(0.02)
    assert found["worst_class"] == "d"
    assert (found["latents"], found["sign"], found["reason"]) == ("7", "-1", "")


def test_gains_that_make_up_for_losses_separate_but_not_strictly() -> None:
    found = edit([0.9, 0.8, 0.8, 0.8], [0.0, 0.7, 0.9, 0.8])
    assert found["separates"] is True
    assert found["separates_strictly"] is False


def test_an_edit_that_takes_others_down_says_by_how_much() -> None:
    found = edit([0.9, 0.8, 0.8, 0.8], [0.0, 0.5, 0.8, 0.8])
    assert found["separates"] is False
    assert found["alpha"] == 1.0
    assert "-10.0%" in str(found["reason"])


def test_an_edit_that_never_brings_the_class_down_has_no_strength() -> None:
    found = edit([0.9, 0.8, 0.8, 0.8], [0.4, 0.8, 0.8, 0.8])
    assert found["alpha"] == math.inf
    assert found["separates"] is False
    assert "stays at 40%" in str(found["reason"])


def test_a_class_that_is_lost_without_an_edit_does_not_separate() -> None:
    found = edit([0.05, 0.8, 0.8, 0.8], [0.0, 0.8, 0.8, 0.8])
    assert (found["separates"], found["separates_strictly"], found["alpha"]) == (False, False, math.inf)
    assert found["reason"] == "without any edit its accuracy is only 5%"


def test_a_class_without_images_counts_for_nothing() -> None:
    found = edit([0.9, math.nan, 0.8, 0.8], [0.0, math.nan, 0.8, 0.8])
    assert found["others_mean_change"] == 0.0
    assert found["separates"] is True


def test_curves_equal_a_loop_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, c = (torch.randn(*s, generator=generator).double() for s in ((3, 5), (3,), (5,)))
    activations, labels = torch.rand(31, 5, generator=generator).double(), torch.arange(31) % 2  # class 2 has none
    alphas = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    accuracy, kl = edit_curves(weight, bias, activations, labels, c, alphas)
    logits = edited_logits(weight, bias, activations, c, alphas)
    for k in range(3):
        for i in range(2):
            own = labels == i
            assert accuracy[k, i] == (logits[k, own].argmax(1) == i).double().mean()
            p, q = logits[0, own].softmax(1), logits[k, own].softmax(1)
            assert kl[k, i] == pytest.approx(float((p * (p / q).log()).sum(1).mean()))
    assert accuracy[:, 2].isnan().all()
    monkeypatch.setattr("salve.editing.curves._BLOCK", 30)
    again = edit_curves(weight, bias, activations, labels, c, alphas)
    torch.testing.assert_close(again, (accuracy, kl), equal_nan=True)


def test_strengths_agree_with_the_grid_they_are_compared_with() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, c = torch.randn(4, 6, generator=generator), torch.zeros(4), torch.randn(6, generator=generator)
    activations = torch.rand(200, 6, generator=generator)
    grid = [i / 10 for i in range(60)]
    table = strengths(weight, bias, activations, c, torch.arange(200) % 4, grid)
    right = table[table["correct"]]
    assert len(right) > 20
    assert right["flip_exact"].gt(0).all()
    # A prediction may leave the class and come back within one step of the grid; it cannot leave later than seen.
    assert (right["flip_exact"] <= right["flip_grid"] + 1e-5).all()
    found = summarise_strengths("a", table.assign(latent=3), grid)
    assert found["grid_agreement"] == pytest.approx(1.0, abs=0.05)
    assert found["images"] == 200
    assert found["alpha_flip_median"] in set(right["flip_exact"])


def test_feature_tables_of_a_class_without_images_and_a_dead_latent() -> None:
    means = torch.tensor([[0.9, -0.2, 0.0], [math.nan] * 3, [0.1, 0.8, 0.0]])
    tables = feature_tables(means, torch.tensor([0.5, 0.4, 0.0]), ("a", "b", "c"), DiscoverSettings(0.5, "margin", 2))
    selected = tables["selected"].set_index("class")
    assert selected.loc["a", "latent"] == 0
    assert selected.loc["c", "latent"] == 1
    assert pd.isna(selected.loc["b", "latent"])
    assert tables["latents"]["kind"].tolist() == ["class-defining", "class-defining", "dead"]
    assert set(tables["dominant"]["class"]) == {"a", "c"}
    assert tables["dominant"].query("`class` == 'a' and latent == 1")["sign"].tolist() == [-1]


def test_masks_go_where_preprocessing_puts_their_pixels() -> None:
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 16:32, 24:40] = True
    assert torch.equal(masks_like(masks, Preprocess(64, None)), masks)
    image = masks.to(torch.uint8).expand(3, 64, 64) * 255
    for preprocess in (Preprocess(128, None), Preprocess(48, 64), Preprocess(96, 128)):
        found = masks_like(masks, preprocess)[0]
        shown = preprocess.eval_transform()(image)[0] > 0
        assert found.shape == (preprocess.size, preprocess.size)
        assert (found != shown).float().mean() < 0.02


def test_slugs_are_file_names() -> None:
    assert slug("French horn") == "french-horn"
    assert slug("<script>/../x") == "script-x"
    assert slug("日本") == "unnamed"
