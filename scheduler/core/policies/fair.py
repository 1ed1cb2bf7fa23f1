"""Ours: fair between tenants (``fairness.py``), no prompt in anybody's way, and nobody's decode waits.

A step is made in this order:

1. Room. A tenant's running work of lower priority gives way to what it has waiting with a higher one. When the least served
   tenant's next sequence finds no room, those give way whose tenants are ahead of it by more than the Virtual Token Counter
   allows: so its bound holds whatever lengths come. And if nothing of that tenant runs, one of a tenant that has several gives
   way, so that a flood doesn't keep others waiting until something of it ends. When decodes lack blocks, the most served
   tenant's sequence goes, of these the one of lowest priority, of these the youngest.
2. Every decode gets its token.
3. Prompts. While several tenants have prompts to compute, each gets a part of the budget: first the oldest prompt, then those
   that its part completes, then newcomers in the order of service, then the others, the shortest first. What is left over goes
   to whoever can use it.

A newcomer that finds no room for its prompt lets others pass, each by no more service than that prompt is worth.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from scheduler.core.batch import Batch
from scheduler.core.fairness import FairQueue, Price
from scheduler.core.policies.base import Policy
from scheduler.core.sequence import Sequence

#: Among more tenants than this the budget isn't split further: parts would get small and all prompts late.
_MOST_PARTS = 4
#: Tenants that are looked at when the next one finds no room.
_MAY_PASS = 8


class Fair(Policy):
    """See the module."""

    def __init__(self, weights: Mapping[str, float] | None = None, price: Price = Price()) -> None:
        self.queue = FairQueue(weights, price)

    def fill(self, batch: Batch) -> None:
        invited = self._make_room(batch)
        batch.decode()
        grants = _Grants(batch.draft.budget, self._part(batch))
        self._grant(batch, grants, invited)
        for sequence, length in grants:
            batch.prefill(sequence, length)

    # 1. Room

    def _make_room(self, batch: Batch) -> list[Sequence]:
        """Returns those for whom others gave way: the room is theirs."""
        invited = self._undo_inversions(batch) if self.queue.prioritised else []
        head = self.queue.head()
        if head is not None and not batch.fits(head):
            counter = self.queue.counter(head.tenant)
            if _preempt_for(batch, head, self._too_far_ahead(batch, counter) or self._crowd(batch, head.tenant)):
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

    def _crowd(self, batch: Batch, tenant: str) -> list[Sequence]:
        """If nothing of ``tenant`` runs: what the one with the most running for its weight has, but for one."""
        if self.queue.runs(tenant):
            return []
        crowds: dict[str, list[Sequence]] = {}
        for sequence in batch.running.values():
            crowds.setdefault(sequence.tenant, []).append(sequence)
        name = max(crowds, key=lambda name: (len(crowds[name]) / self.queue.weight(name), name), default=None)
        return [] if name is None else sorted(crowds[name], key=self._dispensability, reverse=True)[:-1]

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

    # 3. Prompts

    def _part(self, batch: Batch) -> int:
        """Tokens of this step that one tenant's prompts get before the others had theirs."""
        tenants = {sequence.tenant for sequence in batch.prefilling.values()}
        head = self.queue.head()
        if head is not None:
            tenants.add(head.tenant)
        return -(-batch.draft.budget // max(min(len(tenants), _MOST_PARTS), 1))

    def _grant(self, batch: Batch, grants: "_Grants", invited: list[Sequence]) -> None:
        oldest_first = [sequence for sequence in batch.prefilling.values() if not self._is_outranked(batch, sequence)]
        shortest_first = sorted(oldest_first, key=lambda sequence: sequence.uncomputed)
        for sequence in oldest_first[:1]:
            grants.part(sequence)
        for sequence in shortest_first:
            if sequence.uncomputed <= grants.size:
                grants.part(sequence)
        self._admit(batch, grants, invited)
        for sequence in shortest_first:
            grants.part(sequence)
        for sequence in batch.prefilling.values():
            grants.rest(sequence)

    def _is_outranked(self, batch: Batch, sequence: Sequence) -> bool:
        """Whether its own tenant has a prompt of higher priority."""
        if sequence.tenant not in self.queue.prioritised:
            return False
        rivals = [rival for rival in batch.prefilling.values() if rival.tenant == sequence.tenant]
        if (head := self.queue.head_of(sequence.tenant)) is not None:
            rivals.append(head)
        return any(rival.priority > sequence.priority for rival in rivals)

    def _admit(self, batch: Batch, grants: "_Grants", invited: list[Sequence]) -> None:
        for sequence in invited:
            if grants.left and batch.fits(sequence):
                batch.admit(sequence)
                grants.newcomer(sequence)
        while grants.left and (head := self.queue.head()) is not None:
            if not batch.fits(head):
                self._let_pass(batch, grants, head)
                return
            batch.admit(head)
            grants.newcomer(head)

    def _let_pass(self, batch: Batch, grants: "_Grants", blocked: Sequence) -> None:
        if not batch.num_free_slots:
            return
        most = self.queue.counter(blocked.tenant) + self.queue.price.input * blocked.prompt_len
        for sequence in self.queue.heads(_MAY_PASS):
            if grants.left and batch.fits(sequence) and self.queue.counter(sequence.tenant) < most:
                batch.admit(sequence)
                grants.newcomer(sequence)


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


class _Grants:
    """How many tokens of its prompt each sequence computes in this step; ``size`` is a tenant's part of the budget."""

    def __init__(self, budget: int, size: int) -> None:
        self.left = budget
        self.size = size
        self._lengths: dict[Sequence, int] = {}
        self._of_tenant: Counter[str] = Counter()

    def __iter__(self) -> Iterator[tuple[Sequence, int]]:
        return iter(self._lengths.items())

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
