"""The iteration loop: plan a step, have the worker run it, apply what came out, say what happened, again."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from protocol.plan import StepFailure, StepPlan, Work, WorkerConfig, WorkerInfo
from protocol.transport import delays
from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher, Start, TokenEvent
from scheduler.core.blocks import BlockPool
from scheduler.core.policies.base import Policy
from scheduler.core.sequence import Sequence
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
    """What one iteration did. ``seconds`` is the worker's own time, ``gap_s`` all the rest of the iteration: planning,
    the way to the worker and back, applying. ``prefill_tokens`` were computed; ``starts`` says what the prefix cache spared those
    who ran for the first time. ``ok`` is false for a step that failed.
    """

    step: int
    at: float
    seconds: float
    gap_s: float
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
    worker_restarts: int
    ok: bool = True
    starts: list[Start] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    given_up: list[Failure] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Planned:
    """A step under way, and who was in it: once it has failed the batcher no longer tells."""

    plan: StepPlan
    rows: tuple[str, ...]
    starts: list[Start]
    begun: float


class Engine:
    """Batcher and worker together; use as ``async with Engine(config) as engine``, with ``engine.run()`` in a task.

    ``reports`` holds one StepReport per iteration, for one consumer. Entering raises WorkerRefused or WorkerDied.
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
    ) -> None:
        self._config = config
        self._policy = policy
        self._patience = patience
        self._prefix_cache = prefix_cache
        self._clock = clock
        self._worker = Worker(config, patience.answer_s)
        self._work_came = asyncio.Event()
        self._pauses = delays()
        self.worker_restarts = 0
        self.worker_up = False
        self.reports: asyncio.Queue[StepReport] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        await self._worker.__aenter__()
        self.worker_up = True
        info = self.info = self._worker.info
        limits = Limits(self._config.max_running, self._config.max_batch_tokens, info.max_model_len)
        pool = BlockPool(info.num_blocks, info.block_size, prefix_cache=self._prefix_cache)
        self.batcher = Batcher(limits, pool, self._policy)
        return self

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

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises CapacityError, or ValueError for an id in use."""
        self.batcher.submit(sequence)
        self._work_came.set()

    def end(self, id: str) -> Sequence | None:
        """Stop a sequence at once, whatever it is doing; no more events name it. None when it isn't here."""
        return self.batcher.end(id)

    async def run(self) -> None:
        """Iterate for ever; sleeps while there is nothing to compute."""
        while True:
            begun = self._clock()
            plan = self.batcher.plan()
            if plan is None:
                await self._rest()
            else:
                await self._iterate(plan, begun)

    async def _rest(self) -> None:
        """Wait for work; now and then see whether the worker is still there."""
        self._work_came.clear()
        try:
            async with asyncio.timeout(self._patience.heartbeat_s):
                await self._work_came.wait()
        except TimeoutError:
            try:
                await self._worker.ping()
            except WorkerDied as error:
                logger.error("the idle worker died: %s", error)
                await self._restart_worker()

    async def _iterate(self, plan: StepPlan, begun: float) -> None:
        planned = _Planned(plan, tuple(self.batcher.row_ids(plan)), self.batcher.starts(plan), begun)
        try:
            result = await self._worker.step(plan)
        except WorkerDied as error:
            self._report(planned, given_up=self._fail(plan, str(error), crashed=True))
            await self._restart_worker()
            return
        if isinstance(result, StepFailure):
            self._report(planned, given_up=self._fail(plan, result.error, crashed=False))
        else:
            self._pauses = delays()
            self._report(planned, result.seconds, self.batcher.apply(result.step, result.tokens))

    def _fail(self, plan: StepPlan, error: str, *, crashed: bool) -> list[Failure]:
        """Have the batcher look for the one at fault, and give it up when this was its last attempt."""
        failed = self.batcher.fail(lost=crashed)
        logger.error("step %d failed with %d sequences in it: %s", plan.step, len(failed), error)
        if len(failed) != 1 or failed[0].failures < self._patience.attempts:
            return []
        self.batcher.end(failed[0].id)
        return [Failure(failed[0].id, error, crashed, failed[0].failures)]

    async def _restart_worker(self) -> None:
        self.worker_up = False
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
        planned: _Planned,
        seconds: float | None = None,
        events: list[TokenEvent] | None = None,
        given_up: list[Failure] | None = None,
    ) -> None:
        batcher, now = self.batcher, self._clock()
        plan = planned.plan
        decodes = sum(1 for row in plan.rows if not row.tokens)
        self.reports.put_nowait(
            StepReport(
                step=plan.step,
                at=now,
                seconds=seconds or 0.0,
                gap_s=now - planned.begun - (seconds or 0.0),
                rows=planned.rows,
                starts=planned.starts,
                prefill_tokens=sum(row.length for row in plan.rows) - decodes,
                decode_tokens=decodes,
                work=plan.work(),
                running=len(batcher.running),
                waiting=batcher.num_waiting,
                kv_usage=1 - batcher.pool.num_free / batcher.pool.num_blocks,
                preemptions=batcher.counters.preemptions,
                recomputed_tokens=batcher.counters.recomputed_tokens,
                late_tokens=batcher.counters.late_tokens,
                cached_tokens=batcher.counters.cached_tokens,
                worker_restarts=self.worker_restarts,
                ok=seconds is not None,
                events=events or [],
                given_up=given_up or [],
            )
        )
