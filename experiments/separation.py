"""How many classes separate, strictly and in the published sense; the strict count decides."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from experiments.compare import WORDS
from experiments.runs import SAERun
from salve.editing.verdict import CONFIDENCE
from salve.report.text import plural

#: When an edit separates its class, for captions.
STRICTLY = (
    "at the strength chosen on select images, the class is at {level} of the test images or less, the others' accuracy "
    "changes by less than {mean} in the mean of absolute values, and no other class loses more than {loss}"
).format(**WORDS)
#: The heading of the weaker count.
PUBLISHED = "in the published sense"
#: What it means.
AS_PUBLISHED = (
    "the class is at {level} or less, and the others' mean accuracy changes by less than {mean}, where gains make up "
    "for losses and one class may lose all"
).format(**WORDS)


class Separation(NamedTuple):
    """How many classes separate, over SAEs.

    Attributes:
        share: of all classes, mean over SAEs. text: how many, with ``span``. published: how many do in the published
            sense. span: over which range, and how sure.
    """

    share: float
    text: str
    published: str
    span: str


def separation(runs: Sequence[SAERun], classes: int) -> Separation:
    """Count over all ``classes``; a class without a latent does not separate.

    The interval over images is the mean of the SAEs' intervals, which are all from the same images.
    """
    strict, published = (
        pd.Series([int(run.verdicts[sense].sum()) for run in runs]) for sense in ("separates", "separates_published")
    )
    low, high = (pd.Series([run.verdict[f"separates_{end}"] for run in runs]).mean() for end in ("low", "high"))
    over = f"{strict.min()} to {strict.max()} over {plural(len(runs), 'SAE')}"
    span = f"{over}; {100 * CONFIDENCE:.0f} % over test images: {low:.1f} to {high:.1f}"
    text, as_published = (f"{count.mean():.1f} of {classes} classes" for count in (strict, published))
    return Separation(float(strict.mean()) / classes, f"{text} ({span})", as_published, span)
