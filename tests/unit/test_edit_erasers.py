"""Erasers against scikit-learn, against what they promise, and against the authors' package where it is."""

import pytest
import torch
from scipy.linalg import null_space
from sklearn.linear_model import LinearRegression, RidgeClassifier
from torch import Tensor, nn

from salve.editing.methods import Fitting, Target, make_method
from salve.types import UserError
from tests.unit.methods import TARGET, fitting_at, network

SITES = ("second", "hidden", "last")
TARGETS = (TARGET, TARGET._replace(name="two", classes=(0, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


@pytest.fixture(scope="module", params=SITES)
def fitting(request: pytest.FixtureRequest, model: nn.Module) -> Fitting:
    return fitting_at(model, request.param)


def erased(fitting: Fitting, name: str, target: Target, **settings: object) -> Tensor:
    """The rows at full size."""
    activations = make_method(name, settings).fit(fitting, target).at(1.0).activations
    assert activations is not None
    return activations(fitting.rows[:, None])[:, 0]


def of_target(fitting: Fitting, target: Target) -> Tensor:
    return torch.isin(fitting.labels, torch.tensor(target.classes))


@pytest.mark.parametrize("target", TARGETS)
def test_inlp_projects_on_the_null_space_of_ridge_classifiers_one_after_the_other(
    fitting: Fitting, target: Target
) -> None:
    rows, mine = fitting.rows.numpy(), of_target(fitting, target).numpy()
    ridge = 1e-2 * len(rows) * rows.var(axis=0).mean()
    weights: list[Tensor] = []
    projected = rows
    for steps in (1, 2, 4):
        while len(weights) < steps:
            found = RidgeClassifier(alpha=ridge, solver="cholesky", tol=1e-12).fit(projected, mine)
            weights.append(torch.as_tensor(found.coef_.ravel()))
            free = null_space(torch.stack(weights).numpy(), rcond=1e-9)
            projected = rows @ free @ free.T
        found = erased(fitting, "inlp", target, steps=steps, ridge=1e-2)
        torch.testing.assert_close(found, torch.as_tensor(projected), rtol=0, atol=1e-7)


def test_inlp_leaves_one_channel_and_stops_where_nothing_is_left(model: nn.Module) -> None:
    fitting = fitting_at(model, "hidden")
    assert torch.linalg.matrix_rank(erased(fitting, "inlp", TARGET, steps=100)) >= 1
    rows = torch.zeros(40, 8).double()
    rows[:20, 2] = 1.0  # one channel tells the class, and the others nothing
    rows[:, 5] = torch.arange(40) % 2
    labels = torch.tensor([1] * 20 + [0] * 20)
    changed = erased(Fitting(fitting.cut, rows, labels, 5), "inlp", TARGET)
    torch.testing.assert_close(changed, rows.index_fill(1, torch.tensor(2), 0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
def test_after_leace_no_linear_fit_tells_the_class_and_the_mean_stays(fitting: Fitting, target: Target) -> None:
    changed, mine = erased(fitting, "leace", target), of_target(fitting, target).double()
    assert LinearRegression().fit(fitting.rows, mine).score(fitting.rows, mine) > 0.05
    assert LinearRegression().fit(changed, mine).score(changed, mine) < 1e-9
    torch.testing.assert_close(changed.mean(dim=0), fitting.rows.mean(dim=0))
    torch.testing.assert_close(changed[mine == 1].mean(dim=0), changed[mine == 0].mean(dim=0))


@pytest.mark.parametrize("target", TARGETS)
def test_no_affine_map_that_erases_changes_less_than_leace(fitting: Fitting, target: Target) -> None:
    """Rows of ``A`` in ``a' = a − A (a − μ)`` minimise ``A_i Σ A_iᵀ`` subject to ``A_i σ = σ_i``: a KKT system."""
    rows, mine = fitting.rows, of_target(fitting, target).double()
    centred = rows - rows.mean(dim=0)
    covariance = centred.T @ centred / len(rows)
    across = centred.T @ mine / len(rows)
    width = len(across)
    system = torch.zeros(width + 1, width + 1).double()
    system[:width, :width], system[:width, width], system[width, :width] = covariance, across, across
    sides = torch.zeros(width + 1, width).double()
    sides[width] = across
    best = torch.linalg.lstsq(system, sides, driver="gelsd").solution[:width].T
    torch.testing.assert_close(erased(fitting, "leace", target), rows - centred @ best.T, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("target", TARGETS)
def test_leace_is_the_eraser_of_its_authors(fitting: Fitting, target: Target) -> None:
    authors = pytest.importorskip("concept_erasure")
    labels = of_target(fitting, target).double()
    eraser = authors.LeaceEraser.fit(fitting.rows, labels, shrinkage=False, constrain_cov_trace=False, svd_tol=1e-9)
    torch.testing.assert_close(erased(fitting, "leace", target), eraser(fitting.rows), rtol=0, atol=1e-9)


@pytest.mark.parametrize("target", TARGETS)
def test_a_ridge_finds_another_direction_and_erases_the_label_all_the_same(fitting: Fitting, target: Target) -> None:
    mine = of_target(fitting, target).double()
    with_ridge, without = (erased(fitting, "leace", target, ridge=ridge) for ridge in (0.5, 0.0))
    assert LinearRegression().fit(with_ridge, mine).score(with_ridge, mine) < 1e-9
    torch.testing.assert_close(with_ridge.mean(dim=0), fitting.rows.mean(dim=0))
    moved = [(rows - fitting.rows).square().sum() for rows in (with_ridge, without)]
    assert moved[0] != moved[1]


def within_classes(rows: Tensor, labels: Tensor) -> Tensor:
    rows = rows.clone().double()
    for label in labels.unique():
        rows[labels == label] -= rows[labels == label].mean(dim=0)
    return rows


@pytest.mark.parametrize("latents", [(2,), (2, 5)])
def test_after_the_latent_eraser_nothing_covaries_with_the_latents_within_classes(
    fitting: Fitting, latents: tuple[int, ...]
) -> None:
    """And no affine map that does so changes residuals less: rows of ``A`` in ``a − A (a − μ)`` solve a KKT system."""
    target = TARGET._replace(latents=latents, signs=(1,) * len(latents), kinds=("diffuse",) * len(latents))
    assert fitting.sae is not None
    with torch.no_grad():
        told = within_classes(fitting.sae.encode(fitting.rows)[:, latents], fitting.labels)
    before = within_classes(fitting.rows, fitting.labels)
    changed = erased(fitting, "latent_eraser", target, ridge=0.0)
    left = within_classes(changed, fitting.labels).T @ told
    assert (before.T @ told).abs().max() > 1e-3 * len(before)
    assert left.abs().max() < 1e-9 * len(before)
    torch.testing.assert_close(changed.mean(dim=0), fitting.rows.mean(dim=0).double())
    covariance, across = before.T @ before / len(before), before.T @ told / len(before)
    width, count = across.shape
    system, sides = torch.zeros(width + count, width + count).double(), torch.zeros(width + count, width).double()
    system[:width, :width], system[:width, width:], system[width:, :width] = covariance, across, across.T
    sides[width:] = across.T
    best = torch.linalg.lstsq(system, sides, driver="gelsd").solution[:width].T
    expected = fitting.rows - (fitting.rows - fitting.rows.mean(dim=0)) @ best.T
    # Only along directions in which residuals vary is the least change the only one.
    torch.testing.assert_close(within_classes(changed, fitting.labels), within_classes(expected, fitting.labels))


def test_erasers_refuse_what_cannot_be_erased_and_bad_settings(model: nn.Module) -> None:
    fitting = fitting_at(model, "hidden")
    every = TARGET._replace(name="every", classes=(0, 1, 2, 3, 4))
    for name in ("inlp", "leace"):
        with pytest.raises(UserError, match="every has all train images, so that nothing tells it from other classes"):
            make_method(name).fit(fitting, every)
    flat = Fitting(fitting.cut, torch.ones(20, 8).double(), torch.arange(20) % 5, 5)
    with pytest.raises(UserError, match="The site hidden tells nothing of one, so nothing can be erased"):
        make_method("leace").fit(flat, TARGET)
    with pytest.raises(UserError, match="latent 2 of one does not vary with the site hidden"):
        make_method("latent_eraser").fit(flat.with_sae(fitting.sae, 0), TARGET)
    for name in ("leace", "latent_eraser"):
        with pytest.raises(UserError, match=f"ridge=-1 of {name} must be 0 or more"):
            make_method(name, {"ridge": -1})
    with pytest.raises(UserError, match="steps=0 of inlp must be 1 or more"):
        make_method("inlp", {"steps": 0})
    with pytest.raises(UserError, match="ridge=0 of inlp must be above 0"):
        make_method("inlp", {"ridge": 0})
