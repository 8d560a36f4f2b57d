"""An SAE variant of the user's own: named by its path, checked like salve's own, and never imported by a file."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from salve.run.schema import Config
from salve.sae import SAE, Member, TopK, fingerprint, load_sae, make_sae, save_sae
from salve.sae.ensemble import Stack
from salve.sae.models import code_of
from salve.sweep.plan import run_key
from salve.types import UserError

CODE = """
from salve.sae import SAE, TopK
from salve.types import UserError


class Cubed(SAE):
    takes = ("k", "bias_scale")
    signed = True
    revived_by = "resample"

    def __init__(self, width, dictionary_size, generator=None, k=None, bias_scale=1.0):
        self.check(dictionary_size, k=k, bias_scale=bias_scale)
        super().__init__(width, dictionary_size, generator)
        self.k, self.bias_scale = k, bias_scale

    @classmethod
    def check(cls, dictionary_size, k=None, bias_scale=1.0, **others):
        super().check(dictionary_size, **others)
        if bias_scale <= 0:
            raise UserError("bias_scale must be above 0.")

    def activate(self, pre):
        return self.bias_scale * pre**3


class Mine(TopK):
    pass


number = 3
"""
PATH = "module_of_own.Cubed"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The module's file; what it defines is forgotten afterwards."""
    file = tmp_path / "module_of_own.py"
    file.write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield file
    sys.modules.pop("module_of_own", None)


def test_it_is_made_saved_and_read(module: Path, tmp_path: Path) -> None:
    sae: Any = make_sae(PATH, 6, 9, torch.Generator().manual_seed(0), bias_scale=2.0)
    rows = torch.randn(5, 6)
    assert torch.equal(sae.encode(rows), 2 * (rows @ sae.encoder.T) ** 3)
    save_sae(tmp_path / "a.safetensors", sae)
    loaded: Any = load_sae(tmp_path / "a.safetensors")
    assert (type(loaded), loaded.bias_scale, loaded.k) == (type(sae), 2.0, None)
    assert torch.equal(loaded.encode(rows), sae.encode(rows))
    assert fingerprint(sae).startswith(f"{PATH}:")


def test_a_file_does_not_import_it(tmp_path: Path, module: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_sae(file, make_sae("relu_l1", 4, 4))
    file.write_bytes(file.read_bytes().replace(rb"relu_l1", rb"a.b.Cde"))  # as long, so that the header still fits
    with pytest.raises(UserError, match=r"is of the class a\.b\.Cde, and what a file names is not imported"):
        load_sae(file)
    assert "module_of_own" not in sys.modules


def test_it_is_trained_with_others_like_it(module: Path) -> None:
    members = {
        i: Member(make_sae(PATH, 6, 9, torch.Generator().manual_seed(i), bias_scale=0.5), 0.1, i) for i in (0, 1)
    }
    stack, rows = Stack(members), torch.randn(2, 7, 6)
    losses = stack.losses(rows, 0)
    for i, member in members.items():
        alone = member.sae.losses(rows[i], member.sae.run(rows[i]), 0.1).mean()
        assert torch.allclose(losses[i], alone, rtol=1e-5)


def test_what_derives_from_a_variant_takes_what_that_takes(module: Path) -> None:
    sae: Any = make_sae("module_of_own.Mine", 6, 9, k=2)
    assert isinstance(sae, TopK)
    assert (sae.encode(torch.randn(5, 6)) != 0).sum(dim=1).max() <= 2
    with pytest.raises(UserError, match=r"needs sae\.k between 1 and"):
        make_sae("module_of_own.Mine", 6, 9, k=10)


def test_settings_are_checked(module: Path, composed: Callable[..., Config]) -> None:
    config = composed(f"sae.variant={PATH}", "sae.k=3", "+sae.args.bias_scale=2", "sae.resample=1")
    assert config.sae.options() == {"k": 3, "bias_scale": 2}
    for overrides, said in (
        (["+sae.args.bias_scale=-1"], "bias_scale must be above 0"),
        (["+sae.args.other=1"], f"sae.args has other; those of sae.variant={PATH} are bias_scale"),
        (["+sae.args.k=1"], "sae.args has k; those"),
        (["sae.dictionary_size=0"], "sae.dictionary_size=0 must be"),
        (["sae.auxk=3"], f"sae.auxk=3 is for .*, not for sae.variant={PATH}"),
        (["sae.pool=max"], "sae.pool=max is for latents that are not negative"),
        (["sae.bandwidth=1"], f"sae.bandwidth is a setting of jumprelu, not of sae.variant={PATH}"),
    ):
        with pytest.raises(UserError, match=said):
            composed(f"sae.variant={PATH}", *overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["sae.variant=dense"], r"none of linear_l1, .*, matryoshka, package\.module\.Class"),
        (["sae.variant=module_of_own.number"], "is no subclass of salve.sae.SAE"),
        (["sae.variant=salve.sae.SAE"], "is no subclass of salve.sae.SAE"),
        (["sae.variant=module_of_own.Cubes"], "has no class Cubes; did you mean Cubed"),
        (["sae.variant=no_such_module.X"], "is the folder that holds it on PYTHONPATH"),
        (["+sae.args.x=1"], "sae.args has x; they are for your own variant"),
    ],
)
def test_what_is_no_variant_is_refused(
    module: Path, composed: Callable[..., Config], overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        composed(*overrides)


def test_its_arguments_and_its_code_are_part_of_the_key(module: Path, composed: Callable[..., Config]) -> None:
    settings = [composed(f"sae.variant={PATH}", f"+sae.args.bias_scale={scale}") for scale in (1, 2)]
    assert settings[0].sae.scientific() != settings[1].sae.scientific()
    assert run_key(settings[0]) != run_key(settings[1])
    before = code_of(PATH)
    module.write_text(CODE + "\n")
    assert code_of(PATH) != before
    assert code_of("topk") == {}


def test_keys_of_salves_own_are_as_before(composed: Callable[..., Config]) -> None:
    assert "args" not in composed().sae.scientific()
    assert SAE.revived_by is None
