"""Adam as it is published and as torch has it, however its parameters lie in memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salve.sae.adam import Adam

#: Shapes, and which lie column after column: decoders, and a stack of decoders.
SHAPES = [((6, 9), True), ((9, 6), False), ((5,), False), ((3, 6, 9), True), ((), False)]


def laid_out(values: Tensor, columns: bool) -> Tensor:
    return values.mT.contiguous().mT if columns else values


def parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(laid_out(torch.randn(shape, generator=generator), columns)) for shape, columns in SHAPES]


def gradients(steps: int) -> list[list[Tensor]]:
    """For each step; of changing size, since a constant gradient gives steps of its sign only."""
    drawn = [[parameter.detach() for parameter in parameters(10 + step)] for step in range(steps)]
    return [[gradient * 10**-step for gradient in row] for step, row in enumerate(drawn)]


def train(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], steps: list[list[Tensor]]) -> None:
    for row in steps:
        for parameter, gradient in zip(trained, row, strict=True):
            parameter.grad = gradient.clone(memory_format=torch.preserve_format)
        optimizer.step()


def test_steps_are_those_of_the_published_algorithm() -> None:
    trained = parameters(0)
    expected = [parameter.detach().double() for parameter in trained]
    first = [torch.zeros_like(value) for value in expected]
    second = [torch.zeros_like(value) for value in expected]
    for step, row in enumerate(gradients(4), start=1):
        for index, gradient in enumerate(row):
            first[index] = 0.9 * first[index] + 0.1 * gradient.double()
            second[index] = 0.999 * second[index] + 0.001 * gradient.double() ** 2
            unbiased = first[index] / (1 - 0.9**step), second[index] / (1 - 0.999**step)
            expected[index] = expected[index] - 0.02 * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    train(Adam(trained, lr=0.02), trained, gradients(4))
    for parameter, right in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), right, rtol=1e-5, atol=1e-6)


def test_its_state_is_that_of_torch_s_adam_and_goes_on() -> None:
    steps = gradients(6)
    ours, theirs = parameters(0), parameters(0)
    begun, other = Adam(ours, lr=0.02), torch.optim.Adam(theirs, lr=0.02)
    train(begun, ours, steps[:3])
    train(other, theirs, steps)
    resumed = Adam(ours, lr=1.0)
    resumed.load_state_dict(begun.state_dict())
    train(resumed, ours, steps[3:])
    torch.testing.assert_close(ours, theirs)
    for mine, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(dict(resumed.state[mine]), dict(other.state[their]))
        assert resumed.state[mine]["exp_avg"].stride() == mine.stride()


def test_a_parameter_without_a_gradient_stays_and_a_closure_is_asked_first() -> None:
    trained, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Adam([trained, idle], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        trained.square().sum().backward()
        return 7.0

    assert optimizer.step(closure) == 7.0
    torch.testing.assert_close(trained.detach(), torch.full((2,), 0.9))
    assert torch.equal(idle.detach(), torch.ones(2))


@pytest.mark.parametrize("columns", [False, True])
def test_no_gradient_is_copied(columns: bool) -> None:
    """What the class is there for: torch's fused Adam copies what lies column after column."""
    parameter = nn.Parameter(laid_out(torch.randn(6, 9), columns))
    copied = []
    fused: dict[str, Any] = {"fused": True}
    for optimizer in (Adam([parameter], lr=0.1), torch.optim.Adam([parameter], lr=0.1, **fused)):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        with torch.profiler.profile() as profile:
            optimizer.step()
        copied.append(any(event.key == "aten::clone" for event in profile.key_averages()))
    assert copied == [False, columns]
