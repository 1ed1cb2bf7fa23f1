"""What must arrive: each message waits in a task of its own until the broker has acknowledged it."""

import asyncio
import logging
from collections.abc import Awaitable, Collection, Coroutine, Iterable

import msgspec

from protocol import replies, topics
from protocol.errors import ServiceError
from protocol.replies import Chunk, Failed, Reply, Terminal
from protocol.transport import PayloadTooLarge, PublishRefused, Transport
from scheduler.journal.entry import Entry, Journal, Listener
from scheduler.metrics.series import Metrics

logger = logging.getLogger(__name__)

#: While more than this many messages wait for the broker, nothing new is taken in.
_MOST_PENDING = 4096


class _Answer(msgspec.Struct):
    """Of any message, whose it is."""

    request_id: str | None
    attempt: int = 1


_decode_answer = msgspec.json.Decoder(_Answer).decode


class Delivery:
    """Publishes replies at QoS 1. ``tasks`` runs the publishes."""

    def __init__(self, transport: Transport, journal: Journal, tasks: asyncio.TaskGroup, metrics: Metrics) -> None:
        self._transport = transport
        self._journal = journal
        self._tasks = tasks
        self._metrics = metrics
        self._pending: set[asyncio.Task[None]] = set()
        self._room = asyncio.Event()
        self._room.set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._pending)

    async def room(self) -> None:
        """Wait while the broker is behind."""
        await self._room.wait()

    async def wait_empty(self) -> None:
        """Wait until the broker has everything."""
        await self._empty.wait()

    def send(self, listener: Listener, reply: Reply | bytes) -> None:
        """Tell one listener."""
        payload = reply if isinstance(reply, bytes) else replies.encode(reply)
        self._start(self._publish(listener, payload), name=f"publish to {listener.topic}")

    def finish(self, entry: Entry, reply: Terminal, last: Collection[Chunk] = ()) -> asyncio.Task[None]:
        """Journal the terminal message, tell every listener, the ``last`` chunks first, close the entry: the task is done when
        the broker has it."""
        payload = replies.encode(reply)
        written = self._journal.end(entry.id, payload)  # queued now: whoever looks the id up from here on finds it
        return self._start(self._finish(entry, payload, written, last), name=f"finish {entry.id}")

    def resume(self, entry: Entry) -> None:
        """Tell every listener what an earlier process had journalled as the end, and close the entry."""
        assert entry.reply is not None
        reply = msgspec.structs.replace(replies.decode_reply(entry.reply), attempt=entry.attempt)
        self._start(self._tell(entry, replies.encode(reply)), name=f"finish {entry.id}")

    def quarantine(self, entry: Entry, reason: str, failures: int) -> None:
        """Say on the tenant's ``dead`` topic why a request won't be tried again."""
        self._metrics.quarantined.inc()
        body = replies.encode(replies.Quarantined(entry.request_id, reason, failures))
        listener = Listener(topics.dead(entry.tenant, entry.request_id))
        self._start(self._publish(listener, body), name=f"publish to {listener.topic}")

    def publish_chunk(self, listeners: Iterable[Listener], chunk: Chunk) -> None:
        """QoS 0: the terminal message makes up for a lost one."""
        payload = replies.encode(chunk)
        for listener in listeners:
            try:
                sent = self._transport.publish_nowait(listener.topic, payload, correlation=listener.correlation)
            except PayloadTooLarge as error:
                sent = False
                logger.info("a chunk to %r was lost: %s", listener.topic, error)
            if not sent:
                self._metrics.publish_failures.labels("chunk").inc()

    async def close(self, within_s: float) -> None:
        """What the broker doesn't take in time is left to the journal."""
        if self._pending:
            _, late = await asyncio.wait(self._pending, timeout=within_s)
            for task in late:
                task.cancel()

    def _start(self, work: Coroutine[None, None, None], *, name: str) -> asyncio.Task[None]:
        task = self._tasks.create_task(work, name=name)
        self._pending.add(task)
        self._empty.clear()
        task.add_done_callback(self._done)
        if len(self._pending) >= _MOST_PENDING:
            self._room.clear()
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._pending.discard(task)
        if len(self._pending) < _MOST_PENDING:
            self._room.set()
        if not self._pending:
            self._empty.set()

    async def _finish(self, entry: Entry, payload: bytes, written: Awaitable[bool], last: Collection[Chunk]) -> None:
        if not await written:
            logger.info("another replica had taken this request over", extra={"id": entry.id})
            return
        for chunk in last:
            self.publish_chunk(entry.listeners, chunk)
        await self._tell(entry, payload)

    async def _tell(self, entry: Entry, payload: bytes) -> None:
        for listener in entry.listeners:
            await self._publish(listener, payload)
        await self._journal.delivered(entry.id)

    async def _publish(self, listener: Listener, payload: bytes) -> None:
        try:
            await self._publish_or_say_why(listener, payload)
        except (PublishRefused, PayloadTooLarge, ValueError) as error:
            self._metrics.publish_failures.labels("reply").inc()
            logger.error("a reply to %r was lost: %s", listener.topic, error)

    async def _publish_or_say_why(self, listener: Listener, payload: bytes) -> None:
        try:
            await self._transport.publish(listener.topic, payload, correlation=listener.correlation)
        except PayloadTooLarge as error:
            self._metrics.publish_failures.labels("reply").inc()
            logger.error("a reply to %r was replaced: %s", listener.topic, error)
            answer = _decode_answer(payload)
            body = ServiceError("internal", f"the answer is over the broker's limit of {error.limit} bytes").body
            failed = replies.encode(Failed(answer.request_id, body, answer.attempt))
            await self._transport.publish(listener.topic, failed, correlation=listener.correlation)
