"""How the time of a GPU check is divided among its parts."""

from collections.abc import Mapping

#: Seconds of each part of a check, in order; together with :data:`RESERVE` less than eight minutes.
PLANNED = {
    "tests": 165.0,
    "card": 15.0,
    "training": 80.0,
    "large": 50.0,
    "ensemble": 40.0,
    "capture": 50.0,
    "tails": 20.0,
    "peers": 45.0,
}
#: Seconds that are kept for the end.
RESERVE = 5.0


class Budget:
    """Seconds of a whole check, and the planned seconds of each of its parts, in order.

    A part may take its own time and all that is to spare, but not what is planned for the parts after it.

    Args:
        total: seconds that the check may take.
        planned: seconds of each part by name, in the order in which they run.
    """

    #: A part with less time than this is left out.
    LEAST = 5.0
    #: Share of a part's time after which it should start nothing new.
    SOFT = 0.8

    def __init__(self, total: float, planned: Mapping[str, float]) -> None:
        self.total, self.planned = total, dict(planned)

    def limit(self, part: str, elapsed: float) -> float:
        """Seconds after which the part is stopped; 0 if it must be left out.

        Args:
            part: the next part. elapsed: seconds since the check began.
        """
        names = list(self.planned)
        after = sum(self.planned[name] for name in names[names.index(part) + 1 :])
        limit = self.total - elapsed - after
        return limit if limit >= self.LEAST else 0.0
