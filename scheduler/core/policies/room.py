"""Who gives way to whom when slots or blocks are short."""

from scheduler.core.batch import Batch
from scheduler.core.fairness import FairQueue
from scheduler.core.sequence import Sequence


class Room:
    """Makes it, for who is next in the queue and for those that decode."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue

    def make(self, batch: Batch) -> list[Sequence]:
        """Returns those for whom others gave way: the room is theirs."""
        invited = self._undo_inversions(batch) if self.queue.prioritised else []
        head = self.queue.head()
        if head is not None and not batch.fits(head):
            counter = self.queue.counter(head.tenant)
            if _preempt_for(batch, head, self._too_far_ahead(batch, counter) or self._crowd(batch, head)):
                invited.append(head)
        while batch.shortage() > 0:
            batch.preempt(max(batch.running.values(), key=self._dispensability))
        return invited

    def _undo_inversions(self, batch: Batch) -> list[Sequence]:
        own: dict[str, list[Sequence]] = {}
        for sequence in batch.running.values():
            if sequence.tenant in self.queue.prioritised:
                own.setdefault(sequence.tenant, []).append(sequence)
        invited = []
        for tenant, running in own.items():
            head = self.queue.head_of(tenant)
            if head is not None and not batch.fits(head):
                lower = [sequence for sequence in running if sequence.priority < head.priority]
                if _preempt_for(batch, head, sorted(lower, key=self._dispensability, reverse=True)):
                    invited.append(head)
        return invited

    def _crowd(self, batch: Batch, waiting: Sequence) -> list[Sequence]:
        """For one whose tenant came back: what the tenant with the most running for its weight has over that one's number."""
        if not waiting.returned or not batch.running:
            return []
        crowds: dict[str, list[Sequence]] = {}
        for sequence in batch.running.values():
            crowds.setdefault(sequence.tenant, []).append(sequence)
        own, weight = len(crowds.get(waiting.tenant, ())), self.queue.weight
        name = max(crowds, key=lambda name: (len(crowds[name]) / weight(name), name))
        level = round((own + 1) / weight(waiting.tenant) * weight(name))
        return sorted(crowds[name], key=self._dispensability, reverse=True)[: -max(level, 1)]

    def _too_far_ahead(self, batch: Batch, counter: float) -> list[Sequence]:
        """Those of tenants whose counters are ahead of ``counter`` by more than one tenant can get before another's turn."""
        pool, price = batch.pool, self.queue.price
        most = max(price.input * batch.limits.max_model_len, price.output * pool.num_blocks * pool.block_size)
        if self.queue.highest - counter <= most / self.queue.heaviest:
            return []
        far = {
            tenant
            for tenant in {sequence.tenant for sequence in batch.running.values()}
            if self.queue.counter(tenant) - counter > most / self.queue.weight(tenant)
        }
        return sorted(
            (sequence for sequence in batch.running.values() if sequence.tenant in far),
            key=self._dispensability,
            reverse=True,
        )

    def _dispensability(self, sequence: Sequence) -> tuple[float, int, int]:
        """Who is preempted first has the most of it. Priority counts within a tenant only."""
        return self.queue.counter(sequence.tenant), -sequence.priority, sequence.number


def _preempt_for(batch: Batch, waiting: Sequence, candidates: list[Sequence]) -> bool:
    """Preempt as few as needed for ``waiting`` to fit, none if even all of them wouldn't do; says whether it fits now."""
    freed = 0
    for count, candidate in enumerate(candidates, start=1):
        freed += batch.pool.num_freed_by(candidate)
        if batch.fits(waiting, freed=freed, slots=count):
            for victim in candidates[:count]:
                batch.preempt(victim)
            return True
    return False
