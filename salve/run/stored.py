"""Settings that lie in a folder, whoever wrote them: they are data, and name nothing that is then run.

A typed command may name any class of one's own, and any place to read weights from. A folder may have been sent: of
what it names only salve's own classes are made, unless who repeats the run names the same thing again. Its texts are
texts: what looks like one of OmegaConf's interpolations (``${oc.env:KEY}``) is not looked up.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from salve.run.explain import explain
from salve.run.schema import DATA, Config, resolve
from salve.types import UserError

#: Values that settings may hold. YAML's references let a file of a few lines stand for more than any memory holds.
MOST_VALUES = 200_000


def stored_settings(
    file: Path, changes: Sequence[str] = (), *, classes: Collection[str] = (), instead: Mapping[str, Any] | None = None
) -> Config:
    """The settings in a file, checked as if they had just been typed.

    Args:
        file: ``config.yaml`` of a run. changes: ``key=value``, instead of what the file has.
        classes: of images (``data._target_``), which the file may name besides salve's own and those of ``changes``.
        instead: by setting, what counts in place of the file's value, if it has one, and before ``changes``.

    Raises:
        UserError: no settings, or some that this version does not know; a class, or a source of weights, that only the
            file names; a change of no setting.
    """
    stored = _read(file)
    try:
        overrides = OverridesParser.create().parse_overrides(list(changes))
    except HydraException as error:
        raise UserError(explain(error)) from error
    if several := [one.input_line for one in overrides if one.is_sweep_override()]:
        raise UserError(f"{several[0]} names several values, and a rerun repeats one run; give one of them.")
    typed = {one.get_key_element(): one.value() for one in overrides}
    _refuse_untrusted(file, stored, typed, classes)
    config = OmegaConf.structured(Config)
    try:
        target = typed.get("data._target_", stored["data"]["_target_"])
        if isinstance(target, str) and target in DATA:
            config.data = OmegaConf.structured(DATA[target])
        config.merge_with(stored)
        for key, value in (instead or {}).items():
            if OmegaConf.select(config, key) is not None:
                OmegaConf.update(config, key, value)
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise UserError(f"{file} says nothing of {', '.join(missing)}: another version of salve wrote it.")
        for key, value in typed.items():
            if OmegaConf.is_dict(OmegaConf.select(config, key)):
                raise UserError(f"{key} names a group; a rerun changes single settings, such as output_dir=FOLDER.")
            OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}.") from error
    return resolve(config)


def _read(file: Path) -> dict[str, Any]:
    """The settings as plain values, of which no text means anything else."""
    if not file.is_file() or not file.stat().st_size:
        raise UserError(f"{file.parent} is no folder of a run: it holds no {file.name}.")
    try:
        stored = _as_text(yaml.safe_load(file.read_text(encoding="utf-8")), [0])
    except yaml.YAMLError as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}.") from error
    except (ValueError, RecursionError, OverflowError) as error:  # no UTF-8, no such day, a list that holds itself
        raise UserError(f"{file} cannot be read as settings ({type(error).__name__}).") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("data"), dict) or "_target_" not in stored["data"]:
        raise UserError(f"{file} holds no settings of a run: it says nothing of data._target_.")
    return stored


def _as_text(value: Any, count: list[int]) -> Any:
    """A value whose texts OmegaConf will give back as they are."""
    count[0] += 1
    if count[0] > MOST_VALUES:
        raise ValueError
    if isinstance(value, Mapping):
        return {_as_text(key, count): _as_text(part, count) for key, part in value.items()}
    if isinstance(value, list):
        return [_as_text(part, count) for part in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def _refuse_untrusted(
    file: Path, stored: Mapping[str, Any], typed: Mapping[str, Any], classes: Collection[str]
) -> None:
    target = stored["data"]["_target_"]
    known = isinstance(target, str) and (target in DATA or target in classes)
    if "data._target_" not in typed and not known:
        raise UserError(
            f"{file} names the class data._target_={target}, which is none of salve's own ({', '.join(DATA)}), and "
            "what a folder names is not run; if you know and trust it, name it again on the command line."
        )
    backbone = stored.get("backbone")
    name = backbone.get("name") if isinstance(backbone, dict) else None
    # timm's names of a place: hf-hub:USER/MODEL, local-dir:FOLDER.
    if "backbone.name" not in typed and isinstance(name, str) and set(name) & set(":/\\"):
        raise UserError(
            f"{file} has backbone.name={name}, a place to load a network from, and what a folder names is not fetched; "
            "if you know and trust it, name it again on the command line."
        )
