"""Iteration-level scheduling (Yu et al., "Orca: A Distributed Serving System for Transformer-Based … Models", OSDI'22)."""

from scheduler.core.batch import Batch
from scheduler.core.policies.base import FirstComeFirstServed
from scheduler.core.sequence import Sequence


class Orca(FirstComeFirstServed):
    """Who ends leaves and who waits joins after every step, with its whole prompt. Memory for the longest output asked for is
    reserved at admission, so nobody is ever preempted."""

    def fill(self, batch: Batch) -> None:
        self.decode(batch)
        self.complete_prompts(batch)
        while (sequence := self.next_fitting(batch)) is not None:
            batch.admit(sequence, self.reserve(sequence))
            batch.prefill(sequence, sequence.uncomputed)

    def reserve(self, sequence: Sequence) -> int:
        return sequence.end_len
