"""After a step that failed: only suspects run, until the one at fault is found (``suspects.py``)."""

from scheduler.core.batch import Batch
from scheduler.core.fairness import FairQueue
from scheduler.core.policies.base import Policy
from scheduler.core.suspects import Suspects


class Trial(Policy):
    """The suspects' steps; the others keep what they hold, unless room is needed."""

    def __init__(self, queue: FairQueue, suspects: Suspects) -> None:
        self.queue = queue
        self._suspects = suspects

    def fill(self, batch: Batch) -> None:
        may_run = self._suspects.may_run
        while batch.shortage() > 0:
            batch.preempt(next(reversed(batch.running.values())))
        batch.decode([sequence for id, sequence in batch.decoding.items() if may_run(id)])
        for sequence in [sequence for id, sequence in batch.prefilling.items() if may_run(id)]:
            if batch.draft.budget:
                batch.prefill(sequence, min(sequence.uncomputed, batch.draft.budget))
        for sequence in [sequence for sequence in self.queue if may_run(sequence.id)]:
            if not batch.draft.budget or not batch.fits(sequence):
                return
            batch.admit(sequence)
            batch.prefill(sequence, min(sequence.uncomputed, batch.draft.budget))

    def make_room(self, batch: Batch) -> None:
        """Nothing could run: who isn't on trial must go."""
        for id, sequence in reversed(list(batch.running.items())):
            if not self._suspects.may_run(id):
                batch.preempt(sequence)
