"""The iteration loop: plan a step, have the worker run it, apply what came out, say what happened, again.

While the worker runs a step the next one is planned and sent, as late as may be (``lead.py``), so that the worker goes on at once
and what came of the step before is published meanwhile. A step that fails makes those sent after it void.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from protocol.plan import Scored, StepFailure, StepResult, Work, WorkerConfig, WorkerInfo
from protocol.transport import delays
from scheduler.budget import Budget
from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher, TokenEvent
from scheduler.core.blocks import BlockPool
from scheduler.core.draft import Draft
from scheduler.core.policies.base import Policy
from scheduler.core.sequence import Sequence
from scheduler.core.speculation import Speculation
from scheduler.lead import Lead
from scheduler.worker import Worker, WorkerDied

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a worker may take over an answer, how often an idle one is asked for one, and how many steps may fail
    with a sequence in them before it is given up, once it was alone in the last of them."""

    answer_s: float = 60.0
    heartbeat_s: float = 5.0
    attempts: int = 3


@dataclass(frozen=True, slots=True)
class Failure:
    """A sequence that was given up after so many failures; ``crashed``: it took the worker with it."""

    id: str
    error: str
    crashed: bool
    failures: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one iteration did. ``seconds`` is the worker's own time, ``gap_s`` the rest of the time since the result before, or
    since there was work; it is negative when that result was read late. ``waited_s``: how long the worker had waited for the plan
    while there was work. ``prefill_tokens`` were computed; ``starts`` says how many tokens the prefix cache spared those who ran
    for the first time; in all, ``forked_tokens`` of prompts were had from siblings. ``accepted``: drafts of each verification
    that drafted any. ``scored`` are those of the events' tokens that were to be, ``prompts`` prompt tokens from a position on,
    ``pooled`` what is made of the hidden states from a position on, all by sequence. ``prefills`` wanted no more than their
    prompts computed, and have ended. ``ok`` is false for a step that failed. ``plan_s``: how long it took to plan. ``charges``:
    service units that tenants were charged since the report before.
    """

    step: int
    at: float
    seconds: float
    gap_s: float
    waited_s: float
    rows: tuple[str, ...]
    prefill_tokens: int
    decode_tokens: int
    work: Work
    running: int
    waiting: int
    kv_usage: float
    preemptions: int
    recomputed_tokens: int
    late_tokens: int
    cached_tokens: int
    rejected_tokens: int
    worker_restarts: int
    cancelled_tokens: int = 0
    forked_tokens: int = 0
    plan_s: float = 0.0
    ok: bool = True
    starts: dict[str, int] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    scored: dict[str, Scored] = field(default_factory=dict)
    prompts: dict[str, tuple[int, list[Scored]]] = field(default_factory=dict)
    pooled: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    prefills: list[str] = field(default_factory=list)
    given_up: list[Failure] = field(default_factory=list)
    charges: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in the worker's pipe: ``tokens`` are computed in it. ``after_rest``: there was no work before it."""

    draft: Draft
    tokens: int
    after_rest: bool
    plan_s: float


class Engine:
    """Batcher and worker together; use as ``async with Engine(config) as engine``, with ``engine.run()`` in a task. It can be
    launched and waited for apart, as a ``Worker`` can.

    ``reports`` holds one StepReport per iteration, for one consumer. ``itl_target_s``: about how long a step may take while
    somebody decodes. ``lead`` says when the next step is planned while one runs.
    Entering raises WorkerRefused or WorkerDied.
    """

    info: WorkerInfo

    def __init__(
        self,
        config: WorkerConfig,
        patience: Patience = Patience(),
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        prefix_cache: bool = True,
        speculation: Speculation | None = None,
        itl_target_s: float | None = None,
        lead: Lead | None = None,
    ) -> None:
        self._config = config
        self._speculation = speculation
        self._policy = policy
        self._patience = patience
        self._prefix_cache = prefix_cache
        self._clock = clock
        self._lead = lead or Lead()
        self._budget = Budget(itl_target_s)
        self._in_flight: deque[_Step] = deque()
        self._resting = True
        self._busy_since = 0.0
        self._worker = Worker(config, patience.answer_s)
        self._work_came = asyncio.Event()
        self._pauses = delays()
        self.worker_restarts = 0
        self.worker_up = False
        self.reports: asyncio.Queue[StepReport] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        await self.launch()
        await self.get_ready()
        return self

    async def launch(self) -> None:
        """Start the worker's process."""
        await self._worker.launch()

    async def get_ready(self) -> None:
        """Wait until the worker is ready. Raises WorkerRefused, WorkerDied."""
        await self._worker.get_ready()
        self.worker_up = True
        info = self.info = self._worker.info
        limits = Limits(
            self._config.max_running, self._config.max_batch_tokens, info.max_model_len, self._config.max_adapters
        )
        pool = BlockPool(info.num_blocks, info.block_size, prefix_cache=self._prefix_cache)
        self.batcher = Batcher(limits, pool, self._policy, self._speculation)

    async def __aexit__(self, *_: object) -> None:
        await self._worker.__aexit__(None, None, None)

    @property
    def worker_pid(self) -> int:
        return self._worker.pid

    @property
    def worker_owes_since_s(self) -> float:
        """For how long the worker has owed an answer."""
        return self._worker.owes_since_s

    def now(self) -> float:
        """Seconds on the clock that reports are stamped with."""
        return self._clock()

    def submit(self, *sequences: Sequence) -> None:
        """Queue a sequence, or several with the same prompt. Raises CapacityError, or ValueError for an id in use."""
        self.batcher.submit(*sequences)
        self._work_came.set()

    def end(self, id: str) -> Sequence | None:
        """Stop a sequence at once, whatever it is doing; no more events name it. None when it isn't here."""
        return self.batcher.end(id)

    async def run(self) -> None:
        """Iterate for ever; sleeps while there is nothing to compute."""
        while True:
            if self._in_flight or self._send_next():
                await self._finish_oldest()
            else:
                await self._rest()

    def _send_next(self) -> bool:
        """Plan a step and put it into the worker's pipe; says whether there was anything to compute."""
        begun = self._clock()
        plan = self.batcher.plan(self._budget.tokens())
        if plan is None:
            return False
        plan_s = self._clock() - begun
        self._worker.send(plan)
        draft = self.batcher.draft_of(plan)
        self._in_flight.append(_Step(draft, draft.tokens, after_rest=self._resting, plan_s=plan_s))
        if self._resting:
            self._resting, self._busy_since = False, begun
        return True

    async def _finish_oldest(self) -> None:
        """Wait for the oldest step in flight, and see what came of it."""
        try:
            answer = await self._answer()
        except WorkerDied as error:
            self._fail(str(error), crashed=True)
            await self._restart_worker()
            return
        if isinstance(answer, StepFailure):
            self._fail(answer.error, crashed=False)
        else:
            self._apply(answer)

    async def _answer(self) -> StepResult | StepFailure:
        """The answer to the one step in flight. If it isn't there by then, the next step is sent when it is time for that."""
        try:
            async with asyncio.timeout(self._lead.delay_s(self._in_flight[0].tokens)):
                return await self._worker.receive()
        except TimeoutError:
            self._send_next()
        return await self._worker.receive()

    async def _rest(self) -> None:
        """Wait for work; now and then see whether the worker is still there."""
        self._resting = True
        self._work_came.clear()
        try:
            async with asyncio.timeout(self._patience.heartbeat_s):
                await self._work_came.wait()
        except TimeoutError:
            try:
                await self._worker.ping()
            except WorkerDied as error:
                logger.error("the idle worker died: %s", error)
                self.batcher.restart()
                await self._restart_worker()

    def _apply(self, result: StepResult) -> None:
        self._pauses = delays()
        step = self._in_flight.popleft()
        waited_s = 0.0 if step.after_rest else result.waited_s
        draft = step.draft
        events = self.batcher.apply(result.step, result.tokens, result.verdicts)
        self._lead.observe(draft.tokens, result.seconds, waited_s)
        self._budget.observe(draft.tokens, result.seconds)
        self._report(
            step,
            draft.starts,
            seconds=result.seconds,
            waited_s=waited_s,
            accepted=[verdict.accepted for verdict in result.verdicts if verdict.drafted],
            events=events,
            scored={draft.samplers[index].id: scored for index, scored in result.scored.items()},
            prompts={draft.owners[row][0].id: (draft.first_scored(row), part) for row, part in result.prompts.items()},
            pooled={draft.owners[row][0].id: (draft.rows[row].start, part) for row, part in result.pooled.items()},
            prefills=[sequence.id for sequence in draft.prefills],
        )

    def _fail(self, error: str, *, crashed: bool) -> None:
        """The oldest step failed, the others are void: the batcher looks for the one at fault, which may have no attempt left."""
        steps = list(self._in_flight)
        self._in_flight.clear()
        failed = self.batcher.fail(lost=crashed)
        logger.error("step %d failed with %d sequences in it: %s", steps[0].draft.step, len(failed), error)
        given_up = []
        if len(failed) == 1 and failed[0].failures >= self._patience.attempts:
            self.batcher.end(failed[0].id)
            given_up = [Failure(failed[0].id, error, crashed, failed[0].failures)]
        starts = {id: cached for step in steps for id, cached in step.draft.starts.items()}
        self._report(steps[0], starts, ok=False, given_up=given_up)

    async def _restart_worker(self) -> None:
        self.worker_up = False
        self._resting = True
        await self._worker.__aexit__(None, None, None)
        while True:
            await asyncio.sleep(next(self._pauses))
            try:
                self._worker = await Worker(self._config, self._patience.answer_s).__aenter__()
            except WorkerDied as error:
                logger.error("the worker died while starting: %s", error)
                continue
            self.worker_restarts += 1
            self.worker_up = True
            logger.warning("the worker is back as process %d", self._worker.pid)
            return

    def _report(
        self,
        step: _Step,
        starts: dict[str, int],
        *,
        seconds: float = 0.0,
        waited_s: float = 0.0,
        ok: bool = True,
        accepted: list[int] | None = None,
        events: list[TokenEvent] | None = None,
        scored: dict[str, Scored] | None = None,
        prompts: dict[str, tuple[int, list[Scored]]] | None = None,
        pooled: dict[str, tuple[int, bytes]] | None = None,
        prefills: list[str] | None = None,
        given_up: list[Failure] | None = None,
    ) -> None:
        batcher, draft, now = self.batcher, step.draft, self._clock()
        since, self._busy_since = self._busy_since, now
        work = draft.work
        self.reports.put_nowait(
            StepReport(
                step=draft.step,
                at=now,
                seconds=seconds,
                gap_s=now - since - seconds,
                waited_s=waited_s,
                rows=draft.ids,
                starts=starts,
                prefill_tokens=draft.prefilled,
                decode_tokens=work.tokens - draft.prefilled,
                work=work,
                running=len(batcher.running),
                waiting=batcher.num_waiting,
                kv_usage=1 - batcher.pool.num_free / batcher.pool.num_blocks,
                preemptions=batcher.counters.preemptions,
                recomputed_tokens=batcher.counters.recomputed_tokens,
                late_tokens=batcher.counters.late_tokens,
                cached_tokens=batcher.counters.cached_tokens,
                rejected_tokens=batcher.counters.rejected_tokens,
                worker_restarts=self.worker_restarts,
                cancelled_tokens=batcher.counters.cancelled_tokens,
                forked_tokens=batcher.counters.forked_tokens,
                plan_s=step.plan_s,
                ok=ok,
                accepted=accepted or [],
                events=events or [],
                scored=scored or {},
                prompts=prompts or {},
                pooled=pooled or {},
                prefills=prefills or [],
                given_up=given_up or [],
                charges=batcher.queue.take_charges(),
            )
        )
