"""How a step's tokens for prompts are divided."""

from collections import Counter
from collections.abc import Iterator

from scheduler.core.sequence import Sequence

#: Among more tenants than this the budget isn't split further: parts would get small and all prompts late.
MOST_PARTS = 4


class Grants:
    """How many tokens of its prompt each sequence computes in this step; ``size`` is a tenant's part of the budget,
    ``beyond_least`` what is left but for the least part there is."""

    def __init__(self, budget: int, size: int) -> None:
        self.left = budget
        self.size = size
        self._least = budget // MOST_PARTS
        self._lengths: dict[Sequence, int] = {}
        self._of_tenant: Counter[str] = Counter()

    def __iter__(self) -> Iterator[tuple[Sequence, int]]:
        return iter(self._lengths.items())

    @property
    def beyond_least(self) -> int:
        return self.left - self._least

    def first(self, sequence: Sequence) -> None:
        """Give it all that it needs, but leave one least part."""
        self._give(sequence, self.beyond_least)

    def part(self, sequence: Sequence) -> None:
        """Give it what is left of its tenant's part."""
        self._give(sequence, self.size - self._of_tenant[sequence.tenant])

    def newcomer(self, sequence: Sequence) -> None:
        """Give it a part of its own: it was its tenant's turn."""
        self._give(sequence, self.size)

    def rest(self, sequence: Sequence) -> None:
        """Give it whatever is left."""
        self._give(sequence, self.left)

    def _give(self, sequence: Sequence, most: int) -> None:
        given = self._lengths.get(sequence, 0)
        length = min(sequence.uncomputed - given, most, self.left)
        if length > 0:
            self._lengths[sequence] = given + length
            self._of_tenant[sequence.tenant] += length
            self.left -= length
