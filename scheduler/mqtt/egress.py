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
from scheduler.choice import Choice, request_of, sequence_id
from scheduler.console.activity import Activity
from scheduler.core.sequence import FinishReason, Sequence
from scheduler.deadlines import Deadlines
from scheduler.generation import Generation, check_runs, sequences_for
from scheduler.journal.entry import Entry, Journal, Listener, Token
from scheduler.loop import Engine, Failure, StepReport
from scheduler.metrics.series import Metrics
from scheduler.mqtt.delivery import Delivery
from scheduler.outlook import Outlook
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
        self._generations: dict[str, Generation] = {}
        self._unstarted: dict[str, Generation] = {}
        self._dirty: set[str] = set()
        self._missed: OrderedDict[str, float] = OrderedDict()
        self._text_came = asyncio.Event()
        self._changed = asyncio.Event()

    def __contains__(self, id: str) -> bool:
        return id in self._generations

    def __len__(self) -> int:
        return len(self._generations)

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
            check_runs(entry, self._engine.info)
            generation = Generation.of(entry, self._chat, self._engine.now() - max(time.time() - entry.accepted_at, 0))
            self._engine.submit(*sequences_for(generation, self._engine.info))
        except RequestError as error:
            self._admission.release(entry)
            self.abandon(entry, error.body)
            return
        self._generations[entry.id] = self._unstarted[entry.id] = generation
        self._outlook.begin(entry, generation.completion_tokens)
        self._activity.begin(entry, generation.completion_tokens, generation.accepted_at)
        if entry.expires_at is not None:
            self._deadlines.add(entry.id, entry.expires_at)
        self._metrics.accepted.inc()
        for listener in entry.listeners:
            self._delivery.send(listener, Accepted(entry.request_id))
        if generation.streams and generation.published:
            # Perhaps journalled by a process that died before publishing it.
            self._delivery.publish_chunk(entry.listeners, generation.chunk(generation.published - 1))

    def abandon(self, entry: Entry, error: ErrorBody) -> None:
        """End an accepted request that can't run, or may not."""
        self._close(entry, Failed(entry.request_id, error, entry.attempt), "error", error.code)

    def join(self, id: str, listener: Listener) -> Awaitable[None]:
        """Let one more hear the answer, from its beginning."""
        generation = self._generations[id]
        entry = generation.entry
        self._delivery.send(listener, Accepted(entry.request_id))
        if generation.streams:
            for number in range(generation.published):
                self._delivery.publish_chunk([listener], generation.chunk(number))
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
        generation = self._generations.get(id)
        if generation is not None:
            self._stop(generation, Cancelled, "cancelled")
        else:
            self._missed[id] = time.monotonic()
            if len(self._missed) > _MOST_MISSED:
                self._missed.popitem(last=False)
        return generation is not None

    def cancel_as_missed(self, id: str) -> None:
        """End a request that was taken over, if it was cancelled while nobody had it."""
        at = self._missed.pop(id, None)
        if at is not None and time.monotonic() - at < _MISSED_S:
            self.cancel(id)

    def ids(self) -> set[str]:
        """Of all that is held."""
        return set(self._generations)

    def drop(self, id: str) -> None:
        """Another replica has taken a request over, and answers it; nothing is said here. Does nothing for one that has ended."""
        generation = self._generations.get(id)
        if generation is not None:
            self._leave(generation, "taken_over")

    def fail_all(self, error: ServiceError) -> None:
        """End everything that runs, for want of a journal to keep it."""
        for generation in list(self._generations.values()):
            self._fail(generation, error)

    def take_out(self, id: str) -> list[Sequence]:
        """Have a request generate nothing more for now; returns what is to be submitted anew, together, for it to go on."""
        return [] if id not in self._generations else self._halt(self._generations[id])

    async def wait_empty(self) -> None:
        """Wait until no accepted request is left."""
        while self._generations:
            await self._changes()

    async def wait_for_token(self, id: str) -> None:
        """Wait until a request has generated a token in this process, or ended."""
        while id in self._generations and not self._generations[id].has_spoken:
            await self._changes()

    async def run(self) -> None:
        """Turn reports into text, for ever."""
        while True:
            self._take(await self._engine.reports.get())
            self._changed.set()

    async def expire_overdue(self) -> None:
        """End whatever still runs when its deadline passes, for ever."""
        while True:
            generation = self._generations[await self._deadlines.passed()]
            self._stop(generation, Expired, "expired")
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
        dirty, self._dirty = self._dirty, set()
        generations = [self._generations[id] for id in dirty]
        pieces = [(generation, *piece) for generation in generations for piece in generation.cut()]
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
            generation = self._unstarted.pop(request_of(id)[0], None)
            if generation is not None:
                self._take_start(generation, cached, report.at - report.seconds)
        for id, (first, scored) in report.prompts.items():
            generation = self._generations.get(request_of(id)[0])
            if generation is not None:
                generation.score_prompt(first, scored)
        for event in report.events:
            id, index = request_of(event.id)
            generation = self._generations.get(id)
            if generation is None or generation.choices[index].reason is not None:
                continue  # it came before the engine heard of the end
            if event.token == NO_TOKEN:
                self._fail(generation, lost_structure(generation.entry.request))
                continue
            token = report.scored.get(event.id, event.token)
            self._take_token(generation, generation.choices[index], token, event.finish, report.at)
        for failure in report.given_up:
            generation = self._generations.get(request_of(failure.id)[0])
            if generation is not None:
                self._give_up(generation, failure)

    def _take_start(self, generation: Generation, cached: int, at: float) -> None:
        generation.started_at, generation.cached_tokens = at, cached
        series = self._metrics.of(generation.entry.tenant)
        series.queue.observe(at - generation.accepted_at)
        series.prompt.inc(len(generation.entry.prompt))
        series.cached.inc(cached)

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
            self._dirty.add(id)
            self._text_came.set()

    def _give_up(self, generation: Generation, failure: Failure) -> None:
        if not failure.crashed:
            self._fail(generation, ServiceError("internal", "the model failed on every step with this request in it"))
            return
        entry = generation.entry
        reason = f"the worker died {failure.failures} times with this request in its step, at last with it alone"
        self._delivery.quarantine(entry, reason, failure.failures)
        self._fail(generation, ServiceError("quarantined", reason))

    def _fail(self, generation: Generation, error: RequestError) -> None:
        entry = generation.entry
        self._end(generation, Failed(entry.request_id, error.body, entry.attempt), "error")

    def _stop(self, generation: Generation, kind: type[Cancelled | Expired], outcome: str) -> None:
        entry = generation.entry
        self._end(generation, kind(entry.request_id, generation.completion_tokens, entry.attempt), outcome)

    def _close(self, entry: Entry, reply: Terminal, outcome: str, why: str | None = None) -> None:
        """End an accepted request that never began here."""
        self._metrics.accepted.inc()
        self._metrics.of(entry.tenant).outcomes[outcome].inc()
        logger.info(
            "request ended",
            extra={"tenant": entry.tenant, "request_id": entry.request_id, "outcome": why or outcome},
        )
        self._delivery.finish(entry, reply)

    def _end(self, generation: Generation, reply: Terminal, outcome: str, last: Collection[Chunk] = ()) -> None:
        self._leave(generation, outcome)
        delivered = self._delivery.finish(generation.entry, reply, last)
        self._tracing.ended(generation, reply, delivered)

    def _halt(self, generation: Generation) -> list[Sequence]:
        """Stop whatever still runs of it."""
        ids = [sequence_id(generation.entry.id, choice.index) for choice in generation.unended()]
        return [sequence for id in ids if (sequence := self._engine.end(id)) is not None]

    def _leave(self, generation: Generation, outcome: str) -> None:
        """It is held no longer."""
        self._halt(generation)
        entry = generation.entry
        del self._generations[entry.id]
        self._unstarted.pop(entry.id, None)
        self._dirty.discard(entry.id)
        if entry.expires_at is not None:
            self._deadlines.drop(entry.id, entry.expires_at)
        self._admission.leave(entry)
        self._outlook.end(entry.id)
        now = self._engine.now()
        self._activity.end(entry.id, outcome, now)
        timings = generation.timings(now)
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
                "completion_tokens": generation.completion_tokens,
                "queued_s": round(timings.queued_s, 4),
                "ttft_s": None if timings.ttft_s is None else round(timings.ttft_s, 4),
                "total_s": round(timings.total_s, 4),
            },
        )
        self._changed.set()
