"""MQTT 5 for both sides of the wire: a connection that comes back by itself, explicit acknowledgement, reason codes."""

import asyncio
import logging
import random
import secrets
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Self

from protocol.address import BrokerAddress
from protocol.link import FAILURE, NO_SUBSCRIBER, Incoming, Link, Outgoing, Reason, Will
from protocol.transport_errors import (
    BrokerUnreachable,
    CertificateError,
    ConnectionRefused,
    PayloadTooLarge,
    TransportError,
)

__all__ = [
    "NO_SUBSCRIBER",
    "BrokerAddress",
    "BrokerUnreachable",
    "CertificateError",
    "ConnectionRefused",
    "Incoming",
    "PayloadTooLarge",
    "PublishRefused",
    "Transport",
    "TransportError",
    "Will",
    "delays",
]

logger = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 2.0

#: QoS 1 publishes under way at once, where the broker's Receive Maximum allows as many.
_MOST_IN_FLIGHT = 1024
#: QoS 0 messages are dropped while this many wait to be read: only QoS 1 has MQTT's flow control.
_MOST_UNREAD = 4096
#: And while they hold so much; the broker itself bounds what is under way at QoS 1.
_MOST_UNREAD_BYTES = 64 * 1024 * 1024


class PublishRefused(TransportError):
    """The broker refused a publish: ``code`` is the PUBACK's reason code, for instance 135, not authorised."""

    def __init__(self, code: int, name: str) -> None:
        super().__init__(f"the broker refused the message: {name} ({code})")
        self.code = code
        self.name = name


class Transport:
    """A connection to the broker that outlives its breaks; use as ``async with Transport(...) as transport``.

    Entering raises CertificateError, ConnectionRefused (credentials, say), or BrokerUnreachable when
    ``connect_timeout_s`` is over. From then on it reconnects for ever. The session on the broker lives on for
    ``session_expiry_s`` without us; one under a generated identifier (``identifier`` None) can't be taken up again and
    ends with the clean exit. At most ``receive_maximum`` QoS 1 messages come on one connection before the first of them
    must be acknowledged.

    ``dropped`` counts the QoS 0 messages that came while too many waited to be read.
    """

    def __init__(
        self,
        address: BrokerAddress,
        *,
        subscriptions: Sequence[tuple[str, int]] = (),
        identifier: str | None = None,
        will: Will | None = None,
        session_expiry_s: int = 0,
        receive_maximum: int = 1024,
        connect_timeout_s: float = 30.0,
    ) -> None:
        self.address = address
        # Not to be guessed: the broker hands a session over to whoever connects under its name, of whatever user.
        self.identifier = identifier or f"tokenbus-{secrets.token_hex(8)}"
        self._subscriptions = tuple(subscriptions)
        self._will = will
        self._session_expiry_s = session_expiry_s
        self._receive_maximum = receive_maximum
        self._connect_timeout_s = connect_timeout_s
        self._forget_session = identifier is None
        self._trouble = ""
        self._connected = asyncio.Event()
        self._reconnected = asyncio.Event()
        self._incoming: asyncio.Queue[Incoming | None] = asyncio.Queue()
        self._outbox: deque[tuple[Outgoing, asyncio.Future[Reason]]] = deque()
        self._in_flight: dict[int, asyncio.Future[Reason]] = {}
        self._unread_bytes = 0
        self._unacknowledged_incoming = 0
        self.dropped = 0

    async def __aenter__(self) -> Self:
        self._link = Link(
            self.address,
            self.identifier,
            self._will,
            self._session_expiry_s,
            self._receive_maximum,
            received=self._on_message,
            published=self._on_puback,
        )
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._connect(delays(), in_spite_of=BrokerUnreachable)
        except TimeoutError:
            raise BrokerUnreachable(
                f"no connection to {self.address} within {self._connect_timeout_s:g} s: {self._trouble}"
            ) from None
        self._keeper = asyncio.create_task(self._keep_connected(), name=f"mqtt {self.identifier}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        await self._link.close(forget_session=self._forget_session)
        if not self._keeper.cancelled():
            self._keeper.result()

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def unacknowledged(self) -> int:
        """QoS 1 publishes of ours that wait for their PUBACK, sent or not."""
        return len(self._in_flight) + len(self._outbox)

    @property
    def unacknowledged_incoming(self) -> int:
        """QoS 1 messages of the present connection that we haven't acknowledged, read or not."""
        return self._unacknowledged_incoming

    async def wait_connected(self) -> None:
        await self._connected.wait()

    async def wait_reconnected(self) -> None:
        """Wait for the next connection after the present one."""
        await self._reconnected.wait()

    async def messages(self) -> AsyncIterator[Incoming]:
        """What arrives, across reconnects, until the transport is closed. At least once: the same may come again."""
        while (incoming := await self._incoming.get()) is not None:
            self._unread_bytes -= len(incoming.payload)
            yield incoming

    async def batches(self, most: int) -> AsyncIterator[list[Incoming]]:
        """As ``messages``, up to so many at a time: all that have come meanwhile."""
        async for first in self.messages():
            batch = [first]
            while len(batch) < most and not self._incoming.empty():
                if (incoming := self._incoming.get_nowait()) is None:
                    self._incoming.put_nowait(None)
                    break
                self._unread_bytes -= len(incoming.payload)
                batch.append(incoming)
            yield batch

    def acknowledge(self, incoming: Incoming) -> None:
        """Send the PUBACK; messages must be acknowledged in the order they came (MQTT-4.6.0-2).

        Does nothing for QoS 0, nor for a message of an earlier connection: on this one its identifier may mean another
        message, which would be lost, and the broker sends what wasn't acknowledged again anyway.
        """
        if incoming.qos and self._link.acknowledge(incoming):
            self._unacknowledged_incoming -= 1

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        retain: bool = False,
        response_topic: str | None = None,
        correlation: bytes | None = None,
        expiry_s: int | None = None,
        traceparent: str | None = None,
    ) -> int:
        """Publish at QoS 1 and wait for the PUBACK, across reconnects; returns its reason code (16: no subscriber).

        Cancelled, the message may still be sent. Raises ValueError for a topic that no broker takes, PublishRefused,
        PayloadTooLarge, or TransportError when the transport is closed, before or meanwhile.
        """
        if self._keeper.done():
            raise TransportError("the transport is closed")
        message = Outgoing(
            topic=topic,
            payload=payload,
            retain=retain,
            response_topic=response_topic,
            correlation=correlation,
            expiry_s=expiry_s,
            traceparent=traceparent,
        )
        self._link.check(message)
        answer: asyncio.Future[Reason] = asyncio.get_running_loop().create_future()
        self._outbox.append((message, answer))
        self._flush()
        reason = await answer
        if reason.code >= FAILURE:
            raise PublishRefused(reason.code, reason.name)
        return reason.code

    def publish_nowait(self, topic: str, payload: bytes, *, correlation: bytes | None = None) -> bool:
        """Publish at QoS 0 without waiting; False when it was dropped: disconnected, or too much is still unsent.

        Raises ValueError or PayloadTooLarge.
        """
        message = Outgoing(topic=topic, payload=payload, correlation=correlation)
        self._link.check(message)
        return self.connected and self._link.send_nowait(message)

    async def _keep_connected(self) -> None:
        clock = asyncio.get_running_loop().time
        pauses = delays()
        try:
            while True:
                since = clock()
                reason = await self._link.lost()
                self._connected.clear()
                logger.warning("connection to the broker at %s lost: %s", self.address, reason)
                if clock() - since > _LONGEST_DELAY_S:  # else slow down further: each may be lost at once
                    pauses = delays()
                await asyncio.sleep(next(pauses))
                await self._connect(pauses, in_spite_of=TransportError)
                self._reconnected.set()
                self._reconnected = asyncio.Event()
                logger.info("connected to the broker at %s again", self.address)
        finally:
            self._end()

    async def _connect(self, pauses: Iterator[float], *, in_spite_of: type[TransportError]) -> None:
        """Connect and subscribe, trying again for ever in spite of such errors."""
        while True:
            self._unacknowledged_incoming = 0
            try:
                await self._link.open(self._subscriptions)
                break
            except in_spite_of as error:
                self._trouble = str(error)
                logger.info("no connection to the broker at %s yet: %s", self.address, error)
            await asyncio.sleep(next(pauses))
        self._connected.set()
        self._flush()

    def _flush(self) -> None:
        """Send what waits, as far as the window allows."""
        window = min(self._link.receive_maximum, _MOST_IN_FLIGHT)
        while self._outbox and self.connected and len(self._in_flight) < window:
            message, answer = self._outbox.popleft()
            if not answer.done():
                self._in_flight[self._link.send(message)] = answer

    def _on_message(self, incoming: Incoming) -> None:
        unread_bytes = self._unread_bytes + len(incoming.payload)
        if incoming.qos:
            self._unacknowledged_incoming += 1
        elif self._incoming.qsize() >= _MOST_UNREAD or unread_bytes > _MOST_UNREAD_BYTES:
            self.dropped += 1
            return
        self._unread_bytes = unread_bytes
        self._incoming.put_nowait(incoming)

    def _on_puback(self, mid: int, reason: Reason) -> None:
        answer = self._in_flight.pop(mid, None)
        if answer is None:
            return
        if not answer.done():
            answer.set_result(reason)
        self._flush()

    def _end(self) -> None:
        """Nobody may wait for a connection that won't come back."""
        self._connected.clear()
        self._incoming.put_nowait(None)
        for answer in [*self._in_flight.values(), *(answer for _, answer in self._outbox)]:
            if not answer.done():
                answer.set_exception(TransportError("the transport was closed before the broker answered"))
        self._in_flight.clear()
        self._outbox.clear()


def delays(first_s: float = _FIRST_DELAY_S, longest_s: float = _LONGEST_DELAY_S) -> Iterator[float]:
    """Exponential back-off with jitter, from ``first_s`` up to ``longest_s``, without end."""
    delay = first_s
    while True:
        yield delay * random.uniform(0.5, 1)  # noqa: S311 (jitter, not a secret)
        delay = min(2 * delay, longest_s)
