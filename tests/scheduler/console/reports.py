"""A batcher whose steps are reported as the engine reports them, one second each, without a worker."""

from types import SimpleNamespace

from protocol.request import Request
from scheduler.console.activity import Activity
from scheduler.core.batcher import Batcher
from scheduler.journal.entry import Entry, request_of, sequence_id
from scheduler.loop import StepReport
from tests.scheduler.core.drive import TOKEN, sequence


class Bench:
    """``now`` is what the engine's clock says; ``activity`` is told of everything."""

    def __init__(self, batcher: Batcher) -> None:
        self.now = 100.0
        self.batcher = batcher
        self.activity = Activity(SimpleNamespace(batcher=batcher, now=lambda: self.now), "tiny")

    def submit(self, id: str, prompt: int, max_tokens: int = 8, n: int = 1) -> None:
        tokens = list(range(10, 10 + prompt))
        request = Request(prompt=tokens, max_tokens=max_tokens, n=n)
        entry = Entry(id=id, model="tiny", request=request, prompt=tokens, seed=1, accepted_at=0.0, listeners=[])
        self.batcher.submit(*(sequence(sequence_id(id, index), tokens, max_tokens) for index in range(n)))
        self.activity.begin(entry, 0, self.now)

    def step(self) -> None:
        """One second passes with it; who ends by it is told of."""
        plan = self.batcher.plan()
        draft = self.batcher.draft_of(plan)
        events = self.batcher.apply(plan.step, [TOKEN] * plan.num_sampled)
        self.now += 1.0
        counters = self.batcher.counters
        report = StepReport(
            step=plan.step,
            at=self.now,
            seconds=1.0,
            gap_s=0.0,
            waited_s=0.0,
            rows=draft.ids,
            prefill_tokens=draft.prefilled,
            decode_tokens=draft.tokens - draft.prefilled,
            work=draft.work,
            running=len(self.batcher.running),
            waiting=self.batcher.num_waiting,
            kv_usage=0.0,
            preemptions=counters.preemptions,
            recomputed_tokens=counters.recomputed_tokens,
            late_tokens=counters.late_tokens,
            rejected_tokens=counters.rejected_tokens,
            cached_tokens=counters.cached_tokens,
            worker_restarts=0,
            events=events,
        )
        self.activity.observe(report)
        for event in events:
            id, _ = request_of(event.id)
            if event.finish is not None and not any(request_of(other)[0] == id for other in self.batcher._sequences):
                self.activity.end(id, event.finish, self.now)
