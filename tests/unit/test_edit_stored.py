"""Edits that store a key and a value: ROME, AlphaEdit and MEMIT, against plain loops and constrained least squares."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from salve.editing.methods import Fitting, Method, Target, make_method
from salve.editing.methods.change import changed_state
from salve.editing.methods.memit import Memit
from salve.editing.methods.rank_one import NullSpace, RankOne
from salve.types import UserError
from tests.unit.methods import ORDER, TARGET, Drawn, Plain, cut_at, fitting_at, network
from tests.unit.test_graph import SIZE, TwoReaders

INNER = ("second", "hidden")
TARGETS = (TARGET, TARGET._replace(name="two", classes=(1, 3)))


@pytest.fixture(scope="module")
def model() -> Plain:
    made = network()
    assert isinstance(made, Plain)
    return made


@pytest.fixture(scope="module", params=INNER)
def fitting(request: pytest.FixtureRequest, model: Plain) -> Fitting:
    return fitting_at(model, request.param)


def weights_of(method: Method, fitting: Fitting, target: Target = TARGET, alpha: float = 1.0) -> dict[str, Tensor]:
    weights = method.fit(fitting, target).at(alpha).weights
    assert weights is not None
    return weights()


def own_images(model: nn.Module, target: Target, count: int = 16) -> tuple[Tensor, Tensor]:
    """The first so many of each class, and their labels."""
    drawn = Drawn(model)
    at = torch.cat([(drawn.labels == label).nonzero()[:count, 0] for label in target.classes])
    return drawn.all[at], drawn.labels[at]


@torch.no_grad()
def mean_lead(model: nn.Module, weights: dict[str, Tensor], target: Target) -> float:
    """Of the target over all other classes, by the network itself."""
    images, labels = own_images(model, target)
    logits = functional_call(model, changed_state(model, weights), (images,))[:, ORDER]
    others = [label for label in range(5) if label not in target.classes]
    leads = [float(row[label] - row[others].max()) for row, label in zip(logits, labels, strict=True)]
    return sum(leads) / len(leads)


def least(moment: Tensor, key: Tensor) -> Tensor:
    """The ``r`` that minimises ``rᵀ C r`` subject to ``rᵀ k = 1``, by its KKT system."""
    width = len(key)
    system = torch.zeros(width + 1, width + 1).double()
    system[:width, :width], system[:width, width], system[width, :width] = moment, key, key
    side = torch.zeros(width + 1).double()
    side[width] = 1.0
    return torch.linalg.solve(system, side)[:width]


def second_moment(rows: Tensor, ridge: float = 1e-4) -> Tensor:
    moment = rows.T @ rows / len(rows)
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment)).double()


def factors(change: Tensor, row: Tensor) -> Tensor:
    """``Λ`` of a change ``Λ rᵀ`` of a weight, at the centre tap; everything else is zero."""
    inner = change if change.ndim == 2 else change[:, :, change.shape[2] // 2, change.shape[3] // 2]
    assert float(change.square().sum()) == pytest.approx(float(inner.square().sum()), rel=1e-12)
    value = inner @ row / (row @ row)
    torch.testing.assert_close(inner, torch.outer(value, row), rtol=0, atol=1e-9 * float(inner.abs().max()))
    return value


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["rank_one", "null_space", "memit"])
def test_at_full_size_the_class_no_longer_leads(fitting: Fitting, name: str, target: Target) -> None:
    model = fitting.cut.model
    edit = make_method(name).fit(fitting, target)
    start = mean_lead(model, {}, target)
    assert start > 0.01
    full, half = edit.at(1.0).weights, edit.at(0.3).weights
    assert full is not None
    assert half is not None
    assert abs(mean_lead(model, full(), target)) < 2e-3 * start
    assert 0.1 * start < mean_lead(model, half(), target) < 0.95 * start


@pytest.mark.parametrize("target", TARGETS)
def test_the_row_of_rome_stores_its_key_and_changes_least(fitting: Fitting, target: Target) -> None:
    key = torch.stack([fitting.rows[fitting.labels == label].mean(dim=0) for label in target.classes]).mean(dim=0)
    expected = least(second_moment(fitting.rows), key)
    torch.testing.assert_close(RankOne().row(fitting, target), expected, rtol=1e-7, atol=1e-9)
    (reader,) = fitting.cut.site.readers
    weight = fitting.cut.model.get_parameter(reader.weight)
    changed = weights_of(RankOne(), fitting, target)
    assert changed.keys() == {reader.weight}
    value = factors(changed[reader.weight] - weight, expected)
    (half,) = weights_of(RankOne(), fitting, target, 0.5).values()
    torch.testing.assert_close(factors(half - weight, expected), value / 2, rtol=1e-9, atol=1e-12)


def test_where_the_lead_is_linear_the_value_is_one_step(model: Plain) -> None:
    """Behind the hidden layer, as long as no unit opens or closes and no rival changes, which is so for this class."""
    fitting = fitting_at(model, "hidden")
    images, _ = own_images(model, TARGET)
    with torch.no_grad():
        rows = fitting.cut.read(images)[:, 0]
        row = RankOne().row(fitting, TARGET)
        head, bias = model.head.weight[ORDER], model.head.bias[ORDER]
        slope, lead = torch.zeros(7).double(), 0.0
        for one in rows:
            units = model.hidden(one)
            logits = head @ units.relu() + bias
            rival = max((0, 2, 3, 4), key=lambda label: float(logits[label]))
            slope += (head[1] - head[rival]) * (units > 0) * (row @ one) / len(rows)
            lead += float(logits[1] - logits[rival]) / len(rows)
        change = weights_of(RankOne(), fitting)["hidden.weight"] - model.hidden.weight
    torch.testing.assert_close(factors(change, row), -lead * slope / slope.square().sum(), rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_outputs_of_a_convolution_move_by_the_value_times_what_lies_at_the_centre(model: Plain) -> None:
    fitting = fitting_at(model, "second")
    weight = weights_of(RankOne(), fitting)["second.weight"]
    row = RankOne().row(fitting, TARGET)
    value = factors(weight - model.second.weight, row)
    images = torch.randn(2, 3, SIZE, SIZE).double()
    seen = model.first(images).relu()
    moved = nn.functional.conv2d(seen, weight) - nn.functional.conv2d(seen, model.second.weight)
    for image in range(2):
        for y in range(moved.shape[2]):
            for x in range(moved.shape[3]):
                expected = value * (row @ seen[image, :, y + 1, x + 1])
                torch.testing.assert_close(moved[image, :, y, x], expected, rtol=1e-9, atol=1e-12)


def test_all_readers_of_a_site_take_part() -> None:
    model = network(TwoReaders)
    fitting = fitting_at(model, "second")
    changed = weights_of(RankOne(), fitting)
    assert changed.keys() == {"second.weight", "other.weight"}
    row = RankOne().row(fitting, TARGET)
    for name, weight in changed.items():
        assert factors(weight - model.get_parameter(name), row).abs().max() > 0


def test_the_row_of_alphaedit_is_the_papers_and_leaves_other_classes_alone(model: Plain) -> None:
    cut, generator = cut_at(model, "last"), torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(7, 7, generator=generator).double()).Q
    labels = torch.arange(100) % 5
    rows = torch.randn(100, 4, generator=generator).double() @ basis[:, :4].T  # the others lie in four dimensions
    rows[labels == 1] = torch.randn(20, 7, generator=generator).double() + 1.0
    fitting = Fitting(cut, rows, labels, 5)
    row = NullSpace().row(fitting, TARGET)
    key = rows[labels == 1].mean(dim=0)
    projection = torch.eye(7).double() - basis[:, :4] @ basis[:, :4].T
    paper = key @ projection @ torch.linalg.inv(torch.outer(key, key) @ projection + 1e-9 * torch.eye(7).double())
    torch.testing.assert_close(row, paper, rtol=1e-6, atol=1e-9)
    changed = weights_of(NullSpace(), fitting)["head.weight"]
    moved = rows @ (changed - model.head.weight).T
    assert moved[labels != 1].abs().max() < 1e-12
    assert moved[labels == 1].abs().max() > 0.1 * fitting.lead(TARGET)


def test_alphaedit_says_where_nothing_is_free(model: Plain) -> None:
    fitting = fitting_at(model, "second")
    with pytest.raises(
        UserError, match=r"leave no direction free at the site second for null_space; raise threshold=0\.02"
    ):
        NullSpace(threshold=0.02).fit(fitting, TARGET)
    last, labels = cut_at(model, "last"), torch.arange(50) % 5
    rows = torch.zeros(50, 7).double()
    rows[:, :3] = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()  # no class has the other four
    with pytest.raises(UserError, match="one has nothing in what the other classes leave free at the site head"):
        NullSpace().fit(Fitting(last, rows, labels, 5), TARGET)


def test_memit_at_one_site_is_the_rank_one_edit(model: Plain) -> None:
    """The class has fewer images than the sample, so that both have the same key."""
    assert len(own_images(model, TARGET, 100)[0]) < 16
    for layer in (*INNER, "last"):
        fitting = fitting_at(model, layer)
        one, other = weights_of(Memit(sites=1), fitting), weights_of(RankOne(), fitting)
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-12)


def test_memit_spreads_the_fall_evenly_with_keys_from_the_edited_network(model: Plain) -> None:
    fitting, start = fitting_at(model, "second"), mean_lead(model, {}, TARGET)
    changed = weights_of(Memit(), fitting)
    assert list(changed) == ["second.weight", "hidden.weight", "head.weight"]
    for count, left in ((1, 2 / 3), (2, 1 / 3), (3, 0)):
        some = dict(list(changed.items())[:count])
        assert mean_lead(model, some, TARGET) == pytest.approx(left * start, abs=2e-3 * start)
    images, drawn = own_images(model, TARGET)[0], Drawn(model)
    every = torch.cat([drawn.all[drawn.labels == label][:32] for label in range(5)])
    with torch.no_grad():
        edited = nn.functional.conv2d(model.first(images).relu(), changed["second.weight"], model.second.bias)
        key = edited.relu().mean(dim=(2, 3)).mean(dim=0)
        rows = model.second(model.first(every).relu()).relu().mean(dim=(2, 3))
        assert factors(changed["hidden.weight"] - model.hidden.weight, least(second_moment(rows), key)).any()


def test_no_pair_is_stored_without_a_centre_or_across_groups() -> None:
    class Odd(Plain):
        def __init__(self, kernel: int = 2, groups: int = 1) -> None:
            super().__init__()
            self.second = nn.Conv2d(6, 8, kernel, groups=groups)
            self.third = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            map_ = self.third(self.second(self.first(images).relu()).relu()).relu()
            return self.head(self.hidden(map_.mean(dim=(2, 3))).relu())

    class Grouped(Odd):
        def __init__(self) -> None:
            super().__init__(3, 2)

    for kind, why in ((Odd, "a kernel of 2 × 2 taps, which has no centre"), (Grouped, "a convolution in 2 groups")):
        fitting = fitting_at(network(kind), "second")
        for name in ("rank_one", "null_space", "memit"):
            with pytest.raises(UserError, match=f"{name} stores nothing at the site second: second.weight .*{why}"):
                make_method(name).fit(fitting, TARGET)


def test_a_class_that_a_site_does_not_move_is_refused() -> None:
    closed = network()
    closed.get_parameter("hidden.bias").fill_(-1e3)
    fitting = fitting_at(closed, "hidden")
    label = int(Drawn(closed).labels[0])
    with pytest.raises(
        UserError, match=r"rank_one cannot take the lead of one at the site hidden: of .* logits, .* are left"
    ):
        RankOne().fit(fitting, TARGET._replace(classes=(label,)))


def test_settings_out_of_range_and_a_missing_key_are_refused(model: Plain) -> None:
    for name, settings, says in (
        ("rank_one", {"steps": 0}, "steps=0 of rank_one must be 1 or more"),
        ("null_space", {"images": 0}, "images=0 of null_space must be 1 or more"),
        ("null_space", {"threshold": 0.0}, "threshold=0 of null_space must be above 0"),
        ("memit", {"sites": 0}, "sites=0 of memit must be 1 or more"),
        ("memit", {"steps": 0}, "steps=0 of memit must be 1 or more"),
        ("memit", {"ridge": 0.0}, "ridge=0 of a rank-one edit must be above 0"),
    ):
        with pytest.raises(UserError, match=says):
            make_method(name, settings)
    zeros = Fitting(cut_at(model, "last"), torch.zeros(10, 7).double(), torch.arange(10) % 5, 5)
    with pytest.raises(UserError, match="At the site head the class's mean activation is zero"):
        RankOne().fit(zeros, TARGET)
