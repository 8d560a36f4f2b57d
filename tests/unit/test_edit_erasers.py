"""INLP and LEACE against scikit-learn, against what they promise, and against the authors' package where it is."""

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


def test_erasers_refuse_what_cannot_be_erased_and_bad_settings(model: nn.Module) -> None:
    fitting = fitting_at(model, "hidden")
    every = TARGET._replace(name="every", classes=(0, 1, 2, 3, 4))
    for name in ("inlp", "leace"):
        with pytest.raises(UserError, match="every has all train images, so that nothing tells it from other classes"):
            make_method(name).fit(fitting, every)
    flat = Fitting(fitting.cut, torch.ones(20, 8).double(), torch.arange(20) % 5, 5)
    with pytest.raises(UserError, match="The site hidden tells nothing of one, so nothing can be erased"):
        make_method("leace").fit(flat, TARGET)
    with pytest.raises(UserError, match="steps=0 of inlp must be 1 or more"):
        make_method("inlp", {"steps": 0})
    with pytest.raises(UserError, match="ridge=0 of inlp must be above 0"):
        make_method("inlp", {"ridge": 0})
