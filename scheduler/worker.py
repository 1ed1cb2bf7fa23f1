"""The worker process as the scheduler sees it: started, told plans, answering results; it may die or hang at any time."""

import asyncio
import os
import sys
import time
from types import TracebackType
from typing import Self

from protocol import plan
from protocol.plan import Command, Ping, Pong, Reply, StepFailure, StepPlan, StepResult, WorkerConfig, WorkerInfo

_STOP_S = 5.0

#: OpenMP threads spin at every barrier; when another process has one of their cores, each barrier would cost a time slice.
#: A short spin costs nothing alone and keeps the worker usable on a shared machine (docs/decisions/0004-shared-cores.md).
ENVIRONMENT = {"GOMP_SPINCOUNT": "2000"}


class WorkerDied(Exception):
    """The process ended, was killed because it didn't answer in time, or never became ready."""


class WorkerRefused(Exception):
    """The worker says that it can't serve this configuration; trying again won't help."""


class Worker:
    """One process; use as ``async with Worker(config) as worker``. Entering waits until it is ready.

    It has ``patience_s`` to answer. Raises WorkerRefused or WorkerDied.
    """

    info: WorkerInfo

    def __init__(self, config: WorkerConfig, patience_s: float) -> None:
        self._config = config
        self._patience_s = patience_s
        self._asked_at: float | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "workers",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=ENVIRONMENT | os.environ,
        )
        try:
            self._send(self._config)
            self.info = _ready(await self._receive())
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def owes_since_s(self) -> float:
        """For how long an answer has been due."""
        return 0.0 if self._asked_at is None else time.monotonic() - self._asked_at

    async def step(self, step: StepPlan) -> StepResult | StepFailure:
        """Execute one plan. Raises WorkerDied."""
        answer = await self._ask(step)
        if not isinstance(answer, StepResult | StepFailure):
            raise WorkerDied(f"the worker answered {type(answer).__name__} to a plan")
        return answer

    async def ping(self) -> None:
        """Have it say that it is there. Raises WorkerDied."""
        answer = await self._ask(Ping())
        if not isinstance(answer, Pong):
            raise WorkerDied(f"the worker answered {type(answer).__name__} to a ping")

    async def _ask(self, command: Command) -> Reply:
        self._asked_at = time.monotonic()
        try:
            self._send(command)
            async with asyncio.timeout(self._patience_s):
                return await self._receive()
        except TimeoutError:
            self._process.kill()
            raise WorkerDied(f"the worker gave no answer within {self._patience_s:g} s and was killed") from None
        finally:
            self._asked_at = None

    def _send(self, message: WorkerConfig | Command) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(plan.frame(message))

    async def _receive(self) -> Reply:
        assert self._process.stdout is not None
        try:
            header = await self._process.stdout.readexactly(plan.HEADER_BYTES)
            body = await self._process.stdout.readexactly(plan.body_length(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._process.wait()
            raise WorkerDied(f"the worker process ended with status {code}") from None
        reply: Reply = plan.decode_reply(body)
        return reply

    async def _stop(self) -> None:
        """Closing its stdin asks it to leave; it is killed when it doesn't."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def _ready(answer: Reply) -> WorkerInfo:
    if isinstance(answer, plan.StartFailure):
        raise WorkerRefused(answer.error)
    if not isinstance(answer, WorkerInfo):
        raise WorkerDied(f"the worker answered {type(answer).__name__} before it was ready")
    return answer
