"""Paged blocks, prompts first: vLLM's first scheduler (Kwon et al., "PagedAttention", SOSP'23)."""

from scheduler.core.batch import Batch
from scheduler.core.policies.base import FirstComeFirstServed


class PrefillFirst(FirstComeFirstServed):
    """A step computes whole prompts, as many as the token budget takes and at least one, or else decodes: while prompts come in,
    everybody's next token waits."""

    def fill(self, batch: Batch) -> None:
        self.complete_prompts(batch)
        while (sequence := self.next_fitting(batch)) is not None:
            if batch.draft and len(sequence.tokens) > batch.draft.budget:
                break
            batch.admit(sequence)
            batch.prefill(sequence, sequence.uncomputed)
        if not batch.draft:
            self.decode(batch)
