# SPDX-License-Identifier: MIT
"""Read the settings in a run's folder without trusting them.

A command may name any class of the user's own, and any place to load a network from. A folder may come from somebody
else. Of the classes that it names, only salve's data classes and some of Lightning's callbacks are used, unless the
command names the same class again; the same holds for networks of one's own, and from elsewhere. Texts in it stay
texts: ``${oc.env:KEY}`` is not looked up.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from salve.run.explain import explain
from salve.run.schema import CALLBACKS, DATA, Config, resolve
from salve.types import UserError
from salve.values import TRANSFORMERS

#: How many values a file may hold: with YAML's references a few lines can stand for more than fits into memory.
MOST_VALUES = 200_000


def stored_settings(
    file: Path, changes: Sequence[str] = (), *, classes: Collection[str] = (), instead: Mapping[str, Any] | None = None
) -> Config:
    """Read the settings in a file, and check them as if they had just been typed.

    Args:
        file: ``config.yaml`` of a run.
        changes: ``key=value`` as typed; they replace values of the file.
        classes: values of ``_target_``, and names of networks that are loaded from elsewhere, that the file may have
            besides salve's own and those in ``changes``.
        instead: values by setting, which replace those of the file, and which ``changes`` replace in turn.

    Raises:
        UserError: the file holds no settings, or unknown ones; only the file names a class, or a place to load a
            network from; or a change names no setting.
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
            raise UserError(f"{file} has no value for {', '.join(missing)}: another version of salve wrote it.")
        for key, value in typed.items():
            if OmegaConf.is_dict(OmegaConf.select(config, key)):
                raise UserError(f"{key} names a group; a rerun changes single settings, such as output_dir=FOLDER.")
            OmegaConf.update(config, key, value)
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {explain(error)}") from error
    return resolve(config)


def _read(file: Path) -> dict[str, Any]:
    """The file's content as plain values."""
    if not file.is_file() or not file.stat().st_size:
        raise UserError(f"{file.parent} is no folder of a run: it holds no {file.name}.")
    try:
        stored = _as_text(yaml.safe_load(file.read_text(encoding="utf-8")), [0])
    except yaml.YAMLError as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}.") from error
    except (ValueError, RecursionError, OverflowError) as error:  # not UTF-8, an impossible date, a list in itself
        raise UserError(f"{file} cannot be read as settings ({type(error).__name__}).") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("data"), dict) or "_target_" not in stored["data"]:
        raise UserError(f"{file} holds no settings of a run: data._target_ is missing.")
    return stored


def _as_text(value: Any, count: list[int]) -> Any:
    """Escape the texts in a value, so that OmegaConf gives them back as they are."""
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
    named = [("data._target_", stored["data"]["_target_"], tuple(DATA), "none of salve's own")]
    callbacks = stored.get("callbacks")
    for name, callback in callbacks.items() if isinstance(callbacks, dict) else ():
        if isinstance(callback, dict) and "_target_" in callback:
            named.append(
                (
                    f"callbacks.{name}._target_",
                    callback["_target_"],
                    CALLBACKS,
                    "none of Lightning's that write no files",
                )
            )
    for key, target, trusted, none_of in named:
        if key not in typed and not (isinstance(target, str) and (target in trusted or target in classes)):
            raise UserError(
                f"{file} names the class {key}={target}, which is {none_of} ({', '.join(trusted)}), and what a folder "
                "names is not run; if you know and trust it, name it again on the command line."
            )
    for key, target in _own_code(stored).items():
        if key not in typed and target not in classes:
            raise UserError(
                f"{file} names {key}={target}, which is none of salve's own, and what a folder names is not run; if "
                "you know and trust it, name it again on the command line."
            )
    found = stored.get("backbone")
    backbone = found if isinstance(found, dict) else {}
    network = typed.get("backbone._target_", backbone.get("_target_"))
    if network is not None:
        if "backbone._target_" not in typed and not (isinstance(network, str) and network in classes):
            raise UserError(
                f"{file} names backbone._target_={network}, which makes a network of somebody's own, and what a folder "
                "names is not run; if you know and trust it, name it again on the command line."
            )
        return
    name, library = backbone.get("name"), typed.get("backbone.library", backbone.get("library"))
    elsewhere = isinstance(name, str) and name not in classes and _is_elsewhere(library, name)
    if "backbone.name" not in typed and elsewhere:
        raise UserError(
            f"{file} has backbone.name={name}, a place to load a network from, and what a folder names is not fetched; "
            "if you know and trust it, name it again on the command line."
        )


def _own_code(settings: Mapping[str, Any]) -> dict[str, str]:
    """The edit methods, SAE variants and measures of somebody's own, by setting.

    Only these have a dot in their names, or stand as a ``_target_`` there.
    """
    parts = {
        name: found if isinstance(found := settings.get(name), dict) else {} for name in ("edit", "sae", "compare")
    }
    named = {"edit.method": parts["edit"].get("method"), "sae.variant": parts["sae"].get("variant")}
    targets = {}
    for name, variant in _mappings(parts["compare"].get("variants")):
        if "_target_" in variant:
            targets[f"compare.variants.{name}._target_"] = variant["_target_"]
        if isinstance(sae := variant.get("sae"), dict):
            named[f"compare.variants.{name}.sae.variant"] = sae.get("variant")
    for name, measure in _mappings(settings.get("measures")):
        targets[f"measures.{name}._target_"] = measure.get("_target_")
    return {key: str(value) for key, value in (named | targets).items() if key in targets or "." in str(value)}


def _mappings(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, one) for name, one in value.items() if isinstance(one, dict)] if isinstance(value, dict) else []


def _is_elsewhere(library: Any, name: str) -> bool:
    """Whether a network of that name is loaded from a hub or folder: all of transformers, and some of timm.

    timm's are named hf-hub:USER/MODEL and local-dir:FOLDER.
    """
    return library == TRANSFORMERS or bool(set(name) & set(":/\\"))


def named_again(config: Config) -> dict[str, str]:
    """What a rerun of these settings must name again, by setting: the user's own classes, a network from elsewhere."""
    data = asdict(config)["data"]["_target_"]
    callbacks = {
        f"callbacks.{name}._target_": callback["_target_"]
        for name, callback in config.callbacks.items()
        if callback is not None and callback["_target_"] not in CALLBACKS
    }
    backbone = config.backbone
    networks = {"backbone.name": backbone.name} if _is_elsewhere(backbone.library, backbone.name) else {}
    if backbone._target_ is not None:
        networks = {"backbone._target_": backbone._target_}
    own = _own_code(asdict(config))
    return {**({} if data in DATA else {"data._target_": data}), **callbacks, **networks, **own}
