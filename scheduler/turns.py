"""Which replica takes a request up: each hears it and waits for its turn, which comes the sooner the sooner it could begin.

Nobody has to know who lives: the turns of the dead pass, and the journal lets one of those who come at the same time have it.
"""

import random
from collections.abc import Callable, Mapping

from scheduler.journal.entry import Entry

#: For each full batch that waits here more than where the fewest do. Longer than a journal's commit takes.
_BATCH_S = 0.02
_LONGEST_S = 0.1


class Turns:
    """``number`` is ours, ``load`` tells how many full batches are outstanding here, ``cached`` what part of a prompt needn't be
    computed here. Until there are others it is always our turn."""

    def __init__(self, number: int, load: Callable[[], float], cached: Callable[[Entry], float]) -> None:
        self._number = number
        self._load = load
        self._cached = cached
        self._others: Mapping[int, float] = {}

    def hear(self, loads: Mapping[int, float]) -> None:
        """The others that live, and what is outstanding there."""
        self._others = loads

    @property
    def replicas(self) -> int:
        """How many live, as far as we know."""
        return 1 + len(self._others)

    @property
    def speaks(self) -> bool:
        """Whether it is for us to answer what no journal tells whose it is: it is for the oldest."""
        return all(self._number < other for other in self._others)

    @property
    def over_after_s(self) -> float:
        """By when, after it came, a request has had everyone's turn."""
        return _LONGEST_S if self._others else 0.0

    def pause_s(self, entry: Entry) -> float:
        """For how long after it came a request is left to others.

        Among equals chance decides, which favours who holds more of the prompt.
        """
        if not self._others:
            return 0.0
        more = max(self._load() - min(self._others.values()), 0.0)
        chance = random.random() * (1 - self._cached(entry))  # noqa: S311 (no secret)
        return min(_BATCH_S * (more + chance), _LONGEST_S)
