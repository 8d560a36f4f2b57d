# SPDX-License-Identifier: MIT
"""Evaluation sets take the defaults of the data that they name."""

from collections.abc import Callable
from dataclasses import asdict

import pytest

from salve.run.explain import conf_dir
from salve.run.schema import DATA_NAMES, Config
from salve.run.sources import OF_THE_RUN


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "data").glob("*.yaml")))
def test_a_set_is_read_as_the_data_of_that_name_are(name: str, composed: Callable[..., Config]) -> None:
    root = {} if name == "concepts" else {"root": "somewhere"}
    data = asdict(composed(f"data={name}", *(f"data.{key}={value}" for key, value in root.items())).data)
    said = ", ".join(f"{key}: {value}" for key, value in {"data": name, **root}.items())
    (entry,) = composed(f"evaluate=[{{{said}}}]").evaluate
    assert DATA_NAMES[entry.pop("data")] == data.pop("_target_")
    assert entry.pop("name") == name
    assert entry == {key: value for key, value in data.items() if key not in OF_THE_RUN}
