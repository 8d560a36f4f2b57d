"""A hundred classes: how much they share latents, and who falls when one class's latent is suppressed."""

import math
from collections.abc import Sequence

from experiments.claims import Measured
from experiments.compare import LEVEL_TEXT
from experiments.experiment import Experiment, Findings, Picture, joined
from experiments.runs import Study
from experiments.salve2025.cifar100.figures import classes_figure, drift_figure, sharing_figure
from experiments.salve2025.cifar100.survey import Survey, survey_of
from salve.editing.verdict import LIMITS
from salve.report.text import number, percent, plural, points

#: The testbed that the claims are about.
MANY = "cifar100"


def analyse(studies: Sequence[Study]) -> Findings:
    """See the module."""
    surveys = [survey_of(study) for study in studies]
    pictures = {"sharing": Picture(sharing_figure(surveys), _sharing_caption(surveys))}
    for one in surveys:
        pictures[f"classes-{one.testbed.name}"] = Picture(classes_figure(one), _classes_caption(one))
        pictures[f"drift-{one.testbed.name}"] = Picture(drift_figure(one), _drift_caption(one))
    paragraphs = [_paragraph(one) for one in surveys]
    if fewer := _fewer(surveys):
        paragraphs.append(_comparison(_many(surveys), fewer))
    tables = {
        "summary": joined([one.summary for one in surveys]),
        "classes": joined([one.table for one in surveys]),
        "pairs": joined([one.pairs for one in surveys]),
    }
    return Findings("\n\n".join(paragraphs), pictures, tables, _measured(surveys))


def _many(surveys: Sequence[Survey]) -> Survey:
    """The testbed with the most classes."""
    return max(surveys, key=lambda one: len(one.classes))


def _fewer(surveys: Sequence[Survey]) -> Survey | None:
    """The first testbed with fewer classes than :func:`_many`."""
    most = len(_many(surveys).classes)
    return next((one for one in surveys if len(one.classes) < most), None)


def _measured(surveys: Sequence[Survey]) -> list[Measured]:
    """For the claims, which are about CIFAR-100 alone."""
    one = next((one for one in surveys if one.testbed.name == MANY), None)
    if one is None:
        return []
    counted, share, fewer = one.separates, one.summary["with_companion"].mean(), _fewer(surveys)
    beside, compared = math.nan, "no testbed with fewer classes beside it"
    if fewer:
        beside = fewer.summary["with_companion"].mean()
        compared = f"{percent(beside, 0)} with {len(fewer.classes)} ({fewer.testbed.title})"
    text = f"{percent(share, 0)} of {len(one.classes)} classes share their latent; {compared}"
    return [
        Measured(f"{MANY}.separates", MANY, counted.share, counted.text, counted.published),
        Measured(f"{MANY}.sharing", MANY, float(share - beside), text),
    ]


def _paragraph(one: Survey) -> str:
    mean = one.summary.mean(numeric_only=True)
    text = (
        f"{one.testbed.title}: {one.separates.text} separate, with {mean['dictionary_size']:.0f} latents; in the "
        f"published sense {one.separates.published}. For {percent(mean['reached'], 0)} of the edits there is a "
        f"strength that takes the class to {LEVEL_TEXT} of its select images. It leaves {percent(mean['after'])} of "
        f"the test images; there the others change by {points(mean['drift'], signed=False)} points in the mean of "
        f"absolute values, the one that loses most loses {points(mean['worst_loss'], signed=False)}, and "
        f"{number(mean['falls'], 2)} other classes lose half of their accuracy or more. "
        f"{percent(mean['with_companion'], 0)} of the classes have a companion, which is a class at least half as "
        f"strong on the latent they are edited through ({number(mean['companions'], 2)} companions in the mean); "
        f"{percent(mean['not_alone'], 0)} are edited through a latent that was chosen for another class, too. Their "
        f"latents are {percent(mean['class-defining'], 0)} class-defining, {percent(mean['cross-class'], 0)} "
        f"cross-class and {percent(mean['diffuse'], 0)} diffuse."
    )
    if math.isnan(mean["sibling_share"]):
        return text
    return text + (
        f" The class that loses most is of the edited one's superclass in {percent(mean['sibling_share'], 0)} of the "
        f"edits ({percent(mean['sibling_chance'], 0)} by chance); the dominant latents of two such classes overlap by "
        f"{number(mean['overlap_siblings'], 2)} (Jaccard index), those of other pairs by "
        f"{number(mean['overlap_others'], 2)}."
    )


def _comparison(many: Survey, fewer: Survey) -> str:
    more, less = many.summary["with_companion"].mean(), fewer.summary["with_companion"].mean()
    verb = "share more than" if more > less else "share less than" if more < less else "share as much as"
    one_of_many, one_of_few = (100 / (len(one.classes) - 1) for one in (many, fewer))
    return (
        f"{len(many.classes)} classes {verb} {len(fewer.classes)}: {percent(more, 0)} of them have a companion, "
        f"against {percent(less, 0)}. Whether a class separates says less with many classes: one that is lost beside "
        f"the edited one moves the others' mean by {one_of_many:.1f} points at most, by {one_of_few:.1f} with "
        f"{len(fewer.classes)} classes. That is why no class may lose more than "
        f"{points(LIMITS.others_worst_loss, signed=False)} points."
    )


def _sharing_caption(surveys: Sequence[Survey]) -> str:
    text = (
        f"{' and '.join(one.testbed.title for one in surveys)}. a: share of classes with at least so many companions "
        "(classes at least half as strong on the latent a class is edited through); mean and range over SAEs. b: what "
        "these latents are. c: how far the dominant latents of two classes are the same; 95 % over SAEs."
    )
    if any(one.groups for one in surveys):
        text += " d: how often the class that loses most is of the edited one's superclass; 95 % over edits."
    return text


def _classes_caption(one: Survey) -> str:
    text = (
        f"{one.testbed.title}, {one.images} test images: each class edited through its latent, where it is at "
        f"{LEVEL_TEXT} of its select images; the most harmful edits first. Left: what the class that loses most loses "
        "(its name at the right), and the mean absolute change of all others. Right: companions, which are classes at "
        f"least half as strong on the latent. Dots: mean of {plural(len(one.summary), 'SAE')}, bars: their range."
    )
    return text + (" Bold: of the same superclass." if one.groups else "")


def _drift_caption(one: Survey) -> str:
    order = ", by superclass" if one.groups else ""
    return (
        f"{one.testbed.title}, {one.images} test images: what editing a class (row) to {LEVEL_TEXT} of its select "
        f"images does to every other class (column){order}; mean of {plural(len(one.summary), 'SAE')}. Grey: the class "
        "itself, and edits that do not take their class there."
    )


EXPERIMENT = Experiment(
    "cifar100",
    "A hundred classes: what they share",
    ("cifar100",),
    analyse,
    quick=("sae.seed=0,1", "sae.epochs=20", "edit.alpha=[0,1,2,3,4,6,8,11,15,20,30,50]"),
    beside=("resnet18",),
)
