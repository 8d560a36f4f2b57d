"""What is refused before a library is loaded is what the library would refuse."""

import pytest
import timm
from torchvision import models

from salve.run.inputs import _check_name
from salve.types import UserError


@pytest.mark.parametrize(
    ("library", "names"), [("timm", timm.list_models()), ("torchvision", models.list_models(module=models))]
)
def test_no_name_that_a_library_knows_is_refused(library: str, names: list[str]) -> None:
    assert len(names) > 50
    for name in names[:: max(1, len(names) // 40)]:
        _check_name(library, name)
    with pytest.raises(UserError, match=f"backbone.name=resnet1000 is no model of {library}; near it: .*resnet101"):
        _check_name(library, "resnet1000")


def test_names_with_a_tag_and_names_that_were_given_up_are_left_to_the_library() -> None:
    _check_name("timm", "convnext_atto.d2_in1k")
    _check_name("timm", "tv_resnet34")


@pytest.mark.parametrize("name", ["hf-hub:somebody/net", "local-dir:/tmp/net"])
def test_networks_from_a_hub_or_a_folder_are_left_to_timm(name: str) -> None:
    _check_name("timm", name)
    with pytest.raises(UserError, match=f"backbone.name={name} is no model of torchvision"):
        _check_name("torchvision", name)
