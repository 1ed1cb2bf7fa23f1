"""What is outstanding, by tenant and priority, and at what pace it is done: what an estimate for a new request needs."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from protocol.errors import DeadlineUnreachable
from scheduler.estimate import Pace, Queue, Work, estimate_s
from scheduler.journal.entry import Entry, request_of
from scheduler.loop import StepReport

#: Weight of the newest request in the moving average of what is generated where no limit is given.
_NEWEST = 0.1


@dataclass(slots=True)
class _Rank:
    """What remains of a tenant's requests of one priority, in tokens."""

    prompt: int = 0
    output: int = 0


@dataclass(slots=True)
class _Request:
    """``prompt`` and ``output`` are what remains of it; ``generated`` counts the tokens that this process saw."""

    entry: Entry
    rank: _Rank
    prompt: int = 0
    output: int = 0
    generated: int = 0

    @property
    def choices(self) -> int:
        return self.entry.request.num_choices

    def advance(self) -> None:
        """A token of it came out, and with the first one its prompt is done."""
        self.generated += 1
        self.change(-self.prompt, -min(self.output, 1))

    def change(self, prompt: int, output: int) -> None:
        self.prompt += prompt
        self.output += output
        self.rank.prompt += prompt
        self.rank.output += output


@dataclass(slots=True)
class _Tenant:
    weight: float
    requests: int = 0
    ranks: defaultdict[int, _Rank] = field(default_factory=lambda: defaultdict(_Rank))


class Outlook:
    """``seats``: sequences that run at once; ``weight`` gives a tenant's weight. What a call costs doesn't grow with what is
    outstanding."""

    def __init__(self, seats: int, weight: Callable[[str], float]) -> None:
        self._seats = seats
        self._weight = weight
        self._pace = Pace()
        self._requests: dict[str, _Request] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._weights = 0.0
        self._usual_output = 1.0
        self._choices = 0

    def begin(self, entry: Entry, generated: int = 0) -> None:
        """It is outstanding; an earlier process generated so many of its tokens, which are to be computed like a prompt."""
        if entry.tenant not in self._tenants:
            tenant = self._tenants[entry.tenant] = _Tenant(self._weight(entry.tenant))
            self._weights += tenant.weight
        tenant = self._tenants[entry.tenant]
        whole = self._work(entry)
        request = self._requests[entry.id] = _Request(entry, tenant.ranks[entry.request.priority])
        request.change(whole.prompt + generated, max(whole.output - generated, 0))
        tenant.requests += 1
        self._choices += request.choices

    def observe(self, report: StepReport) -> None:
        """Take in one iteration, before anything ends by it."""
        if report.ok:
            self._pace.observe(report.prefill_tokens + report.decode_tokens, report.seconds + report.gap_s)
        for event in report.events:
            request = self._requests.get(request_of(event.id)[0])
            if request is not None:
                request.advance()

    def end(self, id: str) -> None:
        """It is outstanding no longer."""
        request = self._requests.pop(id)
        request.change(-request.prompt, -request.output)
        self._choices -= request.choices
        if request.entry.request.output_limit is None:
            self._usual_output += _NEWEST * (request.generated / request.choices - self._usual_output)
        name = request.entry.tenant
        self._tenants[name].requests -= 1
        if not self._tenants[name].requests:
            self._weights -= self._tenants.pop(name).weight

    def check(self, entry: Entry, now: float, before: Sequence[Entry] = ()) -> None:
        """Raises DeadlineUnreachable for one that asked to be refused rather than be late; ``now`` is in Unix seconds.

        ``before`` are about to begin. Until the first step has been made nothing is known, and nobody refused.
        """
        if not entry.request.refuse_late or entry.expires_at is None or not self._pace.known:
            return
        left_s = entry.expires_at - now
        # Where no limit is given nobody can say more than when the answer begins. Choices run beside each other if they can.
        limit, rounds = entry.request.output_limit, -(-entry.request.num_choices // self._seats)
        own = Work(len(entry.prompt), rounds * (1 if limit is None else limit))
        needed_s = estimate_s(self._pace, self._queue(entry, before), own)
        if needed_s > left_s:
            raise DeadlineUnreachable(left_ms=max(round(1000 * left_s), 0), estimate_ms=round(1000 * needed_s))

    def _queue(self, entry: Entry, before: Sequence[Entry]) -> Queue:
        """Of those of its own priority, all go before it: an earlier deadline isn't counted."""
        least = entry.request.priority
        tenant = self._tenants.get(entry.tenant)
        ranks = tenant.ranks.items() if tenant is not None else ()
        works = [Work(rank.prompt, rank.output) for priority, rank in ranks if priority >= least]
        works += [self._work(e) for e in before if e.tenant == entry.tenant and e.request.priority >= least]
        newcomers = {e.tenant for e in (*before, entry)} - self._tenants.keys()
        weights = self._weights + sum(map(self._weight, newcomers))
        own_weight = self._weight(entry.tenant) if tenant is None else tenant.weight
        choices = self._choices + sum(e.request.num_choices for e in before) + entry.request.num_choices - 1
        return Queue(choices, self._seats, sum(works, Work()), own_weight / weights)

    def _work(self, entry: Entry) -> Work:
        """All of it; who gave no limit is taken to generate as much as others did who gave none."""
        limit = entry.request.output_limit
        output = round(self._usual_output) if limit is None else limit
        return Work(len(entry.prompt), entry.request.num_choices * output)
