"""What a scheduling policy is: it fills each step from those who run and those who wait."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from sortedcontainers import SortedDict

from scheduler.core.batch import Batch
from scheduler.core.fairness import FairQueue, Price
from scheduler.core.sequence import Sequence


class Policy(ABC):
    """``queue`` holds who waits."""

    queue: FairQueue

    @abstractmethod
    def fill(self, batch: Batch) -> None:
        """Put rows into the batch's draft: ``preempt`` first, for who has a row must stay; ``decode`` once there is no
        ``shortage``; then ``admit`` and ``prefill``.
        """


class ArrivalQueue(FairQueue):
    """First come, first served, whoever it is; the tenants' counters are kept all the same, to be compared."""

    def __init__(self, weights: Mapping[str, float] | None = None, price: Price = Price()) -> None:
        super().__init__(weights, price)
        self._in_order: SortedDict = SortedDict()

    def head(self) -> Sequence | None:
        if not self._in_order:
            return None
        first: Sequence = self._in_order.peekitem(0)[1]
        return first

    def push(self, sequence: Sequence) -> None:
        super().push(sequence)
        self._in_order[sequence.number] = sequence

    def rejoin(self, sequence: Sequence) -> None:
        super().rejoin(sequence)
        self._in_order[sequence.number] = sequence

    def remove(self, sequence: Sequence) -> None:
        super().remove(sequence)
        del self._in_order[sequence.number]


class FirstComeFirstServed(Policy):
    """Common to the baselines: the order of arrival, and the youngest is preempted when blocks run out."""

    def __init__(self, weights: Mapping[str, float] | None = None, price: Price = Price()) -> None:
        self.queue = ArrivalQueue(weights, price)

    def reserve(self, sequence: Sequence) -> int:
        """For how many tokens blocks are taken at admission."""
        return len(sequence.tokens)

    def decode(self, batch: Batch) -> None:
        """Every decode gets its token, after room was made for it."""
        while batch.shortage() > 0:
            batch.preempt(next(reversed(batch.running.values())))
        batch.decode()

    def complete_prompts(self, batch: Batch) -> None:
        """Compute what a failed step left of prompts, for those who know no chunks."""
        for sequence in list(batch.prefilling.values()):
            batch.prefill(sequence, sequence.uncomputed)

    def next_fitting(self, batch: Batch) -> Sequence | None:
        """Who is next, if there is room for it."""
        head = self.queue.head()
        return head if head is not None and batch.fits(head, self.reserve(head)) else None
