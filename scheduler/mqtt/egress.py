"""Out: what the engine reports becomes numbered pieces, coalesced over a few tens of milliseconds, and one terminal message."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Collection

from protocol.errors import ErrorBody, RequestError, ServiceError
from protocol.plan import NO_TOKEN
from protocol.replies import Accepted, Cancelled, Chunk, Expired, Failed, Terminal
from scheduler.admission import Admission
from scheduler.chat import Chat
from scheduler.choice import Choice
from scheduler.console.activity import Activity
from scheduler.core.batcher import TokenEvent
from scheduler.core.sequence import FinishReason, Sequence
from scheduler.deadlines import Deadlines
from scheduler.generation import Generation
from scheduler.journal.entry import Entry, Journal, Listener, Token, request_of, sequence_id
from scheduler.kinds import Run, run_of
from scheduler.loop import Engine, Failure, StepReport
from scheduler.metrics.series import Metrics
from scheduler.mqtt.delivery import Delivery
from scheduler.outlook import Outlook
from scheduler.prefill import EmbeddingPrefill, Prefill, ScorePrefill
from scheduler.structure import lost_structure
from scheduler.tracing import Tracing

logger = logging.getLogger(__name__)

#: Clients that hear the answer to one request; another one takes the oldest one's place.
_MOST_LISTENERS = 16
#: Cancels of what isn't here are remembered, this many for so long: another replica may have died with it.
_MOST_MISSED, _MISSED_S = 10_000, 300.0


class Egress:
    """Holds every accepted request until it ends."""

    def __init__(
        self,
        delivery: Delivery,
        journal: Journal,
        engine: Engine,
        chat: Chat,
        admission: Admission,
        outlook: Outlook,
        metrics: Metrics,
        activity: Activity,
        tracing: Tracing,
        flush_s: float,
    ) -> None:
        self._delivery = delivery
        self._journal = journal
        self._engine = engine
        self._chat = chat
        self._admission = admission
        self._outlook = outlook
        self._metrics = metrics
        self._activity = activity
        self._tracing = tracing
        self._flush_s = flush_s
        self._deadlines = Deadlines()
        self._runs: dict[str, Run] = {}
        # By the first sequence of each prompt, which says when it is started.
        self._unstarted: dict[str, Run] = {}
        self._dirty: dict[str, Generation] = {}
        self._missed: OrderedDict[str, float] = OrderedDict()
        self._text_came = asyncio.Event()
        self._changed = asyncio.Event()

    def __contains__(self, id: str) -> bool:
        return id in self._runs

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def oldest_waiting_s(self) -> float:
        """For how long the first of those who never ran has been waiting; 0 when nobody is."""
        first = next(iter(self._unstarted.values()), None)
        return 0.0 if first is None else self._engine.now() - first.accepted_at

    def begin(self, entry: Entry) -> None:
        """Run an entry that has its place, and say that it is in. From here on it ends in exactly one terminal message."""
        if entry.is_overdue(time.time()):
            self._admission.release(entry)
            generated = sum(len(piece.tokens) for piece in entry.pieces)
            self._close(entry, Expired(entry.request_id, generated, entry.attempt), "expired")
            return
        try:
            accepted_at = self._engine.now() - max(time.time() - entry.accepted_at, 0)
            run, families = run_of(entry, self._chat, self._engine.info, accepted_at)
            for sequences in families:
                self._engine.submit(*sequences)
        except RequestError as error:
            self._admission.release(entry)
            self.abandon(entry, error.body)
            return
        entry.pieces = []  # the run has them
        self._runs[entry.id] = run
        self._unstarted.update({first.id: run for first, *_ in families})
        self._outlook.begin(entry, run.completion_tokens)
        self._activity.begin(entry, run.completion_tokens, run.accepted_at)
        if entry.expires_at is not None:
            self._deadlines.add(entry.id, entry.expires_at)
        self._metrics.accepted.inc()
        for listener in entry.listeners:
            self._delivery.send(listener, Accepted(entry.request_id))
        if isinstance(run, Generation) and run.streams:
            # Perhaps journalled, one of each choice at once, by a process that died before publishing them.
            for number in run.cut_last():
                self._delivery.publish_chunk(entry.listeners, run.chunk(number))

    def abandon(self, entry: Entry, error: ErrorBody) -> None:
        """End an accepted request that can't run, or may not."""
        self._close(entry, Failed(entry.request_id, error, entry.attempt), "error", error.code)

    def join(self, id: str, listener: Listener) -> Awaitable[None]:
        """Let one more hear the answer, from its beginning."""
        run = self._runs[id]
        entry = run.entry
        self._delivery.send(listener, Accepted(entry.request_id))
        if isinstance(run, Generation) and run.streams:
            for number in range(run.published):
                self._delivery.publish_chunk([listener], run.chunk(number))
        if not any(listener.hears_with(other) for other in entry.listeners):
            entry.listeners = [*entry.listeners, listener][-_MOST_LISTENERS:]
        return self._journal.listen(id, entry.listeners)

    def refuse(self, listener: Listener, request_id: str | None, error: ErrorBody) -> None:
        """Answer a message that isn't accepted."""
        self._metrics.rejections.labels(error.code).inc()
        logger.info("request refused", extra={"topic": listener.topic, "code": error.code, "param": error.param})
        self._delivery.send(listener, Failed(request_id, error))

    def cancel(self, id: str) -> bool:
        """End a running request at its tenant's wish; False when there is none of that id."""
        run = self._runs.get(id)
        if run is not None:
            self._stop(run, Cancelled, "cancelled")
        else:
            self._missed[id] = time.monotonic()
            if len(self._missed) > _MOST_MISSED:
                self._missed.popitem(last=False)
        return run is not None

    def cancel_as_missed(self, id: str) -> None:
        """End a request that was taken over, if it was cancelled while nobody had it."""
        at = self._missed.pop(id, None)
        if at is not None and time.monotonic() - at < _MISSED_S:
            self.cancel(id)

    def ids(self) -> set[str]:
        """Of all that is held."""
        return set(self._runs)

    def drop(self, id: str) -> None:
        """Another replica has taken a request over, and answers it; nothing is said here. Does nothing for one that has ended."""
        run = self._runs.get(id)
        if run is not None:
            self._leave(run, "taken_over")

    def fail_all(self, error: ServiceError) -> None:
        """End everything that runs, for want of a journal to keep it."""
        for run in list(self._runs.values()):
            self._fail(run, error)

    def take_out(self, id: str) -> list[Sequence]:
        """Have a request generate nothing more for now; returns what is to be submitted anew, together, for it to go on."""
        return self._halt(self._runs[id].entry) if id in self._runs else []

    async def wait_empty(self) -> None:
        """Wait until no accepted request is left."""
        while self._runs:
            await self._changes()

    async def wait_for_token(self, id: str) -> None:
        """Wait until a request has generated a token in this process, or ended."""
        while id in self._runs and not self._runs[id].has_spoken:
            await self._changes()

    async def run(self) -> None:
        """Turn reports into text, for ever."""
        while True:
            self._take(await self._engine.reports.get())
            self._changed.set()

    async def expire_overdue(self) -> None:
        """End whatever still runs when its deadline passes, for ever."""
        while True:
            self._stop(self._runs[await self._deadlines.passed()], Expired, "expired")
            await asyncio.sleep(0)  # many may end at once, and others have to go on meanwhile

    async def flush_regularly(self) -> None:
        """Journal and publish what has come since the last time, never more often than every ``flush_s``."""
        while True:
            await self._text_came.wait()
            self._text_came.clear()
            await self._flush()
            await asyncio.sleep(self._flush_s)

    async def _flush(self) -> None:
        """A chunk is published once its tokens are journalled: what a client has seen can't come out otherwise later."""
        dirty, self._dirty = self._dirty, {}
        pieces = [(generation, *piece) for generation in dirty.values() for piece in generation.cut()]
        if not pieces:
            return
        lost = await self._journal.progress([(each.entry.id, number, piece) for each, number, piece in pieces])
        for id in lost:
            self.drop(id)
        for generation, number, _ in pieces:
            generation.published = number + 1
            if generation.streams and generation.entry.id not in lost:
                self._delivery.publish_chunk(generation.entry.listeners, generation.chunk(number))

    async def _changes(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _take(self, report: StepReport) -> None:
        self._metrics.observe_step(report)
        self._outlook.observe(report)
        self._activity.observe(report)
        for id, cached in report.starts.items():
            run = self._run_of(id)
            if run is not None and self._unstarted.pop(id, None) is not None:
                self._take_start(run, cached, report.at - report.seconds)
        self._take_prompts(report)
        for event in report.events:
            id, index = request_of(event.id)
            run = self._runs.get(id)
            # A stop string may have ended the choice with a token before, too late for the engine.
            if isinstance(run, Generation) and (choice := run.choices[index]).reason is None:
                self._take_event(run, choice, event, report)
        for failure in report.given_up:
            run = self._run_of(failure.id)
            if run is not None:
                self._give_up(run, failure)

    def _take_prompts(self, report: StepReport) -> None:
        for id, (first, scored) in report.prompts.items():
            run = self._run_of(id)
            if isinstance(run, Generation | ScorePrefill):
                run.score_prompt(first, scored)
        for id, (start, part) in report.pooled.items():
            run = self._run_of(id)
            if isinstance(run, EmbeddingPrefill):
                run.pool(id, start, part)
        for id in report.prefills:
            run = self._run_of(id)
            if isinstance(run, Prefill):
                self._complete(run, report.at)

    def _run_of(self, id: str) -> Run | None:
        """Whose sequence it is."""
        return self._runs.get(request_of(id)[0])

    def _take_start(self, run: Run, cached: int, at: float) -> None:
        series = self._metrics.of(run.entry.tenant)
        if run.started_at is None:
            run.started_at = at
            series.queue.observe(at - run.accepted_at)
            series.prompt.inc(len(run.entry.prompt))
        run.cached_tokens += cached
        series.cached.inc(cached)

    def _complete(self, run: Prefill, at: float) -> None:
        run.complete()
        if run.is_whole:
            try:
                result = run.result(at)
            except ServiceError as error:
                self._fail(run, error)
            else:
                self._end(run, result, "computed")

    def _take_event(self, generation: Generation, choice: Choice, event: TokenEvent, report: StepReport) -> None:
        if event.token == NO_TOKEN:
            self._fail(generation, lost_structure(generation.request))
        else:
            self._take_token(generation, choice, report.scored.get(event.id, event.token), event.finish, report.at)

    def _take_token(
        self, generation: Generation, choice: Choice, token: Token, finish: FinishReason | None, at: float
    ) -> None:
        series, id = self._metrics.of(generation.entry.tenant), generation.entry.id
        series.generated.inc()
        if choice.last_token_at is not None:
            series.itl.observe(at - choice.last_token_at)
        elif generation.completion_tokens == 0:  # else a sibling, or an earlier process, gave the first one
            series.ttft.observe(at - generation.accepted_at)
        self._admission.generated(generation.entry)
        generation.push(choice, token, at, finish)
        if choice.reason is not None and finish is None:
            self._engine.end(sequence_id(id, choice.index))
        if choice.reason is not None and not generation.unended():
            last = generation.last_chunks()
            self._end(generation, generation.result(at), generation.outcome, last)
        else:
            self._dirty[id] = generation
            self._text_came.set()

    def _give_up(self, run: Run, failure: Failure) -> None:
        if not failure.crashed:
            self._fail(run, ServiceError("internal", "the model failed on every step with this request in it"))
            return
        entry = run.entry
        reason = f"the worker died {failure.failures} times with this request in its step, at last with it alone"
        self._delivery.quarantine(entry, reason, failure.failures)
        self._fail(run, ServiceError("quarantined", reason))

    def _fail(self, run: Run, error: RequestError) -> None:
        entry = run.entry
        self._end(run, Failed(entry.request_id, error.body, entry.attempt), "error")

    def _stop(self, run: Run, kind: type[Cancelled | Expired], outcome: str) -> None:
        entry = run.entry
        self._end(run, kind(entry.request_id, run.completion_tokens, entry.attempt), outcome)

    def _close(self, entry: Entry, reply: Terminal, outcome: str, why: str | None = None) -> None:
        """End an accepted request that never began here."""
        self._metrics.accepted.inc()
        self._metrics.of(entry.tenant).outcomes[outcome].inc()
        logger.info(
            "request ended",
            extra={"tenant": entry.tenant, "request_id": entry.request_id, "outcome": why or outcome},
        )
        self._delivery.finish(entry, reply)

    def _end(self, run: Run, reply: Terminal, outcome: str, last: Collection[Chunk] = ()) -> None:
        self._leave(run, outcome)
        delivered = self._delivery.finish(run.entry, reply, last)
        self._tracing.ended(run, reply, delivered)

    def _halt(self, entry: Entry) -> list[Sequence]:
        """Stop whatever still runs of it."""
        return [sequence for id in entry.sequence_ids if (sequence := self._engine.end(id)) is not None]

    def _leave(self, run: Run, outcome: str) -> None:
        """It is held no longer, nor computed."""
        entry = run.entry
        self._halt(entry)
        del self._runs[entry.id]
        for id in entry.sequence_ids:
            self._unstarted.pop(id, None)
        self._dirty.pop(entry.id, None)
        if entry.expires_at is not None:
            self._deadlines.drop(entry.id, entry.expires_at)
        self._admission.leave(entry)
        self._outlook.end(entry.id)
        now = self._engine.now()
        self._activity.end(entry.id, outcome, now)
        timings = run.timings(now)
        series = self._metrics.of(entry.tenant)
        series.outcomes[outcome].inc()
        series.e2e.observe(timings.total_s)
        logger.info(
            "request ended",
            extra={
                "tenant": entry.tenant,
                "request_id": entry.request_id,
                "outcome": outcome,
                "attempt": entry.attempt,
                "prompt_tokens": len(entry.prompt),
                "completion_tokens": run.completion_tokens,
                "queued_s": round(timings.queued_s, 4),
                "ttft_s": None if timings.ttft_s is None else round(timings.ttft_s, 4),
                "total_s": round(timings.total_s, 4),
            },
        )
        self._changed.set()
