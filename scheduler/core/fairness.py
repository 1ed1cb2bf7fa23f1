"""Which tenant is served next: the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI'24).

A tenant's counter grows by the service it gets, divided by its weight: ``Price.input`` for each prompt token when a request is
admitted, ``Price.output`` for each token that comes out. Among the tenants with something waiting, the one with the smallest
counter is next. Who comes back after having had nothing waiting is lifted to the smallest counter of those who wait, so that
idleness earns no credit. Hence the service of two tenants that both have something waiting all the time differs by at most
``service_gap_bound``, however long it goes on (Theorem 4.4 there), and nobody waits while there is room.

What is charged, and what is not:

- a prompt that is computed in chunks is charged once, at admission;
- prompt tokens found in the prefix cache cost nothing (as in Cao et al., "Locality-aware Fair Scheduling", 2025): nobody had to
  wait for them;
- what is computed again after a preemption or a failure is never charged: the victim paid for it before;
- only tokens that are delivered are charged, not those sampled and thrown away.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heappop, heappush, heapreplace

from sortedcontainers import SortedDict

from scheduler.core.sequence import Sequence

#: Tenants that are kept in mind before it pays to look whom to forget.
_MANY_TENANTS = 100_000


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
    """``served`` is never lifted. ``listed``: it is in the heap."""

    name: str
    weight: float
    counter: float = 0.0
    served: float = 0.0
    running: int = 0
    listed: bool = False
    waiting: SortedDict = field(default_factory=SortedDict)


class FairQueue:
    """The sequences that wait, and what each tenant was served. ``weights`` names those that aren't 1.

    Within a tenant: by priority, then deadline, then arrival. Every method costs O(log n), but for ``__iter__`` and ``backlog``.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, price: Price = Price()) -> None:
        self.price = price
        #: No tenant's counter was ever higher.
        self.highest = 0.0
        #: Tenants that use priorities.
        self.prioritised: set[str] = set()
        self._tenants: dict[str, _Tenant] = {}
        self._charges: dict[str, float] = {}
        # A tenant's entry may hold a counter it had before: counters only grow, so a stale entry comes up too early and is
        # mended then. That way a charge costs nothing here.
        self._heap: list[tuple[float, str]] = []
        self._last_to_leave: _Tenant | None = None
        self._arrivals = 0
        self._forget_at = _MANY_TENANTS
        self.reweigh(weights or {})

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self._tenants.values():
            yield from tenant.waiting.values()

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """From now on these weights hold; what was charged stays."""
        self._weights = dict(weights)
        self.heaviest = max([1.0, *weights.values()])
        self.lightest = min([1.0, *weights.values()])
        for tenant in self._tenants.values():
            tenant.weight = self.weight(tenant.name)

    def weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def counter(self, tenant: str) -> float:
        """Service units so far, divided by the tenant's weight, lifted whenever it came back."""
        return self._tenant(tenant).counter

    def served(self, tenant: str) -> float:
        """Service units so far, divided by the tenant's weight."""
        return self._tenant(tenant).served

    def backlog(self) -> dict[str, float]:
        """The counters of the tenants that have something waiting, for who watches from time to time."""
        listed = (self._tenants[name] for _, name in self._heap)
        return {tenant.name: tenant.counter for tenant in listed if tenant.waiting}

    def take_charges(self) -> dict[str, float]:
        """Service units that each tenant was charged since the last call, whatever its weight."""
        charges, self._charges = self._charges, {}
        return charges

    def waits(self, tenant: str) -> bool:
        """Whether it has something waiting."""
        found = self._tenants.get(tenant)
        return found is not None and bool(found.waiting)

    def runs(self, tenant: str) -> int:
        """How many of a tenant's sequences run."""
        return self._tenant(tenant).running

    def push(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        self._forget_idle()
        tenant = self._tenant(sequence.tenant)
        if not tenant.waiting:
            floor = self._floor()
            sequence.returned = tenant.counter < floor
            tenant.counter = max(tenant.counter, floor)
        self._arrivals += 1
        sequence.number = self._arrivals
        if sequence.priority:
            self.prioritised.add(tenant.name)
        self._add(tenant, sequence)

    def put_back(self, sequence: Sequence) -> None:
        """A sequence that was running waits again, at the place it would have had."""
        self.leave(sequence)
        self.rejoin(sequence)

    def rejoin(self, sequence: Sequence) -> None:
        """A sequence that was removed waits again, at the place it would have had."""
        self._add(self._tenant(sequence.tenant), sequence)

    def head(self) -> Sequence | None:
        """Who is next."""
        tenant = self._least()
        return None if tenant is None else self._first(tenant)

    def head_of(self, tenant: str) -> Sequence | None:
        """Who of a tenant is next."""
        found = self._tenant(tenant)
        return self._first(found) if found.waiting else None

    def heads(self, count: int) -> list[Sequence]:
        """The next one of each of the ``count`` least served tenants."""
        taken: list[tuple[tuple[float, str], Sequence]] = []
        while len(taken) < count and (tenant := self._least()) is not None:
            taken.append((heappop(self._heap), self._first(tenant)))
        for entry, _ in taken:
            heappush(self._heap, entry)
        return [sequence for _, sequence in taken]

    def remove(self, sequence: Sequence) -> None:
        """It waits no longer, and doesn't run."""
        tenant = self._tenant(sequence.tenant)
        del tenant.waiting[sequence.rank]
        if not tenant.waiting:
            self._last_to_leave = tenant

    def admit(self, sequence: Sequence) -> None:
        """It runs from now on; what of its prompt wasn't ``cached`` is charged the first time."""
        tenant = self._tenant(sequence.tenant)
        tenant.running += 1
        if not sequence.charged:
            sequence.charged = True
            units = self.price.input * (sequence.prompt_len - sequence.cached)
            self._charges[tenant.name] = self._charges.get(tenant.name, 0.0) + units
            share = units / tenant.weight
            tenant.served += share
            tenant.counter += share
            self.highest = max(self.highest, tenant.counter)
        self.remove(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It ran and has ended."""
        self._tenant(sequence.tenant).running -= 1

    def charge_output(self, tokens: Mapping[str, int]) -> None:
        """So many tokens of each tenant came out."""
        price, tenants, charges = self.price.output, self._tenants, self._charges
        for name, count in tokens.items():
            tenant = tenants.get(name) or self._tenant(name)
            units = price * count
            charges[name] = charges.get(name, 0.0) + units
            share = units / tenant.weight
            tenant.served += share
            tenant.counter += share
            if tenant.counter > self.highest:  # noqa: PLR1730 - every step, for every tenant in it: max() costs as much as the rest
                self.highest = tenant.counter

    def charge_elsewhere(self, service: Mapping[str, float]) -> None:
        """Other queues that share these tenants served them so many units, divided by their weights."""
        for name, share in service.items():
            tenant = self._tenant(name)
            tenant.counter += share
            self.highest = max(self.highest, tenant.counter)

    def _add(self, tenant: _Tenant, sequence: Sequence) -> None:
        tenant.waiting[sequence.rank] = sequence
        if not tenant.listed:
            tenant.listed = True
            heappush(self._heap, (tenant.counter, tenant.name))

    def _least(self) -> _Tenant | None:
        heap = self._heap
        while heap:
            counter, name = heap[0]
            tenant = self._tenants[name]
            if not tenant.waiting:
                heappop(heap)
                tenant.listed = False
            elif counter != tenant.counter:
                heapreplace(heap, (tenant.counter, name))
            else:
                return tenant
        return None

    def _first(self, tenant: _Tenant) -> Sequence:
        first: Sequence = tenant.waiting.peekitem(0)[1]
        return first

    def _floor(self) -> float:
        """The smallest counter of those who wait; when nobody does, that of the last who did."""
        last = self._least() or self._last_to_leave
        return 0.0 if last is None else last.counter

    def _tenant(self, name: str) -> _Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(name, self.weight(name))
        return tenant

    def _forget_idle(self) -> None:
        """Once there are very many tenants: those who would be lifted anyway when they came back need no memory."""
        if len(self._tenants) < self._forget_at:
            return
        floor = self._floor()
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if tenant.waiting or tenant.running or tenant.listed or tenant.counter > floor
        }
        self._forget_at = max(2 * len(self._tenants), _MANY_TENANTS)
