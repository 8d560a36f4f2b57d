"""Sites: names, readers, and activations, which are what the head receives in a forward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import VisionTransformer, resnet18, squeezenet1_1

from salve.backbones import Reader, Site, find_site, graph_of, head_site, site_activations, sites
from salve.types import UserError

Tiny = Callable[[str], nn.Module]


def last(name: str, reader: str, width: int, map: str, map_side: Any = "output", prefix_tokens: int = 0) -> Site:
    aliases = ("last", reader)
    return Site(
        name, (Reader(f"{reader}.weight"),), width, aliases, prefix_tokens=prefix_tokens, map=map, map_side=map_side
    )


#: What each backbone's last site is: name, reader, width, map, side of the map, prefix tokens.
EXPECTED = {
    "resnet18": last("avgpool", "fc", 512, "avgpool", "input"),
    "resnet50": last("avgpool", "fc", 2048, "avgpool", "input"),
    "vit": last("cls", "heads.head", 16, "encoder.layers.encoder_layer_1.ln_1", "output", 1),
    "timm resnet10t": last("global_pool", "fc", 32, "global_pool", "input"),
    "timm test_vit": last("cls", "head", 64, "blocks.5.norm1", "output", 1),
    "timm efficientnet": last("global_pool", "classifier", 1280, "global_pool", "input"),
    "timm convnext": last("global_pool", "head.fc", 320, "head.global_pool", "input"),
    "timm dinov2 registers": last("cls", "head", 384, "blocks.1.norm1", "output", 5),
}


def batch(name: str) -> Tensor:
    size = 28 if name == "timm dinov2 registers" else 32
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def torchvision_resnet(model: Any, images: Tensor) -> Tensor:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    return torch.flatten(model.avgpool(model.layer4(model.layer3(model.layer2(model.layer1(x))))), 1)


def torchvision_vit(model: Any, images: Tensor) -> Tensor:
    tokens = model._process_input(images)
    cls = model.class_token.expand(len(images), -1, -1)
    return model.encoder(torch.cat([cls, tokens], dim=1))[:, 0]


def timm_pre_logits(model: Any, images: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(images), pre_logits=True)


BY_HAND = {
    "resnet18": torchvision_resnet,
    "resnet50": torchvision_resnet,
    "vit": torchvision_vit,
    **{name: timm_pre_logits for name in EXPECTED if name.startswith("timm")},
}

every_backbone = pytest.mark.parametrize("name", EXPECTED)


@every_backbone
def test_the_last_site_of_each_backbone(tiny: Tiny, name: str) -> None:
    assert head_site(tiny(name)) == EXPECTED[name]


@every_backbone
@torch.no_grad()
def test_activations_are_what_a_computation_by_hand_gives(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    site = find_site(model, "last")
    activations = site_activations(model, site, batch(name))
    assert activations.shape == (3, EXPECTED[name].width)
    assert torch.equal(activations, BY_HAND[name](model, batch(name)))
    assert not torch.allclose(activations[0], activations[1])


@every_backbone
@torch.no_grad()
def test_the_head_turns_them_into_the_models_own_logits(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    site = find_site(model, "last")
    logits = model.get_submodule(site.readers[0].path)(site_activations(model, site, batch(name)))
    assert torch.equal(logits, model(batch(name)))
    assert logits.std() > 0


@every_backbone
@torch.no_grad()
def test_law_1_scaling_the_readers_input_channels_is_gating_the_activation(tiny: Tiny, name: str) -> None:
    model = tiny(name).double()
    site = find_site(model, "last")
    images = batch(name).double()
    gate = torch.rand(site.width, dtype=torch.float64)
    gate[::3] = 0

    def gated(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0] * gate,)

    hooks = [model.get_submodule(reader.path).register_forward_pre_hook(gated) for reader in site.readers]
    expected = model(images)
    for hook in hooks:
        hook.remove()
    before = model(images)
    for reader in site.readers:
        head: Any = model.get_submodule(reader.path)
        head.weight.mul_(gate)
    torch.testing.assert_close(model(images), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before, expected)


@every_backbone
@torch.no_grad()
def test_the_map_is_where_the_site_says(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    site = find_site(model, "last")
    seen: list[Tensor] = []
    hook = model.get_submodule(site.map).register_forward_hook(
        lambda _, inputs, output: seen.append(inputs[0] if site.map_side == "input" else output)
    )
    activations = site_activations(model, site, batch(name))
    hook.remove()
    if site.prefix_tokens:
        tokens = seen[0].shape[1] - site.prefix_tokens
        assert int(tokens**0.5) ** 2 == tokens  # the patches alone make a square
    elif name == "timm convnext":
        assert seen[0].shape[:2] == (3, site.width)  # a LayerNorm follows the pooling, so the means are not equal
    else:
        torch.testing.assert_close(seen[0].mean((2, 3)), activations)


def test_gradients_flow_to_the_images_unless_the_caller_forbids(tiny: Tiny) -> None:
    model = tiny("resnet18")
    images = batch("resnet18").requires_grad_()
    site_activations(model, find_site(model, "last"), images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_reading_leaves_no_hook_behind_even_after_an_error(tiny: Tiny) -> None:
    model = tiny("resnet18")
    site = find_site(model, "last")
    site_activations(model, site, batch("resnet18"))
    with pytest.raises(RuntimeError):
        site_activations(model, site, torch.zeros(1, 4, 32, 32))
    head: Any = model.fc
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("name", ["resnet18", "vit", "timm test_vit"])
def test_last_is_the_site_that_the_head_reads_and_a_site_answers_to_its_name(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    assert find_site(model, "last") == find_site(model, EXPECTED[name].name) == EXPECTED[name]
    assert find_site(model, EXPECTED[name].readers[0].path) == EXPECTED[name]


def test_the_sites_of_a_network_are_those_of_its_graph_and_end_with_the_heads(tiny: Tiny) -> None:
    model = tiny("resnet18")
    found = sites(model, 32)
    assert list(found)[:4] == ["layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv1", "layer2.0.conv2"]
    assert list(found.values())[-1] == EXPECTED["resnet18"]
    assert len(found) == 12
    both = [Reader("layer2.0.conv1.weight"), Reader("layer2.0.downsample.0.weight")]
    assert find_site(model, "layer1", 32) == found["layer2.0.conv1"]
    assert [*found["layer2.0.conv1"].readers] == both
    assert graph_of(model, 32) is graph_of(model, 32)  # exported once


@pytest.mark.parametrize(
    ("layer", "near"), [("layer2.0.conv3", "layer2.0.conv2"), ("AVGPOOL", "avgpool"), ("zzz", "avgpool")]
)
def test_a_layer_that_is_no_site_is_answered_with_names_like_it(tiny: Tiny, layer: str, near: str) -> None:
    with pytest.raises(UserError) as refused:
        find_site(tiny("resnet18"), layer, 32)
    assert f"layer={layer} is no site" in str(refused.value)
    assert near in str(refused.value)
    assert "last" in str(refused.value)


class NoGraph(nn.Module):
    """Looks at its numbers to decide what to do, which no graph holds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = images.mean(dim=(2, 3))
        return self.head(self.inner(x if x.sum() > 0 else -x).relu())


def test_a_network_without_a_graph_offers_its_head_and_says_why_it_is_alone() -> None:
    model = NoGraph().eval()
    assert list(sites(model, 8)) == ["head"]
    with pytest.raises(UserError, match=r"layer=inner cannot be found, and the one site known is head .*exported"):
        find_site(model, "inner", 8)


def test_a_vit_that_averages_its_tokens_is_read_behind_the_average() -> None:
    model = timm.create_model("test_vit", img_size=32, num_classes=5, global_pool="avg").eval()
    site = find_site(model, "last")
    assert site.name == "global_pool"
    with torch.no_grad():
        images = batch("vit")
        assert torch.equal(site_activations(model, site, images), timm_pre_logits(model, images))


def head_of_two_layers() -> nn.Module:
    model = resnet18(num_classes=5)
    model.fc = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 5))
    return model


def torchvision_vit_without_a_head() -> nn.Module:
    model = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    model.heads = nn.Identity()
    return model


def vit_without_a_head() -> nn.Module:
    return timm.create_model("test_vit", img_size=32, num_classes=0)


@pytest.mark.parametrize(
    "build",
    [
        torchvision_vit_without_a_head,
        vit_without_a_head,
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5), nn.Softmax(1)),
        lambda: squeezenet1_1(num_classes=5),
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=5),
    ],
    ids=[
        "torchvision no head",
        "timm no head",
        "no known kind",
        "torchvision without a site",
        "two heads",
    ],
)
def test_models_that_do_not_end_in_one_linear_layer_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(UserError) as refused:
        sites(build())
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) > 30


def torchvision_vit_with_a_wrapped_head() -> nn.Module:
    model = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    model.heads = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 5))
    return model


@pytest.mark.parametrize(
    ("build", "reader", "width"),
    [
        (head_of_two_layers, "fc.2", 8),
        (torchvision_vit_with_a_wrapped_head, "heads.1", 16),
        (lambda: timm.create_model("sequencer2d_s", num_classes=5), "head.fc", 384),
        (lambda: timm.create_model("dla46x_c", num_classes=5), "fc", 256),
    ],
    ids=["two layers", "wrapped", "timm's wrapped", "a convolution"],
)
def test_heads_that_lie_elsewhere_are_found(build: Callable[[], nn.Module], reader: str, width: int) -> None:
    model = build()
    site = find_site(model, "last")
    assert (site.readers[0].path, site.width) == (reader, width)
    assert find_site(model, "last") == site


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [
        (nn.DataParallel, r"DataParallel is a wrapper around a ResNet; .* model\.module\."),
        (torch.compile, r"OptimizedModule is a wrapper around a ResNet; .* model\._orig_mod\."),
        (AveragedModel, r"AveragedModel is a wrapper around a ResNet; .* model\.module\."),
    ],
    ids=["DataParallel", "compiled", "averaged"],
)
@pytest.mark.slow
def test_wrapped_models_say_where_the_plain_one_is(
    tiny: Tiny, wrap: Callable[[nn.Module], nn.Module], inside: str
) -> None:
    for name in ("resnet18", "timm resnet10t"):
        wrapped = wrap(tiny(name))
        for find in (sites, lambda model: find_site(model, "last")):
            with pytest.raises(UserError, match=inside):
                find(wrapped)


def test_a_model_on_several_processes_says_where_the_plain_one_is(tiny: Tiny, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(tiny("resnet18"))
        with pytest.raises(UserError, match=r"DistributedDataParallel is a wrapper .* model\.module\."):
            sites(wrapped)
    finally:
        torch.distributed.destroy_process_group()
