"""Adam for matrices that lie column after column."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class Adam(torch.optim.Adam):
    """torch's fused Adam, without weight decay, and without a copy of every gradient that is not row after row.

    The fused kernel for CPUs makes such a copy and has no use for it, which takes as long as the step itself. So it is
    given the transposes of what lies column after column.

    Args:
        params: tensors or groups of them. lr: rate.

    Source: Kingma & Ba 2015 (arXiv 1412.6980).
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; what the closure returns, which Lightning has compute gradients first."""
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
    """The tensor or its transpose, whichever lies row after row."""
    return tensor if tensor.ndim < 2 or tensor.is_contiguous() else tensor.mT
