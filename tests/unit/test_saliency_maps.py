"""Maps at sites inside a network: a latent's own against a loop, Grad-FAM against plain autograd."""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import SwinTransformer, VisionTransformer

from salve.backbones import Site, find_site, graph_of, sites
from salve.data.transforms import Preprocess
from salve.sae.models import SAE, make_sae
from salve.saliency import grad_cam, grad_fam, maximise, own_maps
from salve.saliency.cells import enlarge
from salve.saliency.graph_maps import map_for, map_of_site
from salve.saliency.own_maps import rows_at
from salve.types import UserError

SIZE = 32
LATENTS = [4, 0, 2]


class Small(nn.Module):
    """Two convolutions, a squeeze and excitation between them, pooling and a head; oblong maps if asked for."""

    def __init__(self, stride: tuple[int, int] = (4, 4), channels: int = 6) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 5, stride, padding=2)
        self.squeeze, self.excite = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)
        self.second = nn.Conv2d(channels, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = self.second(x * gate).relu()
        return self.fc(self.third(x).relu().mean((2, 3)))


def small(**settings: Any) -> Small:
    torch.manual_seed(0)
    return Small(**settings).eval().double()


@cache  # an export takes a second
def vit() -> nn.Module:
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=SIZE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=12, mlp_dim=16, num_classes=4
    )
    nn.init.normal_(model.class_token)
    return model.eval().double()


def sae_for(site: Site, variant: str = "linear_l1", d: int = 6) -> SAE:
    generator = torch.Generator().manual_seed(0)
    sae: Any = make_sae(variant, site.width, d, generator, **({"k": 2} if variant == "topk" else {})).eval()
    with torch.no_grad():
        sae.encoder.copy_(torch.randn(sae.encoder.shape, generator=generator))
        sae.b_dec.copy_(0.1 * torch.randn(site.width, generator=generator))
        if sae.has_bias:
            sae.bias.copy_(0.1 * torch.randn(d, generator=generator))
    return sae.double()


def images_of(count: int, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def read_by(model: nn.Module, path: str, images: Tensor) -> Tensor:
    """What a module is given."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images)
    hook.remove()
    return seen[0]


def plainly(cells: Tensor) -> Tensor:
    """Maps ``[N, L, h, w]`` whose cells divide the image evenly, enlarged by PyTorch."""
    return F.interpolate(cells, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


@pytest.mark.parametrize("variant", ["linear_l1", "relu_l1", "topk"])
@pytest.mark.parametrize("sign", [1, -1])
def test_own_maps_at_tokens_are_those_of_a_loop(variant: str, sign: int) -> None:
    model, images = vit(), images_of(3)
    site = find_site(model, "encoder.layers.encoder_layer_1.mlp.3", SIZE)
    assert (site.positions, site.prefix_tokens) == ((17,), 1)
    sae, tokens = sae_for(site, variant), read_by(model, site.name, images)
    cells = torch.zeros(3, len(LATENTS), 4, 4, dtype=torch.float64)
    for n in range(3):
        for position in range(16):
            z = sae.encode(tokens[n, 1 + position][None])[0]
            for place, latent in enumerate(LATENTS):
                cells[n, place, position // 4, position % 4] = (sign * z[latent]).clamp_min(0)
    maps = own_maps(model, site.name, sae, images, LATENTS, signs=torch.full((3,), sign))
    assert not maps.requires_grad
    torch.testing.assert_close(maps, plainly(cells).detach(), rtol=1e-9, atol=1e-12)
    if sign > 0 or variant == "linear_l1":
        assert maps.amax(dim=(0, 2, 3)).gt(0).any()


def test_own_maps_of_a_convolution_lie_where_its_cells_look() -> None:
    model, images = small(), images_of(2)
    site = find_site(model, "second", SIZE)
    sae, given = sae_for(site, "relu_l1"), read_by(model, "second", images)
    assert given.shape[2:] == site.positions == (8, 8)
    maps = own_maps(model, "second", sae, images, LATENTS)
    # With a kernel of 5 and a padding of 2, cell (i, j) is centred at pixel (4 i, 4 j).
    for n in range(2):
        for i in range(8):
            for j in range(8):
                z = sae.encode(given[n, :, i, j][None])[0, LATENTS]
                torch.testing.assert_close(maps[n, :, 4 * i, 4 * j], z.detach(), rtol=1e-9, atol=1e-12)


def test_a_map_may_be_oblong_and_have_one_channel() -> None:
    model, images = small(stride=(4, 8), channels=1), images_of(2)
    site = find_site(model, "second", SIZE)
    assert (site.positions, site.width) == ((8, 4), 1)
    sae = sae_for(site)
    given = read_by(model, "second", images)
    maps = own_maps(model, "second", sae, images, [3])
    expected = sae.encode(given.permute(0, 2, 3, 1).reshape(-1, 1))[:, 3].view(2, 8, 4).relu().detach()
    torch.testing.assert_close(maps[:, 0, ::4, ::8], expected, rtol=1e-9, atol=1e-12)
    assert grad_fam(model, "second", sae, images, [3]).shape == (2, 1, SIZE, SIZE)


def swin() -> nn.Module:
    torch.manual_seed(0)
    return SwinTransformer([4, 4], 12, [2], [2], [4, 4], num_classes=4).eval().double()


@pytest.mark.slow
def test_positions_in_shifted_windows_are_put_back_in_their_places() -> None:
    model, images = swin(), images_of(2, 64)
    # Their order in windows, which the network shifts first, and their order in the map that it makes of them.
    site, plain = (find_site(model, f"features.1.1.{name}", 64) for name in ("attn.proj", "mlp.0"))
    graph = graph_of(model, 64)
    assert site.positions != plain.positions or site.in_graph != plain.in_graph
    found = map_of_site(model, graph, site)
    assert found is not None
    assert found.grid.shape == plain.positions == (16, 16)
    assert not torch.equal(found.grid.order, torch.arange(256))
    # The places are those of the module's own output, which torchvision puts back itself.
    attention: Any = model.get_submodule("features.1.1.attn")
    seen: list[Tensor] = []
    hook = attention.register_forward_hook(lambda _, __, output: seen.append(output))
    model(images)
    hook.remove()
    rows = graph.activations(model, site, images)  # read by attn.proj, which works on each position alone
    projected = F.linear(rows, attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(found.grid.maps(projected).permute(0, 2, 3, 1), seen[0], rtol=1e-9, atol=1e-12)


def test_what_a_mixer_mixes_over_are_no_positions_of_the_image() -> None:
    torch.manual_seed(0)
    model: Any = timm.models.mlp_mixer.MlpMixer(img_size=SIZE, patch_size=8, num_blocks=1, embed_dim=16, num_classes=4)
    model.eval().double()
    tokens, channels = (find_site(model, f"blocks.0.{name}.fc1", SIZE) for name in ("mlp_tokens", "mlp_channels"))
    assert tokens.positions == channels.positions == (16,)  # both would do for 4 × 4 cells
    images = images_of(1)
    with pytest.raises(UserError, match=r"positions of the site blocks\.0\.mlp_tokens\.fc1 are no grid of the image"):
        own_maps(model, tokens.name, sae_for(tokens), images, [0])
    assert own_maps(model, channels.name, sae_for(channels), images, [0]).shape == (1, 1, SIZE, SIZE)
    # Grad-FAM has the last map in front of it.
    assert grad_fam(model, tokens.name, sae_for(tokens), images, range(6)).gt(0).any()


def pooled_by_hand(sae: SAE, rows: Tensor, latent: int, pool: str) -> Tensor:
    """An image's latent from ``[P, M]``."""
    values = torch.stack([sae.encode(row[None])[0, latent] for row in rows])
    return values.mean() if pool == "mean" else values.max()


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("variant", ["relu_l1", "topk"])
@pytest.mark.parametrize("at", [None, "first", "site"])
def test_grad_fam_of_a_pooled_latent_is_what_autograd_gives(
    at: str | None, variant: str, pool: Literal["mean", "max"]
) -> None:
    model, images = small(), images_of(2)
    site = find_site(model, "third", SIZE)
    sae = sae_for(site, variant)
    chosen: Any = find_site(model, "second", SIZE) if at == "site" else at
    maps = grad_fam(model, "third", sae, images, LATENTS, chosen, pool=pool)
    assert maps.gt(0).any()
    for n, image in enumerate(images):
        for place, latent in enumerate(LATENTS):
            kept: dict[str, Tensor] = {}

            def keep(name: str, value: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
                kept[name] = value
                value.retain_grad()
                return value.clone()

            hooks = [
                model.first.register_forward_hook(lambda _, __, out, keep=keep: keep("first", out)),
                model.second.register_forward_pre_hook(lambda _, given, keep=keep: (keep("site", given[0]),)),
                model.third.register_forward_pre_hook(lambda _, given, keep=keep: (keep("None", given[0]),)),
            ]
            model(image[None])
            for hook in hooks:
                hook.remove()
            rows = kept["None"][0].flatten(1).T
            pooled_by_hand(sae, rows, latent, pool).backward()
            value, gradient = kept[str(at)], kept[str(at)].grad
            assert gradient is not None
            expected = (gradient.mean((2, 3))[0][:, None, None] * value[0]).sum(0).relu()
            torch.testing.assert_close(maps[n, place, ::4, ::4], expected.detach(), rtol=1e-8, atol=1e-12)
            model.zero_grad()


@pytest.mark.parametrize("variant", ["linear_l1", "relu_l1", "topk"])
@pytest.mark.parametrize("make", [small, vit])
def test_at_the_site_itself_the_closed_form_is_the_gradient(
    make: Callable[[], nn.Module], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = make(), images_of(2)
    name = "third" if isinstance(model, Small) else "encoder.layers.encoder_layer_0.mlp.0"
    site = find_site(model, name, SIZE)
    sae, signs = sae_for(site, variant), torch.tensor([1, -1, 1, 1, -1, 1])
    closed = grad_fam(model, name, sae, images, range(6), signs=signs)
    # No map is taken for the site itself any more, so that the gradient is used.
    module: Any = importlib.import_module("salve.saliency.grad_fam")
    run_graph = module.run_graph
    monkeypatch.setattr(module, "run_graph", lambda *given: run_graph(*given)._replace(own=None))
    assert closed.gt(0).any()
    torch.testing.assert_close(closed, grad_fam(model, name, sae, images, range(6), signs=signs), rtol=1e-9, atol=1e-12)


def test_a_squeeze_is_seen_on_the_map_that_it_squeezes() -> None:
    model, images = small(), images_of(2)
    site = find_site(model, "squeeze", SIZE)
    assert site.kind == "vector"
    sae = sae_for(site)
    maps = grad_fam(model, "squeeze", sae, images, LATENTS)
    before = model.first(images).relu()
    expected = torch.einsum("lm,nmhw->nlhw", sae.encoder[LATENTS], before).relu() / 64
    assert maps.gt(0).any()
    torch.testing.assert_close(maps[:, :, ::4, ::4], expected.detach(), rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match=r"squeeze is a vector, which has no maps of its own; use grad_fam"):
        own_maps(model, "squeeze", sae, images, [0])


def test_the_last_vector_can_be_seen_at_any_site_in_front() -> None:
    model, images = small(), images_of(2)
    head = find_site(model, "last", SIZE)
    sae = sae_for(head)
    at = find_site(model, "third", SIZE)
    seen = grad_fam(model, "last", sae, images, LATENTS, at)
    expected = grad_fam(model, "last", sae, images, LATENTS)  # behind the third convolution
    assert seen.gt(0).any()
    assert not torch.allclose(seen, expected)
    tensor = read_by(model, "third", images).detach().requires_grad_()
    latents = sae.encode(model.third(tensor).relu().mean((2, 3)))[:, LATENTS].sum(0)
    for place, latent in enumerate(latents):
        (gradient,) = torch.autograd.grad(latent, tensor, retain_graph=True)
        by_hand = torch.einsum("nk,nkhw->nhw", gradient.mean((2, 3)), tensor).relu()
        torch.testing.assert_close(seen[:, place, ::4, ::4], by_hand.detach(), rtol=1e-8, atol=1e-12)


class ClassToken(nn.Module):
    """Tokens of which a layer in the middle reads the class token alone, and that token behind a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.only, self.fc = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), 1, 8), x], dim=1)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.fc(self.only(x[:, :1]).relu()[:, 0])


def test_the_default_map_of_a_class_token_is_one_that_it_depends_on() -> None:
    torch.manual_seed(0)
    model, images = ClassToken().eval().double(), images_of(2)
    site = find_site(model, "only", SIZE)
    assert site.kind == "vector"
    sae = sae_for(site)
    assert grad_fam(model, "only", sae, images, range(6)).gt(0).any()
    graph = graph_of(model, SIZE)
    assert map_for(model, graph, site).grid.shape == (4, 4)
    with pytest.raises(UserError, match=r"cannot use the output of norm, .* site only does not depend on .* leave at"):
        grad_fam(model, "only", sae, images, [0], at="norm")
    with pytest.raises(UserError, match="only is a vector"):
        own_maps(model, "only", sae, images, [0])


def test_swapping_the_pool_changes_what_is_maximised() -> None:
    model = small().float()
    sae, preprocess = sae_for(find_site(model, "third", SIZE), "relu_l1").float(), Preprocess(SIZE, None)
    nn.init.constant_(sae.bias, -50.0)  # silent everywhere
    found: dict[str, Any] = {
        pool: maximise(model, "third", sae, [1, 2], preprocess, size=SIZE, steps=10, pool=pool)
        for pool in ("mean", "max")
    }
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in (preprocess.mean, preprocess.std))
    for pool, result in found.items():
        assert (result.final_values > result.start_values).all()
        rows = read_by(model, "third", (result.images - mean) / std).flatten(2).transpose(1, 2)
        for n, latent in enumerate([1, 2]):
            values = torch.stack([sae.pre_activations(row[None])[0, latent] for row in rows[n]])
            expected = values.mean() if pool == "mean" else values.max()
            torch.testing.assert_close(result.final_values[n], expected.detach(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["mean"].images, found["max"].images)


def test_a_model_in_train_mode_is_left_as_found() -> None:
    model = small().train()
    images, sae = images_of(1), make_sae("linear_l1", 8, 4).double()
    own_maps(model, "third", sae, images, [0])
    with torch.inference_mode():
        grad_fam(model, "third", sae, images, torch.tensor([0]), at="first", signs=torch.tensor([-1]))
        own_maps(model, "third", sae, images, torch.tensor([0]))
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layer", "at", "message"),
    [
        ("third", "nowhere", r"^at=nowhere is no module of this Small; leave at out .* third\.$"),
        ("third", "fc", r"The output of fc has the shape \[1, 4\], whose positions are no grid"),
        ("second", "third", r"cannot use the output of third, because the activation of site second does not depend"),
        ("third", "squeeze", r"The output of squeeze has the shape \[1, 3, 1, 1\], whose positions are no grid"),
        ("third", Site("gone", (), 3), r"at=gone is no site of this Small for images of 32 pixels"),
    ],
)
def test_a_wrong_place_is_refused(layer: str, at: Any, message: str) -> None:
    model = small()
    with pytest.raises(UserError, match=message):
        grad_fam(model, layer, sae_for(find_site(model, layer, SIZE)), images_of(1), [0], at)


def test_a_vector_in_front_is_no_map() -> None:
    model = small()
    at = sites(model, SIZE)["squeeze"]
    with pytest.raises(UserError, match=r"positions of at=squeeze are no grid of the image"):
        grad_fam(model, "third", sae_for(find_site(model, "third", SIZE)), images_of(1), [0], at)


@pytest.mark.parametrize("see", [grad_fam, own_maps])
def test_bad_arguments_at_a_map_are_refused(see: Callable[..., Tensor]) -> None:
    model, images = small(), images_of(1)
    sae = sae_for(find_site(model, "third", SIZE))
    with pytest.raises(UserError, match="SAE reads 8 channels, but the site second has 6"):
        see(model, "second", sae, images, [0])
    with pytest.raises(UserError, match=r"square images"):
        see(model, "third", sae, torch.zeros(1, 3, SIZE, 2 * SIZE, dtype=torch.float64), [0])
    with pytest.raises(UserError, match="Latent 6 does not exist"):
        see(model, "third", sae, images, [6])
    with torch.no_grad():
        model.first.weight[0, 0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="activation at site third is NaN or infinite"):
        see(model, "third", sae, images, [0])


class NoMap(nn.Module):
    """A network on flattened pixels: no tensor in it is a map."""

    image_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Linear(3 * SIZE * SIZE, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.second(self.first(images.flatten(1)).relu()).relu())


@pytest.mark.parametrize("layer", ["last", "second"])
def test_a_network_without_a_map_says_so(layer: str) -> None:
    torch.manual_seed(0)
    model, images = NoMap().eval().double(), images_of(1)
    site = find_site(model, layer, SIZE)
    with pytest.raises(UserError, match=f"no spatial map in front of its site {site.name}"):
        grad_fam(model, layer, sae_for(site), images, [0])


@pytest.mark.parametrize("layer", ["third", "last"])
def test_grad_cam_of_a_class_is_that_of_plain_autograd(layer: str) -> None:
    model, images = small(), torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0] if layer == "third" else output)

    # What the third convolution reads is the site itself. What it gives is the last map in front of the head.
    hook = model.third.register_forward_hook(keep)
    logits = model(images.requires_grad_())
    hook.remove()
    found = grad_cam(model, layer, images.detach(), [3, 1])
    for place, k in enumerate([3, 1]):
        (gradient,) = torch.autograd.grad(logits[:, k].sum(), seen[0], retain_graph=True)
        raw = (gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1, keepdim=True).relu().detach()
        site = find_site(model, "third", SIZE)
        _, _, cells = rows_at(model, site, images.detach())
        torch.testing.assert_close(found[:, place : place + 1], enlarge(raw, cells, (SIZE, SIZE)))


def test_grad_cam_needs_a_map() -> None:
    with pytest.raises(UserError, match="the site excite is a vector inside the network"):
        grad_cam(small(), "excite", torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64), [0])
