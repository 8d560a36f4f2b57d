"""TCAV: the classifier's normal like scikit-learn's, scores at a linear tail in closed form, and a stage's table."""

from math import isnan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from salve.backbones import find_site
from salve.backbones.cut import Cut
from salve.data.transforms import Preprocess
from salve.features import concept_test, concept_vector, tcav_scores
from salve.features.tcav import RIDGE
from salve.settings import ValidateSettings
from salve.stages import tcav
from salve.stages.tcav import concept_digests, concept_files, concept_table
from salve.types import UserError


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_vector_is_the_normal_of_a_ridge_regression_on_the_label() -> None:
    mixed = drawn(5, 5, seed=3)
    concept, others = drawn(30, 5) @ mixed + drawn(5, seed=4), drawn(40, 5, seed=1) @ mixed
    found = concept_vector(concept, others)
    rows = torch.cat([concept - concept.mean(dim=0), others - others.mean(dim=0)])
    penalty = RIDGE * float(rows.square().sum()) / 5
    labels = torch.cat([torch.ones(30), torch.zeros(40)])
    fitted = torch.from_numpy(Ridge(alpha=penalty).fit(torch.cat([concept, others]).numpy(), labels.numpy()).coef_)
    torch.testing.assert_close(found, fitted / fitted.norm())
    assert float(found @ (concept.mean(dim=0) - others.mean(dim=0))) > 0
    # One point each: the line between them.
    torch.testing.assert_close(concept_vector(torch.ones(3, 2), torch.zeros(4, 2)), torch.full((2,), 0.5**0.5).double())
    assert concept_vector(torch.ones(3, 2), torch.ones(4, 2)).tolist() == [0, 0]
    with pytest.raises(UserError, match="must both have at least one row"):
        concept_vector(torch.ones(0, 2), torch.ones(4, 2))


def test_at_a_linear_tail_a_score_is_the_sign_of_the_weights_along_the_vector() -> None:
    weight, vectors, labels = drawn(4, 6), drawn(7, 6, seed=1), torch.tensor([0, 2, 2, 0, 3, 2])
    found = tcav_scores(weight[labels], labels, vectors, 4)
    for k in (0, 2, 3):
        assert found[k].tolist() == [float(weight[k] @ vector > 0) for vector in vectors]
    assert found[1].isnan().all()


def test_elsewhere_it_is_the_share_of_the_images_that_grow() -> None:
    gradients = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [0, 1]])
    found = tcav_scores(gradients, torch.tensor([0, 0, 0, 1]), torch.tensor([[1.0, 0], [0, -1]]), 2)
    torch.testing.assert_close(found, torch.tensor([[2 / 3, 0], [0, 0]]).double())


def test_scores_are_tested_against_those_of_random_vectors_on_both_sides() -> None:
    random, low = drawn(20).sigmoid(), 0.1 * drawn(15, seed=1).sigmoid()
    wanted = stats.ttest_ind(low, random, equal_var=False)
    found = concept_test(low, random)
    assert (found.t, found.p) == pytest.approx((wanted.statistic, wanted.pvalue))
    assert found.t < 0
    assert found.p < 1e-3
    assert concept_test(torch.ones(5), torch.ones(5)) == (0, 1)
    assert concept_test(torch.zeros(5), torch.ones(5)) == (-float("inf"), 0)
    assert isnan(concept_test(torch.ones(1), random).p)


# -- the stage, on patches of two colours


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images that are red, and some that are no images."""
    (tmp_path / "reddish").mkdir()
    for i in range(12):
        Image.new("RGB", (12, 10), (200 + i, 20, 20)).save(tmp_path / "reddish" / f"{i}.png")
    (tmp_path / "reddish" / "notes.txt").write_text("none")
    return tmp_path / "reddish"


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(tcav, "DRAWS", 6)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = [(0.3 * torch.rand(3, 1, 1, generator=generator).expand(3, 8, 8), k) for k in labels.tolist()]

    def loader(split: str, indices: list[int]) -> DataLoader:
        return DataLoader(Subset(images, indices), batch_size=16)  # type: ignore[arg-type]

    preprocess = Preprocess(8, None, mean=(0, 0, 0), std=(1, 1, 1))
    data = SimpleNamespace(labels=lambda split: labels, loader=loader, batch_size=16, preprocess=preprocess)
    device = torch.device("cpu")
    return SimpleNamespace(data=data, seed=0, classes=("red", "green"), device=device, on_device=lambda images: images)


def settings_with(folder: Path) -> ValidateSettings:
    return ValidateSettings(0, 1, 8, 0, 0, 0, 0, concepts={"reddish": str(folder)})


def test_a_class_that_the_concept_raises_and_one_that_it_lowers(context: Any, folder: Path) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    model[2].weight.data = torch.tensor([[2.0, -1, 0], [-1, 2, 0]])
    cut = Cut(model, find_site(model, "last", 8), torch.arange(2))
    table = concept_table(context, settings_with(folder), cut).set_index("class")
    assert table["examples"].tolist() == [12, 12]
    assert table["images"].tolist() == [8, 8]
    assert table["tcav"].tolist() == [1, 0]
    assert table.loc["red", "sensitivity"] > 0 > table.loc["green", "sensitivity"]
    assert (table["p_all"] == (2 * table["p"]).clip(upper=1)).all()
    assert ((table["tcav_random"] > 0) & (table["tcav_random"] < 1)).all()


def test_inside_the_network_gradients_are_taken_through_the_tail(context: Any, folder: Path) -> None:
    class Tail:
        """The logit of red is the sum of squares of the activations, that of green is minus that."""

        def __init__(self, images: Tensor) -> None:
            self.activations = images.flatten(2).transpose(1, 2)  # [n, P, 3]

        def __call__(self, activations: Tensor) -> Tensor:
            total = activations.square().sum(dim=(1, 2))
            return torch.stack([total, -total], dim=1)

    cut: Any = SimpleNamespace(linear=None, tail=Tail, read=lambda images: images.flatten(2).transpose(1, 2))
    gradients, labels = tcav._gradients(context, settings_with(folder), cut)
    assert gradients.shape == (16, 3)
    assert ((gradients > 0) == (labels == 0)[:, None]).all()
    table = concept_table(context, settings_with(folder), cut)
    assert table["tcav"].between(0, 1).all()


def test_folders_of_concepts_are_checked_and_known_by_their_bytes(folder: Path, tmp_path: Path) -> None:
    assert len(concept_files({"reddish": str(folder)})["reddish"]) == 12
    before = concept_digests({"reddish": str(folder)})
    moved = folder.rename(tmp_path / "moved")
    assert concept_digests({"reddish": str(moved)}) == before
    Image.new("RGB", (12, 10)).save(moved / "0.png")
    assert concept_digests({"reddish": str(moved)}) != before
    with pytest.raises(UserError, match="for 'reddish', which is not there"):
        concept_files({"reddish": str(folder)})
    for i in range(3):
        (moved / f"{i}.png").unlink()
    with pytest.raises(UserError, match="has 9 images; a concept needs at least 10"):
        concept_digests({"x": str(moved)})
