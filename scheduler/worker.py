"""The worker process as the scheduler sees it: started, told plans, answering results; it may die or hang at any time."""

import asyncio
import contextlib
import os
import sys
import time
from types import TracebackType
from typing import Self

from protocol import plan
from protocol.plan import (
    Command,
    Ping,
    Pong,
    Reply,
    Resume,
    StepFailure,
    StepPlan,
    StepResult,
    WorkerConfig,
    WorkerInfo,
)

#: What is run.
COMMAND = (sys.executable, "-m", "workers")

_STOP_S = 5.0

#: OpenMP threads spin at every barrier; when another process has one of their cores, each barrier would cost a time slice.
#: A short spin costs nothing alone and keeps the worker usable on a shared machine (docs/decisions/0004-shared-cores.md).
#: And malloc keeps what a step frees, for the next one asks for as much again: else the kernel takes tens of MB back and clears
#: them page by page, in every step that draws tokens (mallopt(3); docs/decisions/0019-freed-memory-is-kept.md).
ENVIRONMENT = {
    "GOMP_SPINCOUNT": "2000",
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # glibc takes no more
}


class WorkerDied(Exception):
    """The process ended, was killed because it didn't answer in time, or never became ready."""


class WorkerRefused(Exception):
    """The worker says that it can't serve this configuration; trying again won't help."""


class Worker:
    """One process; use as ``async with Worker(config) as worker``. Entering waits until it is ready; who has something else to do
    meanwhile calls ``launch``, later ``get_ready``, and exits whatever happens.

    It has ``patience_s`` to answer. Raises WorkerRefused or WorkerDied.
    """

    info: WorkerInfo

    def __init__(self, config: WorkerConfig, patience_s: float) -> None:
        self._config = config
        self._patience_s = patience_s
        self._owed = 0
        self._owing_since: float | None = None
        self._header: bytes | None = None
        self._is_ready = False

    async def __aenter__(self) -> Self:
        await self.launch()
        await self.get_ready()
        return self

    async def launch(self) -> None:
        """Start the process."""
        self._process = await asyncio.create_subprocess_exec(
            *COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=ENVIRONMENT | os.environ,
        )
        self._write(self._config)

    async def get_ready(self) -> None:
        """Wait until it has loaded its model. Raises WorkerRefused, WorkerDied, and then has ended."""
        try:
            self.info = _ready(await self._read())
            self._is_ready = True
        except BaseException:
            await self._stop()
            raise

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
        return 0.0 if self._owing_since is None else time.monotonic() - self._owing_since

    def send(self, step: StepPlan) -> None:
        """Have a plan executed, after those sent before."""
        self._ask(step)

    async def receive(self) -> StepResult | StepFailure:
        """The answer to the oldest plan sent; may be cancelled and called again. Raises WorkerDied.

        After a StepFailure the plans sent meanwhile are void: they aren't executed, and no answer comes.
        """
        answer = await self._answer()
        if isinstance(answer, StepFailure):
            self._owed, self._owing_since = 0, None
            self._write(Resume())
        elif not isinstance(answer, StepResult):
            raise WorkerDied(f"the worker answered {type(answer).__name__} to a plan")
        return answer

    async def ping(self) -> None:
        """Have an idle one say that it is there. Raises WorkerDied."""
        self._ask(Ping())
        answer = await self._answer()
        if not isinstance(answer, Pong):
            raise WorkerDied(f"the worker answered {type(answer).__name__} to a ping")

    def _ask(self, command: StepPlan | Ping) -> None:
        if not self._owed:
            self._owing_since = time.monotonic()
        self._owed += 1
        self._write(command)

    async def _answer(self) -> Reply:
        """It has its time for each answer from when it could begin on it: when it was asked, or had given the one before."""
        assert self._owing_since is not None, "it was asked"
        try:
            async with asyncio.timeout(self._patience_s - self.owes_since_s):
                answer = await self._read()
        except TimeoutError:
            self._process.kill()
            raise WorkerDied(f"the worker gave no answer within {self._patience_s:g} s and was killed") from None
        self._owed -= 1
        self._owing_since = time.monotonic() if self._owed else None
        return answer

    def _write(self, message: WorkerConfig | Command) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(plan.frame(message))

    async def _read(self) -> Reply:
        """One frame; a header that was read before it was cancelled is kept for the next call."""
        assert self._process.stdout is not None
        try:
            if self._header is None:
                self._header = await self._process.stdout.readexactly(plan.HEADER_BYTES)
            body = await self._process.stdout.readexactly(plan.body_length(self._header))
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self._process.wait()
            raise WorkerDied(f"the worker process ended with status {code}") from None
        self._header = None
        reply: Reply = plan.decode_reply(body)
        return reply

    async def _stop(self) -> None:
        """Closing its stdin asks it to leave; it is killed when it doesn't, or while it loads and wouldn't hear."""
        assert self._process.stdin is not None
        if not self._is_ready:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
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
