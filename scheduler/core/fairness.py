"""Which tenant is served next: the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI'24).

A tenant's counter grows by the service it gets, divided by its weight: ``Price.input`` for each prompt token when a request is
admitted, ``Price.output`` for each token that comes out. Among the tenants with something waiting, the one with the smallest
counter is next. Who comes back after having had nothing waiting is lifted to the smallest counter of those who wait, so that
idleness earns no credit. Hence the service of two tenants that both have something waiting all the time differs by at most
``service_gap_bound``, however long it goes on (Theorem 4.4 there), and nobody waits while there is room.

Charged is what a tenant asked for, not what it costs us: a prompt computed in chunks is charged once, and what is computed
again after a preemption or thrown away is never charged.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sortedcontainers import SortedList

from scheduler.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Price:
    """Service units per token."""

    input: float = 1.0
    output: float = 2.0


def service_gap_bound(price: Price, longest_prompt: int, kv_tokens: int) -> float:
    """Service units by which two tenants of weight 1 may differ; ``kv_tokens`` fill all KV blocks."""
    return 2 * max(price.input * longest_prompt, price.output * kv_tokens)


@dataclass(slots=True)
class _Tenant:
    name: str
    weight: float
    counter: float = 0.0
    waiting: OrderedDict[str, Sequence] = field(default_factory=OrderedDict)


class FairQueue:
    """The sequences that wait, and what each tenant was served. Within a tenant: first come, first served.

    Every method costs O(log tenants). ``weights`` names those that aren't 1.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, price: Price = Price()) -> None:
        self._weights = dict(weights or {})
        self._price = price
        self._tenants: dict[str, _Tenant] = {}
        # (counter, name) of every tenant that has something waiting.
        self._order: SortedList = SortedList()
        self._last_to_leave: _Tenant | None = None

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self._tenants.values():
            yield from tenant.waiting.values()

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """From now on these weights hold; what was charged stays."""
        self._weights = dict(weights)
        for tenant in self._tenants.values():
            tenant.weight = self._weights.get(tenant.name, 1.0)

    def counter(self, tenant: str) -> float:
        """Service units so far, divided by the tenant's weight."""
        return self._tenant(tenant).counter

    def push(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        tenant = self._tenant(sequence.tenant)
        if not tenant.waiting:
            tenant.counter = max(tenant.counter, self._floor())
        self._add(tenant, sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that was running waits again, before the others of its tenant."""
        tenant = self._tenant(sequence.tenant)
        self._add(tenant, sequence)
        tenant.waiting.move_to_end(sequence.id, last=False)

    def head(self) -> Sequence | None:
        """Who is next."""
        if not self._order:
            return None
        _, name = self._order[0]
        return next(iter(self._tenants[name].waiting.values()))

    def remove(self, sequence: Sequence) -> None:
        """It waits no longer, whether it runs now or has ended."""
        tenant = self._tenant(sequence.tenant)
        del tenant.waiting[sequence.id]
        if not tenant.waiting:
            self._order.remove((tenant.counter, tenant.name))
            self._last_to_leave = tenant

    def admit(self, sequence: Sequence) -> None:
        """It runs from now on; its prompt is charged the first time."""
        self.remove(sequence)
        if not sequence.charged:
            sequence.charged = True
            self._charge(sequence.tenant, self._price.input * sequence.prompt_len)

    def charge_output(self, sequence: Sequence) -> None:
        """A token of it came out."""
        self._charge(sequence.tenant, self._price.output)

    def _charge(self, name: str, units: float) -> None:
        tenant = self._tenant(name)
        if tenant.waiting:
            self._order.remove((tenant.counter, name))
        tenant.counter += units / tenant.weight
        if tenant.waiting:
            self._order.add((tenant.counter, name))

    def _add(self, tenant: _Tenant, sequence: Sequence) -> None:
        if not tenant.waiting:
            self._order.add((tenant.counter, tenant.name))
        tenant.waiting[sequence.id] = sequence

    def _floor(self) -> float:
        """The smallest counter of those who wait; when nobody does, that of the last who did."""
        if self._order:
            return float(self._order[0][0])
        return self._last_to_leave.counter if self._last_to_leave is not None else 0.0

    def _tenant(self, name: str) -> _Tenant:
        if name not in self._tenants:
            self._tenants[name] = _Tenant(name, self._weights.get(name, 1.0))
        return self._tenants[name]
