"""A small network with gates and additions that share tensors, for tests of edits that are stacked."""

import torch
from torch import nn

from salve.backbones import Site
from salve.backbones.site import Reader
from salve.editing import AdditionFile, Edit, EditFile, GateFile, NewWeights, make_additions, make_edit_files
from salve.sae import make_sae

State = dict[str, torch.Tensor]
SITE = Site("pool", (Reader("2.weight"),), 6)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Two layers and BatchNorm, in float32, with values that ``dtype`` holds exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)).eval()
    model.load_state_dict(cast(cast(model.state_dict(), dtype), torch.float32))
    return model


def cast(state: State, dtype: torch.dtype) -> State:
    """The floating-point tensors in another dtype."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def bits(state: State) -> dict[str, tuple[torch.dtype, bytes]]:
    """What tells two states apart."""
    return {name: (t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in state.items()}


def new_weights(model: nn.Module) -> list[NewWeights]:
    """Steering of a bias, an ablation in the head, and fine-tuning of all that float32 can train."""
    draw = torch.Generator().manual_seed(1)

    def moved(names: list[str]) -> State:
        return {name: model.state_dict()[name] + torch.randn(shapes[name], generator=draw) for name in names}

    shapes = {name: t.shape for name, t in model.state_dict().items()}
    everything = [name for name, t in model.state_dict().items() if t.is_floating_point()]
    return [
        NewWeights(moved(["2.bias"]), "tench", "steering", 1.0, "pool"),
        NewWeights(moved(["2.weight", "2.bias"]), "church", "directional ablation", 0.5, "pool"),
        NewWeights(moved(everything), "", "fine-tuning", 1.0, ""),
    ]


def additions(model: nn.Module) -> list[AdditionFile]:
    """The edit files of :func:`new_weights`."""
    return make_additions(model, new_weights(model), "two layers")


def gates(model: nn.Module) -> list[GateFile]:
    """Two edits of latents that scale the head's weights."""
    sae = make_sae("linear_l1", 6, 2, torch.Generator().manual_seed(0))
    named = [("gas pump", [Edit(0, 0.5)]), ("church", [Edit(1, 1.5)])]
    return make_edit_files(model, SITE, sae, named, "two layers")


def several(model: nn.Module) -> list[EditFile]:
    """Gates and additions, most of which change the same tensors."""
    return [*gates(model), *additions(model)]
