# SPDX-License-Identifier: MIT
"""Data sources of evaluation sets: named as ``data=…`` names them, and with the same defaults, those of conf/data."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import MISSING

from salve.run.explain import conf_dir
from salve.types import UserError

#: What an evaluation set takes from the data of its run.
OF_THE_RUN = ("batch_size", "num_workers")
#: What an evaluation set says besides the settings of its source.
OF_THE_SET = ("data", "take", "name")


def with_defaults(entries: list[Any], settings: Mapping[str, Sequence[str]]) -> list[Any]:
    """The setting ``evaluate``, each of its mappings with what conf/data says of the source that it names.

    ``{data: composed, root: FOLDER}`` becomes ``{data: table, root: FOLDER, file: …, name: composed}``, and so on: the
    result names salve's own classes alone, and needs no file to be understood.

    Args:
        entries: the setting. settings: of each of salve's own data classes, by its name.

    Raises:
        UserError: a mapping names no source, has a setting that its source does not have, or lacks one.
    """
    return [_filled(entry, settings) if isinstance(entry, dict) else entry for entry in entries]


def _filled(entry: dict[str, Any], settings: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    name = entry.get("data")
    known = sorted(path.stem for path in (conf_dir() / "data").glob("*.yaml") if not path.stem.endswith("_schema"))
    if name not in known:
        said = "that does not say its data" if name is None else f"with data: {name}"
        raise UserError(f"evaluate has a set {said}; choose data: {', '.join(known)}.")
    source, defaults = _defaults(name)
    kept = {key: value for key, value in defaults.items() if key not in OF_THE_RUN}
    filled = {**kept, "name": name, **entry, "data": source}
    allowed = [*settings[source], *OF_THE_SET]
    if unknown := [str(key) for key in filled if key not in allowed]:
        raise UserError(
            f"evaluate has a set with data: {name}, which has no setting {unknown[0]}; it has {', '.join(allowed)}."
        )
    if missing := [key for key, value in filled.items() if value == MISSING]:
        raise UserError(f"evaluate has a set with data: {name}, which does not say {', '.join(missing)}.")
    return filled


def _defaults(name: str) -> tuple[str, dict[str, Any]]:
    """The name of the class that reads a source of conf/data, and the settings that its files give it."""
    own = yaml.safe_load((conf_dir() / "data" / f"{name}.yaml").read_text(encoding="utf-8"))
    source, found = name, dict[str, Any]()
    for base in own.pop("defaults", []):
        if not str(base).endswith("_schema"):
            source, found = _defaults(base)
    return source, found | own
