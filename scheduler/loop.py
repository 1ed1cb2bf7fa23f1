"""The iteration loop: plan a step, have the worker run it, apply what came out, say what happened, again."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from protocol.plan import StepFailure, StepPlan, WorkerConfig, WorkerInfo
from scheduler.core.batcher import Batcher, Limits, TokenEvent
from scheduler.core.blocks import BlockPool
from scheduler.core.sequence import Sequence
from scheduler.worker import Worker, WorkerDied

logger = logging.getLogger(__name__)

#: Steps that may fail one after the other, with worker restarts between, before the running sequences are given up.
_MOST_FAILURES = 3
_RESTART_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one iteration did. ``seconds`` is the worker's own time, ``gap_s`` all the rest of the iteration: planning,
    the way to the worker and back, applying.

    ``failed`` are sequences given up because steps with them kept failing.
    """

    step: int
    at: float
    seconds: float
    gap_s: float
    rows: tuple[str, ...]
    prefill_tokens: int
    decode_tokens: int
    running: int
    waiting: int
    kv_usage: float
    preemptions: int
    recomputed_tokens: int
    late_tokens: int
    worker_restarts: int
    events: list[TokenEvent] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Engine:
    """Batcher and worker together; use as ``async with Engine(config) as engine``, with ``engine.run()`` in a task.

    ``reports`` holds one StepReport per iteration, for one consumer. Entering raises WorkerRefused or WorkerDied.
    """

    info: WorkerInfo

    def __init__(self, config: WorkerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._worker = Worker(config)
        self._work_came = asyncio.Event()
        self._failures = 0
        self.worker_restarts = 0
        self.worker_up = False
        self.reports: asyncio.Queue[StepReport] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        await self._worker.__aenter__()
        self.worker_up = True
        info = self.info = self._worker.info
        limits = Limits(self._config.max_running, self._config.max_batch_tokens, info.max_model_len)
        self.batcher = Batcher(limits, BlockPool(info.num_blocks, info.block_size))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._worker.__aexit__(None, None, None)

    @property
    def worker_pid(self) -> int:
        return self._worker.pid

    def now(self) -> float:
        """Seconds on the clock that reports are stamped with."""
        return self._clock()

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises CapacityError, or ValueError for an id in use."""
        self.batcher.submit(sequence)
        self._work_came.set()

    def end(self, id: str) -> None:
        """Stop a sequence at once, whatever it is doing; no more events name it."""
        self.batcher.end(id)

    async def run(self) -> None:
        """Iterate for ever; sleeps while there is nothing to compute."""
        while True:
            begun = self._clock()
            plan = self.batcher.plan()
            if plan is None:
                self._work_came.clear()
                await self._work_came.wait()
                continue
            await self._iterate(plan, begun)

    async def _iterate(self, plan: StepPlan, begun: float) -> None:
        ids = tuple(self.batcher.row_ids(plan))
        try:
            result = await self._worker.step(plan)
        except WorkerDied as error:
            logger.error("the worker died in step %d: %s", plan.step, error)
            await self._restart_worker()
            result = StepFailure(plan.step, str(error))
        if isinstance(result, StepFailure):
            self._report(plan, ids, begun, 0.0, [], self._give_up_if_hopeless(result))
        else:
            self._failures = 0
            events = self.batcher.apply(result.step, result.tokens)
            self._report(plan, ids, begun, result.seconds, events, [])

    def _give_up_if_hopeless(self, failure: StepFailure) -> list[str]:
        """Everything that ran is computed again; after too many failures it is ended instead."""
        self._failures += 1
        logger.error("step %d failed (%d in a row): %s", failure.step, self._failures, failure.error)
        culprits = [sequence.id for sequence in self.batcher.running]
        self.batcher.restart()
        if self._failures < _MOST_FAILURES:
            return []
        self._failures = 0
        for id in culprits:
            self.batcher.end(id)
        return culprits

    async def _restart_worker(self) -> None:
        self.worker_up = False
        await self._worker.__aexit__(None, None, None)
        while True:
            await asyncio.sleep(_RESTART_PAUSE_S)
            try:
                self._worker = await Worker(self._config).__aenter__()
            except WorkerDied as error:
                logger.error("the worker died while starting: %s", error)
                continue
            self.worker_restarts += 1
            self.worker_up = True
            logger.warning("the worker is back as process %d", self._worker.pid)
            return

    def _report(
        self,
        plan: StepPlan,
        ids: tuple[str, ...],
        begun: float,
        seconds: float,
        events: list[TokenEvent],
        failed: list[str],
    ) -> None:
        batcher, now = self.batcher, self._clock()
        decodes = sum(1 for row in plan.rows if not row.tokens)
        self.reports.put_nowait(
            StepReport(
                step=plan.step,
                at=now,
                seconds=seconds,
                gap_s=now - begun - seconds,
                rows=ids,
                prefill_tokens=sum(row.length for row in plan.rows) - decodes,
                decode_tokens=decodes,
                running=len(batcher.running),
                waiting=batcher.num_waiting,
                kv_usage=1 - batcher.pool.num_free / batcher.pool.num_blocks,
                preemptions=batcher.counters.preemptions,
                recomputed_tokens=batcher.counters.recomputed_tokens,
                late_tokens=batcher.counters.late_tokens,
                worker_restarts=self.worker_restarts,
                events=events,
                failed=failed,
            )
        )
