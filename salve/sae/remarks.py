# SPDX-License-Identifier: MIT
"""Warnings about an SAE, from its measures."""

from collections.abc import Mapping
from typing import Any

#: Fewer steps are too few (docs/saes.md, *Steps*): after 180 steps on 600 images, an image had three times as many
#: active latents as after 2,000, and 1 to 5 of ten classes separated instead of 8 or 9.
FEW_STEPS = 500
#: A code is not sparse if more than this share of the latents, or as many as this share of the channels, fire.
SPARSE = 1 / 4
#: An SAE with a lower FVE says little about what the classifier reads.
POOR = 1 / 2
#: What makes it explain more.
BETTER = "Lower sae.sparsity (or raise sae.k), raise sae.dictionary_size, or train for more steps."
#: With a larger share of dead latents, a smaller dictionary would do.
MANY_DEAD = 1 / 2


def explains_little(record: Mapping[str, Any]) -> str:
    """How little an SAE explains, as the beginning of a sentence; empty if it explains enough.

    Args:
        record: the content of ``sae.json``.
    """
    fve = record.get("select_fve")
    if fve is None or fve >= POOR:
        return ""
    if fve < 0:
        return f"The SAE explains select images' activations worse than their mean would (FVE {fve:.2g})"
    return f"The SAE explains {fve:.0%} of the variance of select images' activations (FVE {fve:.2g})"


def remarks(record: Mapping[str, Any]) -> list[str]:
    """Sentences about an SAE that had few steps, explains little, is not sparse, or is mostly dead.

    Args:
        record: the content of ``sae.json``. Measures that are missing or None are skipped.

    Returns:
        One sentence per problem; empty if there is none.
    """
    found = []
    steps, passes = record.get("steps"), record.get("passes")
    if steps is not None and steps < FEW_STEPS:
        after = "" if passes is None else f" ({passes:.3g} passes over the training images)"
        found.append(
            f"The SAE had only {steps} steps{after}, too few to converge: another seed may give other latents "
            f"and edits. Set sae.steps to {FEW_STEPS} or more."
        )
    if little := explains_little(record):
        found.append(f"{little}: edits act on this part only. {BETTER}")
    l0, size, width = (record.get(name) for name in ("l0", "dictionary_size", "width"))
    # An SAE that explains little is not to be made sparser, or smaller, on top.
    if not little and l0 is not None and size and width and l0 > SPARSE * min(size, width):
        found.append(
            f"An L0 of {l0:.0f} is not sparse: an image has {width} channels, the SAE {size} latents. "
            "Raise sae.sparsity, lower sae.k, or train for more steps."
        )
    dead = record.get("dead_fraction")
    if dead is not None and size and dead > MANY_DEAD:
        smaller = "" if little else "Choose a smaller sae.dictionary_size, or revive"
        found.append(
            f"{round(dead * size)} of {size} latents are dead: they fire for no training image. {smaller or 'Revive'} "
            "some with sae.resample or sae.auxk, whichever the variant has."
        )
    return found
