"""The head and the map of a network of which nothing is known, found by running it once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from salve.backbones.probe import Head, probed_head
from salve.types import UserError


class Wrapped(nn.Module):
    """Convolutions, a mean, and a head inside other modules, as people write them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.top = nn.ModuleDict({"head": nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 5), nn.Flatten())})

    def forward(self, images: Tensor) -> Tensor:
        head: nn.Module = self.top["head"]
        logits: Tensor = head(self.features(images).mean(dim=(2, 3)))
        return logits


class Vector(nn.Module):
    """Only linear layers, which have no map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 6), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.first(images.mean(dim=(2, 3))).relu())
        return logits


class TwoHeads(Wrapped):
    """The mean of two heads, as distilled transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images).mean(dim=(2, 3))
        head: nn.Module = self.top["head"]
        logits: Tensor = (head(x) + self.other(x)) / 2
        return logits


class Cls(nn.Module):
    """A head on the first token behind one block of attention: the image's tokens behind it have no influence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cls = nn.Conv2d(3, 4, 8, stride=8), nn.Parameter(torch.randn(1, 1, 4))
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 1, batch_first=True)
        self.last, self.head = nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], dim=1)
        tokens = self.norm(x)
        x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        logits: Tensor = self.head(self.last(x)[:, 0])
        return logits


EXPECTED: dict[str, tuple[Callable[[], nn.Module], Head]] = {
    "wrapped": (Wrapped, Head("top.head.1", 6, "features", 0)),
    "vector": (Vector, Head("head", 6, "", 0)),
    "cls": (Cls, Head("head", 4, "norm", 1)),
    "mobilenet": (models.mobilenet_v3_small, Head("classifier.3", 1024, "features", 0)),
    "densenet": (models.densenet121, Head("classifier", 1024, "features", 0)),
    "swin": (models.swin_t, Head("head", 768, "permute", 0)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_head_and_the_map(name: str) -> None:
    make, expected = EXPECTED[name]
    assert probed_head(make(), 64) == expected


def test_the_network_stays_as_it_was() -> None:
    model = Wrapped().requires_grad_(False)
    model.features.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    probed_head(model, 32)
    assert [module.training for module in model.modules()] == [True, False, False, False, *[True] * 5]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_the_caller_takes_no_gradients(mode: Callable[[], torch.no_grad]) -> None:
    model = Wrapped()
    with mode():
        assert probed_head(model, 32).map == "features"


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [
        (nn.Flatten(), 32, "This Flatten does not end in one linear layer, so it has no site."),
        (TwoHeads(), 32, "This TwoHeads does not end in one linear layer, so it has no site."),
        (models.squeezenet1_1(), 64, "This SqueezeNet does not end in one linear layer, so it has no site."),
        (Cls(), 4, "This Cls cannot read 4 × 4 images (RuntimeError: "),
    ],
)
def test_what_has_no_such_head_is_refused_in_a_sentence(model: nn.Module, size: int, says: str) -> None:
    with pytest.raises(UserError) as error:
        probed_head(model, size)
    assert str(error.value).startswith(says)
