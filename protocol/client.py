"""The tenants' client: ``async with Client(...) as client: async for chunk in client.stream(request, model=...)``."""

import asyncio
import logging
import math
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import ClassVar, Self

import msgspec

from protocol import topics
from protocol.errors import RequestError
from protocol.heard import Heard
from protocol.kinds import AnyRequest, kind_of
from protocol.openai import TextChoice
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.replies import (
    TERMINAL,
    Accepted,
    Cancelled,
    Chunk,
    Expired,
    Failed,
    Reply,
    Result,
    Status,
    decode_reply,
    decode_status,
)
from protocol.request import encode_request
from protocol.trace import check_traceparent
from protocol.transport import NO_SUBSCRIBER, BrokerAddress, Incoming, Transport, TransportError, delays

logger = logging.getLogger(__name__)

#: How long the broker keeps replies for a client that lost its connection.
_SESSION_EXPIRY_S = 300
#: Not accepted after about this long, a request is sent again, then at growing intervals.
_RESEND_AFTER_S = 1.0
_RESEND_AT_LEAST_EVERY_S = 5.0
_GOODBYE_S = 2.0
#: Where a tenant's name stands in other topics.
_SERVICE = topics.tenant_of(topics.STATUS)


class RequestStopped(Exception):
    """The request ended before its answer did, after ``completion_tokens`` tokens."""

    how: ClassVar[str]

    def __init__(self, request_id: str, completion_tokens: int) -> None:
        super().__init__(f"request {request_id} {self.how} after {completion_tokens} tokens")
        self.request_id = request_id
        self.completion_tokens = completion_tokens


class RequestCancelled(RequestStopped):
    """It was cancelled, here or by another client of the tenant."""

    how = "was cancelled"


class RequestExpired(RequestStopped):
    """Its deadline passed."""

    how = "expired"


class Client:
    """A tenant's connection to the service; use as ``async with``, for any number of requests at once.

    ``url`` is ``mqtt://[user@]host[:port]`` or ``mqtts://…``; the files are as in BrokerAddress. A request that isn't
    accepted is sent again, under the same id, until ``accept_timeout_s`` is over, and once more after every reconnect:
    the service answers a repeated id with the running generation or the stored result. One with a deadline is sent with what is
    left of it as its Message Expiry Interval, so that waiting for the service counts too. Making one raises ValueError (a
    TopicError for a tenant outside the grammar), entering raises what Transport's entering raises. Leaving cancels what
    still runs.
    """

    def __init__(
        self,
        url: str,
        *,
        tenant: str,
        username: str | None = None,
        password: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        accept_timeout_s: float = 30.0,
        connect_timeout_s: float = 30.0,
    ) -> None:
        self.tenant = tenant
        # Replies come to topics of this client's own, so that several clients of one tenant don't hear each other.
        self._id = uuid.uuid4().hex[:16]
        self._transport = Transport(
            BrokerAddress.parse(
                url, username=username, password=password, ca_file=ca_file, cert_file=cert_file, key_file=key_file
            ),
            subscriptions=[(topics.answers(tenant, self._id), 1), (topics.STATUS, 1)],
            session_expiry_s=_SESSION_EXPIRY_S,
            connect_timeout_s=connect_timeout_s,
        )
        self._exchange = _Exchange(self._transport, accept_timeout_s)

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        self._exchange.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._exchange.stop()
        finally:
            await self._transport.__aexit__()

    def stream(
        self, request: AnyRequest, *, model: str, request_id: str | None = None, traceparent: str | None = None
    ) -> "Stream":
        """A request of any kind, sent when it is iterated. Raises TopicError for a name outside the grammar.

        ``traceparent``: the caller's span, which the service's become children of; ValueError when it is malformed.
        """
        if traceparent is not None:
            check_traceparent(traceparent)
        request_id = uuid.uuid4().hex if request_id is None else request_id
        return Stream(
            self._exchange,
            encode_request(request),
            lifetime_s=None if request.deadline_ms is None else request.deadline_ms / 1000,
            request_id=request_id,
            request_topic=topics.request(self.tenant, model, request_id, kind_of(request)),
            response_topic=topics.out(self.tenant, f"{self._id}/{request_id}"),
            cancel_topic=topics.cancel(self.tenant, request_id),
            traceparent=traceparent,
        )

    async def complete(
        self, request: AnyRequest, *, model: str, request_id: str | None = None, traceparent: str | None = None
    ) -> Result:
        """The whole answer. Raises what iterating a stream raises."""
        stream = self.stream(request, model=model, request_id=request_id, traceparent=traceparent)
        async for _ in stream:
            pass
        return stream.result

    async def embed(self, request: EmbeddingRequest, *, model: str, request_id: str | None = None) -> list[list[float]]:
        """A vector for each text. Raises what iterating a stream raises."""
        return (await self.complete(request, model=model, request_id=request_id)).embeddings

    async def score(self, request: ScoreRequest, *, model: str, request_id: str | None = None) -> TextChoice:
        """What the text's tokens are worth after their context. Raises what iterating a stream raises."""
        return (await self.complete(request, model=model, request_id=request_id)).score

    async def cancel(self, request_id: str) -> None:
        """Cancel a request of this tenant; whoever streams it gets RequestCancelled, unless it has ended already."""
        await self._transport.publish(topics.cancel(self.tenant, request_id), b"")

    async def wait_online(self) -> Status:
        """Wait until a service is online; returns what it says of itself."""
        return await self._exchange.wait_online()


class Stream:
    """One request: iterate over its chunks; ``result`` is there when they end.

    The chunks' texts and tool calls together are exactly the result's, of each choice: should some be lost on the way, the last
    one carries the rest. Leaving the iteration early cancels the request. Iterating raises RequestError (the service refused or
    failed), RequestCancelled, RequestExpired, TransportError (the broker refused it), or TimeoutError when nobody accepted it.
    """

    def __init__(
        self,
        exchange: "_Exchange",
        payload: bytes,
        *,
        lifetime_s: float | None,
        request_id: str,
        request_topic: str,
        response_topic: str,
        cancel_topic: str,
        traceparent: str | None,
    ) -> None:
        self.request_id = request_id
        self.response_topic = response_topic
        self._exchange = exchange
        self._payload = payload
        self._lifetime_s = lifetime_s
        self._request_topic = request_topic
        self._cancel_topic = cancel_topic
        self._traceparent = traceparent
        self._inbox: asyncio.Queue[Reply | Exception] = asyncio.Queue()
        self._accepted = asyncio.Event()
        self._ended = False
        self._result: Result | None = None

    @property
    def result(self) -> Result:
        """Raises RuntimeError while the stream hasn't ended."""
        if self._result is None:
            raise RuntimeError("the result is there when the stream has ended")
        return self._result

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        heard = Heard()
        self._exchange.join(self)
        sender = self._exchange.spawn(self._send(), name=f"send {self.request_id}")
        try:
            while not isinstance(reply := await self._next(), Result):
                if heard.take(reply):
                    yield reply
        finally:
            sender.cancel()
            self.leave()
        self._result = reply
        for chunk in heard.missing(reply):
            yield chunk

    def deliver(self, reply: Reply | Exception) -> None:
        self._ended = self._ended or isinstance(reply, TERMINAL)
        self._inbox.put_nowait(reply)

    def leave(self) -> None:
        """No more replies wanted; cancels a request that hasn't ended. Does nothing the second time."""
        if self._exchange.part(self) and not self._ended:
            self._exchange.say_goodbye(self._cancel_topic)

    async def _next(self) -> Chunk | Result:
        while True:
            reply = await self._inbox.get()
            if isinstance(reply, Exception):
                raise reply
            self._accepted.set()
            match reply:
                case Chunk() | Result():
                    return reply
                case Cancelled():
                    raise RequestCancelled(self.request_id, reply.completion_tokens)
                case Expired():
                    raise RequestExpired(self.request_id, reply.completion_tokens)
                case Failed():
                    raise RequestError(reply.error)
                case Accepted():
                    pass

    async def _send(self) -> None:
        """Have the request accepted, and again after each reconnect: the broker may have lost it or replies to it."""
        begun = asyncio.get_running_loop().time()
        try:
            await self._send_until_accepted(begun)
            while True:
                await self._exchange.transport.wait_reconnected()
                self._accepted.clear()
                await self._send_until_accepted(begun)
        except (TransportError, TimeoutError) as error:
            self.deliver(error)

    async def _send_until_accepted(self, begun: float) -> None:
        heard = True
        limit_s = self._exchange.accept_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                for pause in delays(_RESEND_AFTER_S, _RESEND_AT_LEAST_EVERY_S):
                    code = await self._exchange.transport.publish(
                        self._request_topic,
                        self._payload,
                        response_topic=self.response_topic,
                        expiry_s=self._expiry_s(begun),
                        traceparent=self._traceparent,
                    )
                    heard = code != NO_SUBSCRIBER
                    if await _happens(self._accepted, within_s=pause):
                        return
        except TimeoutError:
            why = "the service didn't answer" if heard else "no service listens for this model's requests"
            raise TimeoutError(f"request {self.request_id} wasn't accepted within {limit_s:g} s: {why}") from None

    def _expiry_s(self, begun: float) -> int | None:
        """At least 1: what is sent too late still asks how the request ended."""
        if self._lifetime_s is None:
            return None
        return max(1, math.ceil(begun + self._lifetime_s - asyncio.get_running_loop().time()))


class _Exchange:
    """What a client's streams share: the connection, whose reply is whose, and the tasks.

    The tasks are in no TaskGroup: around the block of ``async with Client()`` it would turn the caller's own exceptions
    into groups.
    """

    def __init__(self, transport: Transport, accept_timeout_s: float) -> None:
        self.transport = transport
        self.accept_timeout_s = accept_timeout_s
        self._streams: dict[str, Stream] = {}
        self._statuses: dict[str, Status] = {}
        self._status_changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._goodbyes: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self.spawn(self._dispatch(), name="replies")

    async def stop(self) -> None:
        self._close_streams()
        if self._goodbyes:
            await asyncio.wait(self._goodbyes, timeout=_GOODBYE_S)
        tasks = self._tasks | self._goodbyes
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    def spawn(self, work: Coroutine[None, None, None], *, name: str) -> asyncio.Task[None]:
        return _keep(asyncio.create_task(work, name=name), self._tasks)

    def join(self, stream: Stream) -> None:
        """Raises ValueError when this client streams the same request already."""
        if stream.response_topic in self._streams:
            raise ValueError(f"request {stream.request_id} is being streamed already")
        self._streams[stream.response_topic] = stream

    def part(self, stream: Stream) -> bool:
        """Whether the stream was still there."""
        return self._streams.pop(stream.response_topic, None) is not None

    def say_goodbye(self, cancel_topic: str) -> None:
        """Publish a cancellation, waiting for nothing: the caller may itself be being cancelled."""
        _keep(asyncio.create_task(self._cancel(cancel_topic), name="cancel"), self._goodbyes)

    async def wait_online(self) -> Status:
        while True:
            for status in self._statuses.values():
                if status.status == "online":
                    return status
            await self._status_changed.wait()

    async def _cancel(self, topic: str) -> None:
        try:
            await self.transport.publish(topic, b"")
        except TransportError as error:
            logger.warning("a request couldn't be cancelled: %s", error)

    async def _dispatch(self) -> None:
        try:
            async for incoming in self.transport.messages():
                self.transport.acknowledge(incoming)
                self._take(incoming)
        finally:
            self._close_streams()

    def _take(self, incoming: Incoming) -> None:
        if topics.tenant_of(incoming.topic) == _SERVICE:
            self._take_status(incoming)
        elif (stream := self._streams.get(incoming.topic)) is not None:
            try:
                stream.deliver(decode_reply(incoming.payload))
            except msgspec.DecodeError as error:
                stream.deliver(error)

    def _take_status(self, incoming: Incoming) -> None:
        try:
            self._statuses[incoming.topic] = decode_status(incoming.payload)
        except msgspec.DecodeError:  # empty: the retained message was deleted
            self._statuses.pop(incoming.topic, None)
        self._status_changed.set()
        self._status_changed = asyncio.Event()

    def _close_streams(self) -> None:
        for stream in list(self._streams.values()):
            stream.leave()
            stream.deliver(TransportError("the client was closed before the request had ended"))


async def _happens(event: asyncio.Event, *, within_s: float) -> bool:
    try:
        async with asyncio.timeout(within_s):
            return await event.wait()
    except TimeoutError:
        return False


def _keep(task: asyncio.Task[None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
    """Hold the task until it is done: the event loop alone wouldn't."""
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
