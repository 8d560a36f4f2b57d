# SPDX-License-Identifier: MIT
"""Edit methods behind one protocol: :class:`.base.Method`. A user's own class is named by ``_target_``."""

import sys
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from salve.editing.methods.base import FittedEdit, Fitting, Method, Target
from salve.editing.methods.change import Affine, Change
from salve.files import digest_of_file
from salve.named import named
from salve.types import UserError

#: By name, the class of each method.
METHODS = {
    "gate": "salve.editing.methods.gate.Gate",
    "steering": "salve.editing.methods.steering.Steering",
    "ablation": "salve.editing.methods.ablation.Ablation",
    "inlp": "salve.editing.methods.erasers.INLP",
    "leace": "salve.editing.methods.erasers.LEACE",
    "latent_eraser": "salve.editing.methods.erasers.LatentEraser",
    "rank_one": "salve.editing.methods.rank_one.RankOne",
    "null_space": "salve.editing.methods.rank_one.NullSpace",
    "memit": "salve.editing.methods.memit.Memit",
    "pruning": "salve.editing.methods.pruning.Pruning",
    "head_bias": "salve.editing.methods.head.HeadBias",
    "head_row": "salve.editing.methods.head.HeadRow",
    "task_arithmetic": "salve.editing.methods.task_arithmetic.TaskArithmetic",
    "forget": "salve.editing.methods.forget.Forget",
    "class_vector": "salve.editing.methods.class_vector.ClassVector",
    "mapped_class_vector": "salve.editing.methods.class_vector.MappedClassVector",
    "mute": "salve.editing.methods.at_inference.Mute",
    "clamp": "salve.editing.methods.at_inference.Clamp",
    "reconstruction": "salve.editing.methods.at_inference.Reconstruction",
}


def make_method(
    name: str, settings: dict[str, Any] | None = None, key: str = "edit.method", own: bool = True
) -> Method:
    """A method by its name in :data:`METHODS`, or by the path of a user's own class.

    Args:
        name: such as ``steering`` or ``package.module.Class``. settings: its fields. key: the setting, for messages.
        own: whether the setting may name a user's own class.

    Raises:
        UserError: there is no such method, or it has no such setting.
    """
    if name not in METHODS and ("." not in name or not own):
        close = get_close_matches(name, METHODS, 1)
        hint = f"; did you mean {close[0]}?" if close else "."
        or_own = ", or package.module.Class" if own else ""
        raise UserError(f"{key}={name} is no edit method{hint} Choose {', '.join(METHODS)}{or_own}.")
    found = named(key, METHODS.get(name, name))
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(f"{key}={name} is no subclass of salve.editing.methods.Method.")
    known = [field.name for field in fields(found)]  # type: ignore[arg-type]
    if unknown := [one for one in settings or {} if one not in known]:
        has = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"{key}={name} has no setting {unknown[0]}; {has}.")
    method: Method = found(**(settings or {}))
    return method


def key_of(method: Method) -> dict[str, Any]:
    """What an artifact's key holds of a method: its class, its settings and, of a user's own, a digest of its code."""
    kind = type(method)
    found = {"class": f"{kind.__module__}.{kind.__qualname__}", "settings": method.settings()}
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if kind.__module__.partition(".")[0] != "salve" and file:
        found["code"] = digest_of_file(Path(file))
    return found


__all__ = ["METHODS", "Affine", "Change", "FittedEdit", "Fitting", "Method", "Target", "key_of", "make_method"]
