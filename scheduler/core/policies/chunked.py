"""Decodes first, then chunks of prompts (Agrawal et al., "Taming Throughput-Latency Tradeoff … with Sarathi-Serve", OSDI'24)."""

from scheduler.core.batch import Batch
from scheduler.core.policies.base import FirstComeFirstServed


class Chunked(FirstComeFirstServed):
    """One token budget: every decode has its token, what is left goes to prompts in the order they came."""

    def fill(self, batch: Batch) -> None:
        self.decode(batch)
        for sequence in list(batch.prefilling.values()):
            if batch.draft.budget:
                batch.prefill(sequence, min(sequence.uncomputed, batch.draft.budget))
        while batch.draft.budget and (newcomer := self.next_fitting(batch)) is not None:
            batch.admit(newcomer)
            batch.prefill(newcomer, min(newcomer.uncomputed, batch.draft.budget))
