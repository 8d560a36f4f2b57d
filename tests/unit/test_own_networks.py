"""A network of the user's own: made by a class or function, loaded, prepared for, and not made for a stranger."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from salve.backbones import find_site, load_backbone, preset
from salve.backbones.load import code_of
from salve.run.schema import Config
from salve.settings import BackboneSettings
from salve.types import UserError

CODE = '''
import torch
from torch import nn


class Net(nn.Module):
    """Logits among other things, behind a wrapped head."""

    def __init__(self, num_classes, width=8, size=32):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(width, num_classes))

    def forward(self, images):
        return {"logits": self.head(self.body(images)), "images": images}


class Softmax(Net):
    def forward(self, images):
        return super().forward(images)["logits"].softmax(1)


def of_seven():
    return Net(7)


def of_some(classes):
    return Net(classes)


def half():
    return Net(5).half()


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(5))


def flat(num_classes, side=48):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * side * side, num_classes))


def says(num_classes):
    net = flat(num_classes, 50)
    net.image_size = 50
    return net


def broken():
    return Net(5).nothing


def number():
    return 3


instance = Net(5)
constant = 3


def diverged():
    net = Net(5)
    net.head[1].bias.data[0] = float("nan")
    return net
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``mine(name, weights, classes, args, outputs)`` loads a network of a module that lies beside the user's files."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my_nets.py").write_text(CODE)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(__import__("sys").modules, "my_nets", raising=False)

    def load(name: str, weights: Path | str = "random", classes: int = 5, *more: Any) -> Any:
        return load_backbone("own", f"my_nets.{name}", str(weights), classes, *more)

    return load


def saved(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def refusal(load: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(UserError) as refused:
        load(*arguments)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_it_gives_logits_under_its_own_names_and_has_a_site(mine: Callable[..., Any]) -> None:
    model, fits, remark = mine("Net", "random", 6, {"width": 4})
    assert (fits, remark) == (False, "")
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == {
        **{"body.0.weight": [4, 3, 3, 3], "body.0.bias": [4]},
        **{"head.1.weight": [6, 4], "head.1.bias": [6]},
    }
    images = torch.randn(2, 3, 40, 40)
    model.eval()
    logits = model(images)
    assert torch.equal(logits, model.head(model.body(images)))
    site = find_site(model, "last")
    assert (site.readers[0].path, site.width) == ("head.1", 4)
    # A copy, and what is sent to another process, give logits too.
    assert torch.equal(copy.deepcopy(model)(images), logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), logits)


def test_edited_weights_load_into_the_users_own_network(mine: Callable[..., Any]) -> None:
    import my_nets  # type: ignore[import-not-found]

    model = mine("Net").model
    my_nets.Net(5).load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()})


def test_its_weights_follow_the_seed(mine: Callable[..., Any]) -> None:
    mine("Net")  # the first import may draw numbers

    def weights() -> Tensor:
        torch.manual_seed(3)
        tensor: Tensor = mine("Net").model.head[1].weight
        return tensor

    assert torch.equal(weights(), weights())


def test_a_head_of_another_size_is_replaced_where_the_function_takes_no_number_of_classes(
    mine: Callable[..., Any],
) -> None:
    mine("Net")  # the first import may draw numbers
    torch.manual_seed(0)
    theirs = mine("of_seven", "pretrained", 7)
    assert theirs.fits
    torch.manual_seed(0)
    model, fits, remark = mine("of_seven", "pretrained", 5)
    assert not fits
    assert remark.startswith("pretrained: its head of 7 outputs is left out, and one of 5 outputs must be trained")
    assert model.head[1].weight.shape == (5, 8)
    assert torch.equal(model.body[0].weight, theirs.model.body[0].weight)
    assert mine("of_seven", "random", 5).model.head[1].weight.shape == (5, 8)
    assert mine("of_some", "random", 5, {"classes": 7}).model.head[1].weight.shape == (5, 8)
    # Its outputs are kept where the data say which they are.
    model, fits, _ = mine("of_seven", "pretrained", 2, {}, [6, 0])
    assert fits
    assert model.head[1].weight.shape == (7, 8)
    assert "names unit 7, but the head" in refusal(mine, "of_seven", "pretrained", 2, {}, [7, 0])


def test_weights_from_a_file_as_lightning_keeps_them(mine: Callable[..., Any], tmp_path: Path) -> None:
    state = mine("Net", "random", 7).model.state_dict()
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, path)
    model, fits, remark = mine("Net", path, 7)
    assert fits
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert remark == f"{path}: its entry state_dict is read; 'net.' is removed from the names of its tensors."
    assert not mine("Net", path, 3).fits
    assert "another shape for body.0.bias" in refusal(mine, "Net", path, 7, {"width": 3})


def test_half_precision_is_computed_with_in_float32(mine: Callable[..., Any]) -> None:
    assert {tensor.dtype for tensor in mine("half").model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("Nets", {}, "my_nets is there, but has no class or function Nets; did you mean Net?"),
        ("constant", {}, "is a int, not a class or function that makes a network."),
        ("instance", {}, "is a Net, not a class or function that makes a network."),
        ("number", {}, "gives a int, not a torch.nn.Module."),
        ("broken", {}, "cannot be made (AttributeError: 'Net' object has no attribute 'nothing')."),
        ("Net", {"depth": 3}, "cannot be made with backbone.args={'depth': 3, 'num_classes': 5} (TypeError: "),
        ("lazy", {}, "gives a network whose 1.weight has no shape yet"),
    ],
)
def test_what_makes_no_network_is_refused(mine: Callable[..., Any], name: str, args: dict[str, Any], says: str) -> None:
    message = refusal(mine, name, "random", 5, args)
    assert f"backbone._target_=my_nets.{name}" in message
    assert says in message


def test_a_module_that_is_not_there_is_named() -> None:
    for target, says in (("no_such.net", "there is no module no_such"), ("net", "write package.module.name")):
        with pytest.raises(UserError, match=says):
            load_backbone("own", target, "random", 5)


def test_weights_that_have_diverged_are_refused(mine: Callable[..., Any]) -> None:
    assert "NaN or infinite values in head.1.bias" in refusal(mine, "diverged", "pretrained")


def test_logits_that_are_probabilities_are_no_site_called_last(mine: Callable[..., Any]) -> None:
    model = mine("Softmax").model
    with pytest.raises(UserError, match=r"it changes the outputs of its last, head\.1, before it returns them"):
        find_site(model, "last")


def test_imagenet_is_for_libraries_and_pretrained_for_the_others(mine: Callable[..., Any]) -> None:
    assert "set it to random, pretrained or the path" in refusal(mine, "Net", "imagenet")
    for library in ("timm", "torchvision"):
        with pytest.raises(UserError, match=r"weights=pretrained is not for .*set it to random, imagenet or the path"):
            load_backbone(library, "resnet18", "pretrained", 5)


def test_images_are_read_at_the_datas_own_size_or_at_one_that_the_network_can_read(mine: Callable[..., Any]) -> None:
    chosen, origin = preset("own", "my_nets.Net", "pretrained", mine("Net").model, 64, {})
    assert (chosen.size, chosen.resize) == (64, None)
    assert origin == (
        "the data's own size, since a network of one's own has no preset: squashed to 64 × 64, bilinear, "
        "normalised with the usual mean 0.485, 0.456, 0.406 and std 0.229, 0.224, 0.225"
    )
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    _, origin = preset("own", "my_nets.Net", "pretrained", mine("Net").model, 64, plain)
    assert origin.endswith("normalised with mean 0, 0, 0 and std 1, 1, 1")
    model = mine("flat", "random", 5, {"side": 96}).model
    chosen, origin = preset("own", "my_nets.flat", "random", model, 64, {})
    assert (chosen.size, chosen.resize) == (96, None)
    assert origin.startswith(
        "a size that my_nets.flat can read, which the data's own 64 pixels are not: squashed to 96"
    )
    # It may read an unusual size, and say so.
    message = refusal(mine, "flat", "random", 5, {"side": 50})
    assert "cannot read 224 × 224 images" in message
    assert message.endswith("it may say in an attribute image_size what it reads.")
    odd = mine("says", "random", 5).model
    assert preset("own", "my_nets.says", "random", odd, 64, {}).preprocess.size == 50


def test_results_depend_on_its_code(mine: Callable[..., Any], tmp_path: Path) -> None:
    model = mine("Net").model
    before = code_of("own", "my_nets.Net", {}, model)
    assert before == code_of("own", "my_nets.of_seven", {}, mine("of_seven").model)
    (tmp_path / "code" / "my_nets.py").write_text(CODE + "\n# changed\n")
    assert code_of("own", "my_nets.Net", {}, model) != before
    assert code_of("timm", "resnet10t", {}, model) == ""


# -- settings


def test_the_settings_name_it(composed: Callable[..., Config]) -> None:
    backbone = composed("backbone=own", "backbone._target_=my_nets.Net", "+backbone.args.width=4").backbone
    assert backbone == BackboneSettings("own", "my_nets.Net", "random", {"width": 4}, _target_="my_nets.Net")
    # Also over another network.
    other = composed("backbone=resnet18", "backbone._target_=my_nets.Net").backbone
    assert (other.library, other.name) == ("own", "my_nets.Net")
    for more in ([], ["backbone._target_=null"]):
        with pytest.raises(UserError, match=r"backbone\.library=own needs backbone\._target_=package\.module\.name"):
            composed("backbone=own", *more)
    with pytest.raises(UserError, match=r"backbone\.args\.weights cannot be set: .*\(random, pretrained or a file\)"):
        composed("backbone=own", "backbone._target_=my_nets.Net", "+backbone.args.weights=bomb.pt")
    with pytest.raises(UserError, match=r"backbone\.args\.body\._target_=os\.system"):
        composed("backbone=own", "backbone._target_=my_nets.Net", "+backbone.args.body._target_=os.system")
