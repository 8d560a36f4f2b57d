"""The head and the map of a network of which nothing is known, found by running it once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from salve.backbones.probe import Head, can_read, outputs_of, own_size, probed_head
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


def convolution(*behind: nn.Module) -> nn.Module:
    """A head that is a 1 × 1 convolution behind an average."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 5, 1), *behind
    )


class Block(nn.Module):
    """A branch beside a convolution, added to it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside, self.act = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.first(images)
        x += self.beside(images)
        act: Tensor = self.act(x)
        return act


class Branches(nn.Module):
    """Its last map is that behind both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.block(images).mean(dim=(2, 3)))
        return logits


class Copied(nn.Sequential):
    """Logits in a tensor of their own."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 64 * 64, 5))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = super().forward(images)
        return logits.clone()


class Averaged(nn.Module):
    """An average that leaves an axis of one position behind."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.average, self.head = nn.Linear(3, 16), nn.AdaptiveAvgPool1d(1), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images.mean(dim=(2, 3)))[:, :, None].expand(-1, -1, 3)
        logits: Tensor = self.head(self.average(x).flatten(1))
        return logits


EXPECTED: dict[str, tuple[Callable[[], nn.Module], Head]] = {
    "wrapped": (Wrapped, Head("top.head.1", 6, "features", 0)),
    "vector": (Vector, Head("head", 6, "", 0)),
    "cls": (Cls, Head("head", 4, "norm", 1)),
    "mobilenet": (models.mobilenet_v3_small, Head("classifier.3", 1024, "features", 0)),
    "densenet": (models.densenet121, Head("classifier", 1024, "features", 0)),
    "swin": (models.swin_t, Head("head", 768, "permute", 0)),
    "a branch within the last block": (lambda: Branches(), Head("head", 6, "block", 0)),
    "a convolution of one position": (lambda: convolution(nn.Flatten()), Head("3", 16, "1", 0)),
    "a copy of what the head gives": (lambda: Copied(), Head("1", 12288, "", 0)),
    "an average of M = 16 that is no 4 by 4 tokens": (lambda: Averaged(), Head("head", 16, "", 0)),
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


NOT_LINEAR = "This {} does not end in one linear layer ({}"


def flat(*behind: nn.Module) -> nn.Module:
    """A linear head, and what is done to its outputs."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), *behind)


class Pair(nn.Module):
    """Two outputs."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images, images


@pytest.mark.parametrize(
    ("model", "size", "says"),
    [
        (nn.Flatten(), 32, NOT_LINEAR.format("Flatten", "its logits are the outputs of no linear layer or 1 × 1 ")),
        (TwoHeads(), 32, NOT_LINEAR.format("TwoHeads", "it combines the outputs of several, top.head.1, other), so")),
        (
            models.squeezenet1_1(),
            64,
            NOT_LINEAR.format(
                "SqueezeNet", "its last, classifier.1, reads a map and not one vector for each image), so"
            ),
        ),
        (flat(nn.Softmax(1)), 32, NOT_LINEAR.format("Sequential", "it changes the outputs of its last, 1, before it ")),
        (flat(nn.ReLU(inplace=True)), 32, NOT_LINEAR.format("Sequential", "it changes the outputs of its last, 1,")),
        (
            nn.Conv2d(3, 5, 1),
            32,
            NOT_LINEAR.format("Conv2d", "it gives a tensor of shape [2, 5, 32, 32] for two images"),
        ),
        (Pair(), 32, NOT_LINEAR.format("Pair", "it gives a tuple and no tensor of logits")),
        (Cls(), 4, "This Cls cannot read 4 × 4 images (RuntimeError: "),
    ],
)
def test_what_has_no_such_head_is_refused_in_a_sentence(model: nn.Module, size: int, says: str) -> None:
    with pytest.raises(UserError) as error:
        probed_head(model, size)
    assert str(error.value).startswith(says)


def test_the_layer_that_is_found_makes_the_logits_and_gates_them_as_law_1_has_it() -> None:
    model = convolution(nn.Flatten()).double()
    layer: nn.Conv2d = model.get_submodule(probed_head(model, 64).reader)  # type: ignore[assignment]
    images, gate = torch.randn(2, 3, 64, 64).double(), torch.rand(16).double()
    activations: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: activations.append(inputs[0]))
    logits = model(images)
    assert activations[0].shape == (2, 16, 1, 1)
    expected = (activations[0].flatten(1) * gate) @ layer.weight.flatten(1).T + layer.bias  # type: ignore[operator]
    with torch.no_grad():
        layer.weight.mul_(gate[None, :, None, None])
    torch.testing.assert_close(model(images), expected)
    assert not torch.allclose(logits, expected)


# -- sizes


class Fixed(nn.Module):
    """Reads images of one size and says so, or does not."""

    def __init__(self, size: int, **said: object) -> None:
        super().__init__()
        self.head = nn.Linear(3 * size * size, 5)
        for name, value in said.items():
            setattr(self, name, value)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.flatten(1))
        return logits


class Config:
    """As networks of transformers have it."""

    def __init__(self, image_size: object) -> None:
        self.image_size = image_size


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (Fixed(32), 32),
        (Fixed(96), 96),
        (Fixed(40, image_size=40), 40),
        (Fixed(40, pretrained_cfg={"input_size": (3, 40, 40)}), 40),
        (Fixed(40, config=Config(40)), 40),
        (Fixed(40, config=Config([40, 40])), 40),
        (Fixed(40), 224),  # none of the usual ones: what is wrong with 224 is then said
        (models.mobilenet_v3_small(), 224),
    ],
)
def test_the_size_that_a_network_is_made_for(model: nn.Module, size: int) -> None:
    modes = [module.training for module in model.modules()]
    assert own_size(model) == size
    assert can_read(model, size) == (not isinstance(model, Fixed) or model.head.in_features == 3 * size * size)
    assert [module.training for module in model.modules()] == modes


def test_the_outputs_are_counted() -> None:
    assert outputs_of(TwoHeads()) == 5
    with pytest.raises(UserError, match="This Pair does not give one vector of logits for each image"):
        outputs_of(Pair())
