"""Whether requests leave traces. Off, nothing of OpenTelemetry is imported."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from protocol.replies import Terminal
from scheduler.config import ConfigError, TracingConfig
from scheduler.kinds import Run


class Tracing(Protocol):
    """Hears of every request that began here, once, when it ends."""

    def ended(self, run: Run, reply: Terminal, delivered: asyncio.Task[None]) -> None:
        """``delivered`` is done when the broker has the reply."""


class NoTracing:
    """Off."""

    def ended(self, run: Run, reply: Terminal, delivered: asyncio.Task[None]) -> None:
        pass


@contextlib.asynccontextmanager
async def tracing(config: TracingConfig, replica: str, now: Callable[[], float]) -> AsyncIterator[Tracing]:
    """As it is configured; ``now`` is the clock of the generations, in seconds. What hasn't been sent at the end of the block is
    sent then. Raises ConfigError without the packages it needs."""
    if config.endpoint is None:
        yield NoTracing()
        return
    try:
        from scheduler.spans import Spans  # noqa: PLC0415 (needs an extra)
    except ModuleNotFoundError:
        raise ConfigError("tracing.endpoint: needs tokenbus[tracing] to be installed") from None
    spans = Spans(config.endpoint, replica, now)
    try:
        yield spans
    finally:
        await asyncio.to_thread(spans.close)
