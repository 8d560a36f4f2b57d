"""Parts of a repair that a whole run does not show."""

from types import SimpleNamespace
from typing import Any

import torch

from salve.stages.grouped import Grouped
from salve.stages.repair import groups_without_images
from salve.stages.repairing import Search
from salve.types import UserError


class Failing(Search):
    """A search in which one method cannot be fitted."""

    def __init__(self) -> None:
        self.left_out = []

    def _fitted(self, method: str, size: int) -> Any:
        if method == "gate":
            raise UserError("latent 3 never fires")
        return "fitted"


def test_a_method_that_cannot_be_fitted_is_left_out_and_the_others_go_on() -> None:
    search = Failing()
    assert search._fitted_or_none("gate", 1) is None
    assert search._fitted_or_none("ablation", 1) == "fitted"
    assert search.left_out == ["latent 3 never fires"]


def test_groups_without_images_are_named() -> None:
    labels, value, numbers = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.arange(3)
    images = Grouped("tag", ("absent", "present"), labels, value, numbers, (), torch.zeros(3).long(), False)
    context: Any = SimpleNamespace(classes=("ship", "bird", "car"))
    found = groups_without_images(context, images)
    assert found == ["bird, tag absent", "car, tag absent", "car, tag present"]
