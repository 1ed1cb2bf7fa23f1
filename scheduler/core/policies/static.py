"""Static batching, as before Orca: a batch is let in when the last one has wholly ended, and nobody joins it on the way."""

from scheduler.core.batch import Batch
from scheduler.core.policies.base import FirstComeFirstServed
from scheduler.core.sequence import Sequence


class Static(FirstComeFirstServed):
    """Blocks are taken for the longest output asked for, as the batch's tensors would be. Those that have ended cost no more
    compute here, which is kinder than padding."""

    def fill(self, batch: Batch) -> None:
        if batch.running:
            self.decode(batch)
            self.complete_prompts(batch)
            return
        while (sequence := self.next_fitting(batch)) is not None:
            batch.admit(sequence, self.reserve(sequence))
            batch.prefill(sequence, sequence.uncomputed)

    def reserve(self, sequence: Sequence) -> int:
        return sequence.end_len
