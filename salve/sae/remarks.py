"""What a reader of an SAE's numbers should be warned of."""

from collections.abc import Mapping
from typing import Any

#: Fewer steps than this were too few where it was measured (docs/saes.md, *Steps*): after 180 on 600 images three times
#: as many latents were active as after 2,000, and 1 to 5 classes of ten separated instead of 8 or 9.
FEW_STEPS = 500
#: Of what could fire: a code of more than a quarter of the channels or latents shortens nothing and names nothing.
SPARSE = 1 / 4
#: An SAE that explains less than half of the variance says little of what the classifier reads.
POOR = 1 / 2
#: Half of a dictionary that does nothing can be left out.
MANY_DEAD = 1 / 2


def remarks(record: Mapping[str, Any]) -> list[str]:
    """Sentences about an SAE that saw few steps, explains little, is not sparse or mostly dead; empty if all is well.

    Args:
        record: what ``sae.json`` holds; a measure that is missing or None is passed over.
    """
    found = []
    steps, passes = record.get("steps"), record.get("passes")
    if steps is not None and steps < FEW_STEPS:
        after = "" if passes is None else f" ({passes:.3g} passes over the training images)"
        found.append(
            f"The SAE saw only {steps} steps{after}, too few to settle: another seed may give other latents and edits. "
            f"Set sae.steps to {FEW_STEPS} or more."
        )
    fve = record.get("select_fve")
    if fve is not None and fve < POOR:
        worse = ", less than their mean would" if fve < 0 else ""
        found.append(
            f"The SAE explains {max(fve, 0):.0%} of the variance of select images' activations (FVE {fve:.2g}){worse}: "
            "edits act on the little that it knows. Lower sae.sparsity, raise sae.k or sae.dictionary_size, or train "
            "for more steps."
        )
    l0, size, width = (record.get(name) for name in ("l0", "dictionary_size", "width"))
    if l0 is not None and size and width and l0 > SPARSE * min(size, width):
        found.append(
            f"An L0 of {l0:.0f} is not sparse: so many of {size} latents fire for an image of {width} channels. "
            "Raise sae.sparsity, lower sae.k, or train for more steps."
        )
    dead = record.get("dead_fraction")
    if dead is not None and size and dead > MANY_DEAD:
        found.append(
            f"{round(dead * size)} of {size} latents are dead: they fire for no training image. A smaller "
            "sae.dictionary_size would do; sae.resample or sae.auxk, where the variant has it, revives some."
        )
    return found
