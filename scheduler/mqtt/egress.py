"""Out: what the engine reports becomes numbered chunks, coalesced over a few tens of milliseconds, and one terminal message."""

import asyncio
import logging

from protocol import replies
from protocol.errors import ErrorBody, ServiceError
from protocol.replies import Accepted, Cancelled, Failed, Reply
from protocol.transport import PayloadTooLarge, PublishRefused, Transport
from scheduler.core.sequence import FinishReason
from scheduler.generation import Generation
from scheduler.loop import Engine, StepReport
from scheduler.metrics import Metrics

logger = logging.getLogger(__name__)


class Egress:
    """Holds every accepted request until its terminal message is on its way.

    ``tasks`` runs the publishes that wait for the broker's acknowledgement.
    """

    def __init__(
        self, transport: Transport, engine: Engine, metrics: Metrics, tasks: asyncio.TaskGroup, flush_s: float
    ) -> None:
        self._transport = transport
        self._engine = engine
        self._metrics = metrics
        self._tasks = tasks
        self._flush_s = flush_s
        self._deliveries: set[asyncio.Task[None]] = set()
        self._generations: dict[str, Generation] = {}
        self._dirty: set[str] = set()
        self._text_came = asyncio.Event()

    def __contains__(self, id: str) -> bool:
        return id in self._generations

    def __len__(self) -> int:
        return len(self._generations)

    def accept(self, id: str, generation: Generation) -> None:
        """From here on the request ends in exactly one terminal message."""
        self._generations[id] = generation
        self.confirm(id)

    def confirm(self, id: str) -> None:
        """Say, perhaps once more, that the request is in."""
        generation = self._generations[id]
        self._send(generation.topic, Accepted(generation.request_id), generation.correlation)

    def refuse(self, topic: str, request_id: str | None, error: ErrorBody, correlation: bytes | None) -> None:
        """Answer a request that was never accepted."""
        self._metrics.requests.labels("rejected").inc()
        logger.info("request refused", extra={"topic": topic, "code": error.code, "param": error.param})
        self._send(topic, Failed(request_id, error), correlation)

    def cancel(self, id: str) -> bool:
        """End a running request at its tenant's wish; False when there is none of that id."""
        generation = self._generations.get(id)
        if generation is None:
            return False
        self._engine.end(id)
        self._end(id, Cancelled(generation.request_id, generation.completion_tokens), "cancelled")
        return True

    async def close(self, error: ServiceError, within_s: float) -> None:
        """End everything that runs, because the service itself ends; what the broker doesn't take in time is dropped."""
        for id in list(self._generations):
            self._engine.end(id)
            self._fail(id, error)
        if self._deliveries:
            _, late = await asyncio.wait(self._deliveries, timeout=within_s)
            for delivery in late:
                delivery.cancel()

    async def run(self) -> None:
        """Turn reports into text, for ever."""
        while True:
            self._take(await self._engine.reports.get())

    async def flush_regularly(self) -> None:
        """Publish what has come since the last time, never more often than every ``flush_s``."""
        while True:
            await self._text_came.wait()
            self._text_came.clear()
            for id in self._dirty:
                self._publish_chunk(self._generations[id])
            self._dirty.clear()
            await asyncio.sleep(self._flush_s)

    def _take(self, report: StepReport) -> None:
        self._metrics.observe_step(report)
        for id in report.rows:
            generation = self._generations.get(id)
            if generation is not None and generation.started_at is None:
                generation.started_at = report.at - report.seconds
        for event in report.events:
            generation = self._generations.get(event.id)
            if generation is not None:
                self._take_token(event.id, generation, event.token, event.finish, report.at)
        for id in report.failed:
            if id in self._generations:
                self._fail(id, ServiceError("internal", "the model failed on every step with this request in it"))

    def _take_token(self, id: str, generation: Generation, token: int, finish: FinishReason | None, at: float) -> None:
        if generation.last_token_at is None:
            self._metrics.ttft.observe(at - generation.accepted_at)
        else:
            self._metrics.itl.observe(at - generation.last_token_at)
        reason = generation.push(token, at, finish)
        if reason is None:
            if generation.streams:
                self._dirty.add(id)
                self._text_came.set()
            return
        if finish is None:
            self._engine.end(id)
        self._publish_chunk(generation, reason)
        self._end(id, generation.result(reason, at), reason)

    def _publish_chunk(self, generation: Generation, reason: FinishReason | None = None) -> None:
        """QoS 0: the terminal message makes up for a lost one."""
        if generation.streams and (chunk := generation.next_chunk(reason)) is not None:
            self._transport.publish_nowait(generation.topic, replies.encode(chunk), correlation=generation.correlation)

    def _fail(self, id: str, error: ServiceError) -> None:
        self._end(id, Failed(self._generations[id].request_id, error.body), "error")

    def _end(self, id: str, reply: Reply, outcome: str) -> None:
        generation = self._generations.pop(id)
        self._dirty.discard(id)
        now = self._engine.now()
        timings = generation.timings(now)
        self._metrics.requests.labels(outcome).inc()
        self._metrics.e2e.observe(timings.total_s)
        logger.info(
            "request ended",
            extra={
                "tenant": generation.tenant,
                "request_id": generation.request_id,
                "outcome": outcome,
                "prompt_tokens": generation.prompt_tokens,
                "completion_tokens": generation.completion_tokens,
                "queued_s": round(timings.queued_s, 4),
                "ttft_s": None if timings.ttft_s is None else round(timings.ttft_s, 4),
                "total_s": round(timings.total_s, 4),
            },
        )
        self._send(generation.topic, reply, generation.correlation)

    def _send(self, topic: str, reply: Reply, correlation: bytes | None) -> None:
        delivery = self._tasks.create_task(self._deliver(topic, reply, correlation), name=f"publish to {topic}")
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(self, topic: str, reply: Reply, correlation: bytes | None) -> None:
        try:
            await self._transport.publish(topic, replies.encode(reply), correlation=correlation)
        except (PublishRefused, PayloadTooLarge) as error:
            logger.error("a reply to %r was lost: %s", topic, error)
