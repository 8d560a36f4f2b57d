# SPDX-License-Identifier: MIT
"""The settings of marks on images; see :mod:`salve.settings`."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_args

from salve.types import UserError
from salve.values import SEED, SHARE, OneOf, Range, Unit

MarkKind = Literal["text", "logo", "border", "tint", "noise"]
Place = Literal["upper_left", "upper_right", "lower_left", "lower_right", "centre", "random"]
NO_MARK = "none"
#: Which settings of its looks a mark has.
LOOKS: dict[str, tuple[str, ...]] = {
    "text": ("text", "size", "place", "colour", "strength"),
    "logo": ("size", "place", "colour", "strength"),
    "border": ("size", "colour", "strength"),
    "tint": ("colour", "strength"),
    "noise": ("strength",),
}


@dataclass
class MarkSettings:
    """A mark that is put on images, more often on those of some classes.

    Attributes:
        kind: text, logo, border, tint or noise; none leaves images as they are.
        rates: class → share of its train images that bear the mark. rate: of classes that it does not name.
        held_out_rates, held_out_rate: the same of select and test images.
        seed: image i of a split bears the mark, and at a random place, by the seed, the split and i alone.
        size: of the text's width, the logo's side or the border's width, as a share of the side of the square that all
            networks see.
        place: of a text or logo.
        colour: by name or as ``#rrggbb``.
        strength: opacity; of noise, its standard deviation, as a share of the range from black to white.
        text: what is written.
    """

    kind: Annotated[str, OneOf(NO_MARK, *get_args(MarkKind))] = NO_MARK
    rates: dict[str, float] = field(default_factory=dict)
    rate: Annotated[float, SHARE, Unit("of the images of a class")] = 0.05
    held_out_rates: dict[str, float] = field(default_factory=dict)
    held_out_rate: Annotated[float, SHARE, Unit("of the images of a class")] = 0.5
    seed: Annotated[int, SEED] = 0
    size: Annotated[float, Range(above=0, most=1), Unit("of the side of the square that all networks see")] = 0.5
    place: Annotated[str, OneOf(*get_args(Place))] = "lower_right"
    colour: str = "white"
    strength: Annotated[float, Range(above=0, most=1), Unit("of the full opacity")] = 1.0
    text: str = "SAMPLE"

    def check(self) -> None:
        """Check the rates of classes.

        Raises:
            UserError: one is no share.
        """
        for name in ("rates", "held_out_rates"):
            for of_class, rate in getattr(self, name).items():
                if why := SHARE.refusal(rate):
                    raise UserError(f"mark.{name} gives {rate} to {of_class!r}, which {why}: it is a share of images.")

    def looks(self) -> dict[str, Any]:
        """The kind, and the settings that its pixels depend on."""
        return {name: value for name, value in asdict(self).items() if name in ("kind", *LOOKS[self.kind])}
