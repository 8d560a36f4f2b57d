# SPDX-License-Identifier: MIT
"""What ``salve-edit show`` prints of an edit."""

import math

from salve.editing.additions import HeldAddition
from salve.editing.edits import EditFile, HeldEdit, HeldGates
from salve.untrusted import some


def described(held: HeldEdit) -> str:
    """The edit in a few lines: what it does to which weights of which network."""
    rows = [("edit", held.name)] if held.name else []
    if isinstance(held, HeldGates):
        rows += _of_gates(held)
    if isinstance(held, HeldAddition):
        rows += _of_addition(held)
    rows.append(("network", f"{held.backbone}, checksum {held.before[:12]}"))
    if isinstance(held, EditFile):
        rows.append(("edited", f"checksum {held.after[:12]}"))
    if isinstance(held, HeldGates):
        rows.append(("SAE", held.sae[:12]))
    return "\n".join(f"  {name:<9} {text}" for name, text in rows)


def _of_gates(held: HeldGates) -> list[tuple[str, str]]:
    rows = []
    for edit in held.edits:
        open_ = f"scale {edit.scale}, channels {edit.channels}" + (f", sign {edit.sign:+d}" * (edit.channels != "all"))
        rows.append((str(edit.mode), f"latent {edit.latent} at α = {edit.alpha:g} ({open_})"))
    gate = held.gates().prod(dim=0)
    rows.append(("channels", f"{int((gate != 1).sum())} of {len(gate)} scaled, {int((gate == 0).sum())} closed"))
    return [*rows, ("site", f"{held.site}, read by {', '.join(held.tensors)}")]


def _of_addition(held: HeldAddition) -> list[tuple[str, str]]:
    numbers = sum(math.prod(stamp.shape) for stamp in held.changed.values())
    rows = [("method", held.summary), ("changes", f"{some(held.tensors, most=10)} ({numbers:,} numbers)")]
    return [*rows, ("site", held.site)] if held.site else rows
