# SPDX-License-Identifier: MIT
"""Adam for parameters stored column by column."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam(torch.optim.Adam):
    """torch's fused Adam without weight decay, and without the kernel's copies of column-major matrices.

    torch's fused CPU kernel first copies every tensor that is not stored row by row. The copy takes as long as the step
    itself. This class passes the transposes of column-major matrices instead, which are stored row by row. Adam treats
    every number by itself, so the result is the same.

    Args:
        params: tensors or parameter groups. lr: learning rate.

    Source: Kingma & Ba 2015 (arXiv 1412.6980).
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what the closure returns, which Lightning uses to compute the gradients first."""
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self._state_of(parameter) for parameter in trained]
            beta1, beta2 = group["betas"]
            adam(
                [_rows(parameter) for parameter in trained],
                [_rows(parameter.grad) for parameter in trained],
                [_rows(state["exp_avg"]) for state in states],
                [_rows(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
        return returned

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def _rows(tensor: Tensor) -> Tensor:
    """The tensor or its transpose, whichever is stored row by row."""
    return tensor if tensor.ndim < 2 or tensor.is_contiguous() else tensor.mT
