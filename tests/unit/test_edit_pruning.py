"""Pruning by attribution, against SciPy's Welch test and differences of logits."""

import pytest
import torch
from scipy.stats import ttest_ind
from torch import Tensor, nn

from salve.editing.methods import Affine, Fitting, make_method
from salve.editing.methods.pruning import Pruning
from salve.types import UserError
from tests.unit.methods import TARGET, Drawn, fitting_at, network

TWO = TARGET._replace(name="two", classes=(0, 3))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network()


def lead(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image's own class over the best other."""
    rest = [[one for at, one in enumerate(row) if at != label] for row, label in zip(logits, labels, strict=True)]
    return torch.stack([row[label] - max(others) for row, label, others in zip(logits, labels, rest, strict=True)])


def gates(fitting: Fitting, target: object, alpha: float, **settings: str) -> Tensor:
    affine = make_method("pruning", settings).fit(fitting, target).at(alpha).activations  # type: ignore[arg-type]
    assert isinstance(affine, Affine)
    assert affine.gate is not None
    return affine.gate


@pytest.mark.parametrize("layer", ["second", "hidden"])
@torch.no_grad()
def test_attributions_are_slopes_of_the_lead_as_a_channel_closes(model: nn.Module, layer: str) -> None:
    fitting, drawn = fitting_at(model, layer), Drawn(model)
    found, labels = fitting.attributions
    at = [(drawn.labels == label).nonzero()[:16, 0] for label in range(5)]
    images = drawn.all[torch.cat(at)]
    assert torch.equal(labels, drawn.labels[torch.cat(at)])
    tail = fitting.cut.tail(images)
    for channel in range(fitting.rows.shape[1]):
        gate = torch.ones(fitting.rows.shape[1]).double()
        leads = []
        for step in (1e-6, -1e-6):
            gate[channel] = 1 + step
            leads.append(lead(tail.gated(gate), labels))
        torch.testing.assert_close(found[:, channel], (leads[0] - leads[1]) / 2e-6, rtol=1e-5, atol=1e-8)


@torch.no_grad()
def test_at_the_last_site_attributions_add_up_to_the_lead_without_biases(model: nn.Module) -> None:
    fitting = fitting_at(model, "last")
    tail = fitting.cut.linear
    assert tail is not None
    found, labels = fitting.attributions
    logits = tail(fitting.rows)
    rival = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)
    torch.testing.assert_close(found.sum(dim=1) + tail.bias[labels] - tail.bias[rival], lead(logits, labels))


@pytest.mark.parametrize("layer", ["second", "hidden", "last"])
@pytest.mark.parametrize("target", [TARGET, TWO])
def test_channels_of_the_largest_welch_t_are_closed_first(model: nn.Module, layer: str, target: object) -> None:
    fitting = fitting_at(model, layer)
    found, labels = fitting.attributions
    mine = torch.isin(labels, torch.tensor(target.classes)).numpy()  # type: ignore[attr-defined]
    expected = ttest_ind(found.numpy()[mine], found.numpy()[~mine], equal_var=False).statistic
    torch.testing.assert_close(Pruning().scores(fitting, target), torch.as_tensor(expected))  # type: ignore[arg-type]
    width = len(expected)
    for alpha, closed in (
        (0.0, 0),
        (1.0, 1),
        (100 / width, 1),
        (100 / width + 0.1, 2),
        (50.0, -(-width // 2)),
        (100.0, width),
    ):
        gate = gates(fitting, target, alpha)
        assert sorted(set(gate.tolist()) | {0.0, 1.0}) == [0.0, 1.0]
        assert set((gate == 0).nonzero()[:, 0].tolist()) == set((-expected).argsort()[:closed].tolist())


def test_strengths_that_close_the_same_channels_are_one_step() -> None:
    fitting = fitting_at(network(), "last")
    edit = make_method("pruning").fit(fitting, TARGET)
    alphas = [0.0, 0.5, 1.0, 14.0, 15.0, 28.0, 29.0, 100.0]  # of seven channels, one is 14.3 per cent
    changes = [edit.at(alpha).activations for alpha in alphas]
    closed = [7 - int(change(torch.ones(1, 1, 7).double()).sum()) for change in changes if change is not None]
    assert closed == [edit.steps(alpha) for alpha in alphas] == [0, 1, 1, 1, 2, 2, 3, 7]
    assert make_method("head_row").fit(fitting, TARGET).steps(0.3) == 0.3


def test_controls_choose_by_the_mean_or_draw(model: nn.Module) -> None:
    fitting, again, other = (fitting_at(model, "hidden") for _ in range(3))
    object.__setattr__(other, "seed", 1)
    own = fitting.rows[fitting.labels == 1].mean(dim=0) - fitting.rows.mean(dim=0)
    assert gates(fitting, TARGET, 1.0, choose="mean")[own.argmax()] == 0
    drawn = [Pruning("random").scores(one, TARGET) for one in (fitting, again, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert [Pruning(choice).draws for choice in ("attribution", "random", "mean")] == [False, True, False]


def test_pruning_refuses_too_few_images_and_an_unknown_choice(model: nn.Module) -> None:
    fitting = fitting_at(model, "last")
    keep = torch.cat([(fitting.labels == 1).nonzero()[:1, 0], (fitting.labels != 1).nonzero()[:, 0]])
    few = Fitting(fitting.cut, fitting.rows[keep], fitting.labels[keep], 5)
    with pytest.raises(UserError, match="Pruning needs two train images of one and two others, and there are fewer"):
        make_method("pruning").fit(few, TARGET)
    with pytest.raises(UserError, match="choose=most of pruning is unknown; choose attribution, random, mean"):
        make_method("pruning", {"choose": "most"})
    inner = fitting_at(model, "hidden")
    without = Fitting(inner.cut, inner.rows, inner.labels, 5)
    with pytest.raises(UserError, match="At the site hidden this edit method needs train images to run again"):
        make_method("pruning").fit(without, TARGET)
