"""Ours: fair between tenants (``fairness.py``), no prompt in anybody's way, and nobody's decode waits.

A step is made in this order:

1. Room. A tenant's running work of lower priority gives way to what it has waiting with a higher one. When the least served
   tenant's next sequence finds no room, those give way whose tenants are ahead of it by more than the Virtual Token Counter
   allows: so its bound holds whatever lengths come. And if that tenant asks for less than its share, those of the tenant that
   has the most running give way, so that nobody waits for a flood to end. When decodes lack blocks, the most served tenant's
   sequence goes, of these the one of lowest priority, of these the youngest.
2. Every decode gets its token.
3. Prompts. A newcomer whose tenant asks for less than its share is computed at once. While several tenants have prompts
   to compute, each gets a part of the budget: first the oldest prompt, then those that its part completes, then newcomers
   in the order of service, then the others, the shortest first. What is left over goes to whoever can use it.

A newcomer that finds no room for its prompt lets others pass, each by no more service than that prompt is worth.
"""

from collections.abc import Mapping

from scheduler.core.batch import Batch
from scheduler.core.fairness import FairQueue, Price
from scheduler.core.policies.base import Policy
from scheduler.core.policies.grants import MOST_PARTS, Grants
from scheduler.core.policies.room import Room
from scheduler.core.sequence import Sequence

#: Tenants that are looked at when the next one finds no room.
_MAY_PASS = 8


class Fair(Policy):
    """See the module."""

    def __init__(self, weights: Mapping[str, float] | None = None, price: Price = Price()) -> None:
        self.queue = FairQueue(weights, price)
        self._room = Room(self.queue)

    def fill(self, batch: Batch) -> None:
        invited = self._room.make(batch)
        batch.decode()
        grants = Grants(batch.draft.budget, self._part(batch))
        self._grant(batch, grants, invited)
        for sequence, length in grants:
            batch.prefill(sequence, length)

    def _part(self, batch: Batch) -> int:
        """Tokens of this step that one tenant's prompts get before the others had theirs."""
        tenants = {sequence.tenant for sequence in batch.prefilling.values()}
        head = self.queue.head()
        if head is not None:
            tenants.add(head.tenant)
        return -(-batch.draft.budget // max(min(len(tenants), MOST_PARTS), 1))

    def _grant(self, batch: Batch, grants: Grants, invited: list[Sequence]) -> None:
        oldest_first = [sequence for sequence in batch.prefilling.values() if not self._is_outranked(batch, sequence)]
        shortest_first = sorted(oldest_first, key=lambda sequence: sequence.uncomputed)
        self._admit_first(batch, grants, invited)
        for sequence in oldest_first[:1]:
            grants.part(sequence)
        for sequence in shortest_first:
            if sequence.uncomputed <= grants.size:
                grants.part(sequence)
        self._admit(batch, grants)
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

    def _admit_first(self, batch: Batch, grants: Grants, invited: list[Sequence]) -> None:
        """For whom others gave way, and whose tenants ask for less than their share, while a part is left for the oldest."""
        for sequence in invited:
            if grants.beyond_least and batch.fits(sequence):
                batch.admit(sequence)
                grants.first(sequence)
        while grants.beyond_least and (head := self.queue.head()) is not None and head.returned and batch.fits(head):
            batch.admit(head)
            grants.first(head)

    def _admit(self, batch: Batch, grants: Grants) -> None:
        while grants.left and (head := self.queue.head()) is not None:
            if not batch.fits(head):
                self._let_pass(batch, grants, head)
                return
            batch.admit(head)
            grants.newcomer(head)

    def _let_pass(self, batch: Batch, grants: Grants, blocked: Sequence) -> None:
        if not batch.num_free_slots:
            return
        most = self.queue.counter(blocked.tenant) + self.queue.price.input * blocked.prompt_len
        for sequence in self.queue.heads(_MAY_PASS):
            if grants.left and batch.fits(sequence) and self.queue.counter(sequence.tenant) < most:
                batch.admit(sequence)
                grants.newcomer(sequence)
