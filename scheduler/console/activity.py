"""What every request is doing and what every tenant gets, kept up with each step for whoever looks at the console."""

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from heapq import nlargest
from itertools import islice

from scheduler.console.rate import Rate
from scheduler.console.snapshot import Phase, RequestRow, Snapshot, Stage, TenantRow
from scheduler.journal.entry import Entry, request_of
from scheduler.loop import Engine, StepReport

#: What a snapshot lists at most, so that its size depends on neither tenants nor backlog.
MOST_TENANTS = 24
MOST_ENDED = 32
MOST_WAITING = 32
#: Phases of one request that are remembered.
_MOST_PHASES = 32
#: Tenants with nothing outstanding that are remembered, for their rates.
_MOST_IDLE = 256


@dataclass(slots=True)
class _Tenant:
    name: str
    waiting: int = 0
    running: int = 0
    rate: Rate = field(default_factory=Rate)


@dataclass(slots=True)
class _Request:
    """``sequences``: the ids of what runs for it. ``stage`` began at ``since``; ``past`` are the phases before it."""

    tenant: _Tenant
    request_id: str
    sequences: list[str]
    prompt_tokens: int
    generated_tokens: int
    since: float
    stage: Stage = "waiting"
    past: deque[Phase] = field(default_factory=lambda: deque(maxlen=_MOST_PHASES))
    outcome: str | None = None

    @property
    def runs(self) -> bool:
        return self.stage in {"prefill", "decode"}

    def close_phase(self, at: float) -> None:
        self.past.append(Phase(self.stage, self.since, at))

    def row(self) -> RequestRow:
        phases = [*self.past] if self.outcome else [*self.past, Phase(self.stage, self.since, None)]
        name = self.tenant.name
        return RequestRow(name, self.request_id, self.prompt_tokens, self.generated_tokens, phases, self.outcome)


class Activity:
    """Fed with accepted requests, their ends, and every report in between; a report costs O(its rows).

    A preemption is seen with the report that counts it, and then costs O(running).
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._model = model
        self._requests: dict[str, _Request] = {}
        self._running: dict[str, _Request] = {}
        self._ended: deque[_Request] = deque(maxlen=MOST_ENDED)
        self._tenants: dict[str, _Tenant] = {}
        self._idle: OrderedDict[str, _Tenant] = OrderedDict()
        self._steps, self._decoded, self._prefilled = Rate(), Rate(), Rate()
        self._rows, self._step_s = 0, 0.0
        self._preemptions = 0

    def begin(self, entry: Entry, generated_tokens: int, at: float) -> None:
        """A request is in, and waits."""
        tenant = self._tenant(entry.tenant)
        tenant.waiting += 1
        self._requests[entry.id] = _Request(
            tenant, entry.request_id, entry.sequence_ids, len(entry.prompt), generated_tokens, at
        )

    def observe(self, report: StepReport) -> None:
        """Take in one iteration, before anything ends by it."""
        for row in report.rows:
            id, _ = request_of(row)
            if id not in self._running and (request := self._requests.get(id)) is not None:
                self._enter(id, request, "prefill", report.at - report.seconds)
        self._take_tokens(report)
        if report.preemptions > self._preemptions:
            self._preemptions = report.preemptions
            self._find_preempted(report.at)
        if report.ok:
            self._rows, self._step_s = len(report.rows), report.seconds
            self._steps.add(1, report.at)
            self._prefilled.add(report.prefill_tokens, report.at)
            self._decoded.add(len(report.events), report.at)

    def end(self, id: str, outcome: str, at: float) -> None:
        """It is outstanding no longer."""
        request = self._requests.pop(id)
        request.close_phase(at)
        request.outcome = outcome
        self._count(request, -1)
        self._running.pop(id, None)
        self._ended.append(request)
        tenant = request.tenant
        if not tenant.waiting + tenant.running:
            self._idle[tenant.name] = self._tenants.pop(tenant.name)
            if len(self._idle) > _MOST_IDLE:
                self._idle.popitem(last=False)

    def snapshot(self, checks: dict[str, bool]) -> Snapshot:
        """How things stand, in O(outstanding) for the few that are listed."""
        engine, now = self._engine, self._engine.now()
        pool = engine.batcher.pool
        return Snapshot(
            at=now,
            model=self._model,
            checks=checks,
            max_running=engine.batcher.limits.max_running,
            running=len(self._running),
            waiting=len(self._requests) - len(self._running),
            rows=self._rows,
            step_s=self._step_s,
            steps_per_s=self._steps.per_s(now),
            decode_tokens_per_s=self._decoded.per_s(now),
            prefill_tokens_per_s=self._prefilled.per_s(now),
            kv_blocks=pool.num_blocks,
            kv_blocks_used=pool.num_blocks - pool.num_free,
            preemptions=self._preemptions,
            num_tenants=len(self._tenants),
            tenants=self._tenant_rows(now),
            requests=self._request_rows(),
        )

    def _tenant(self, name: str) -> _Tenant:
        if name not in self._tenants:
            self._tenants[name] = self._idle.pop(name) if name in self._idle else _Tenant(name)
        return self._tenants[name]

    def _take_tokens(self, report: StepReport) -> None:
        tokens: Counter[str] = Counter()
        for event in report.events:
            id, _ = request_of(event.id)
            request = self._requests.get(id)
            if request is not None:
                request.generated_tokens += 1
                tokens[request.tenant.name] += 1
                if request.stage != "decode":
                    self._enter(id, request, "decode", report.at)
        for tenant, count in tokens.items():
            self._tenants[tenant].rate.add(count, report.at)

    def _find_preempted(self, at: float) -> None:
        batcher = self._engine.batcher
        # Who ended is in the batcher no longer, and will be told of as the report is worked through.
        running = {request_of(sequence)[0] for sequence in batcher.running}
        preempted = [
            (id, request)
            for id, request in self._running.items()
            if id not in running and any(sequence in batcher for sequence in request.sequences)
        ]
        for id, request in preempted:
            self._enter(id, request, "preempted", at)

    def _enter(self, id: str, request: _Request, stage: Stage, at: float) -> None:
        self._count(request, -1)
        request.close_phase(at)
        request.stage, request.since = stage, at
        self._count(request, +1)
        if request.runs:
            self._running[id] = request
        else:
            self._running.pop(id, None)

    def _count(self, request: _Request, change: int) -> None:
        if request.runs:
            request.tenant.running += change
        else:
            request.tenant.waiting += change

    def _tenant_rows(self, now: float) -> list[TenantRow]:
        """The busiest; where there is room, those who were so last."""
        busiest = nlargest(MOST_TENANTS, self._tenants.values(), key=lambda tenant: tenant.running + tenant.waiting)
        busiest += islice(reversed(self._idle.values()), MOST_TENANTS - len(busiest))
        queue = self._engine.batcher.queue
        return [
            TenantRow(
                tenant.name,
                queue.weight(tenant.name),
                tenant.waiting,
                tenant.running,
                tenant.rate.per_s(now),
                queue.served(tenant.name),
            )
            for tenant in sorted(busiest, key=lambda tenant: tenant.name)
        ]

    def _request_rows(self) -> list[RequestRow]:
        waiting = islice((request for request in self._requests.values() if not request.runs), MOST_WAITING)
        return [request.row() for request in (*self._running.values(), *waiting, *reversed(self._ended))]
