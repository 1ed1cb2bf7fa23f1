"""A small service of the tests' own, itself an MQTT peer, that answers as a test says."""

import asyncio
from collections.abc import Awaitable, Callable

from protocol import topics
from protocol.openai import Answer, Usage, answer, piece
from protocol.replies import Accepted, Chunk, Reply, Result, Timings, encode
from protocol.request import Request, decode_request
from protocol.transport import Transport

PIECES = ["one", " two", " thr", "ee"]


def chunk(request_id: str, seq: int, text: str, *, chat: bool = True) -> Chunk:
    data = piece(chat=chat, request_id=request_id, created=1, model="m", text=text, reason=None, first=seq == 0)
    return Chunk(request_id, seq, data)


def result(request_id: str, pieces: list[str] = PIECES, *, chat: bool = True) -> Result:
    data = answer(
        chat=chat,
        request_id=request_id,
        created=1,
        model="m",
        answers=[Answer("".join(pieces), "stop")],
        usage=Usage(1, len(pieces), 1 + len(pieces)),
    )
    return Result(request_id, data, Timings(0.0, 0.1, 0.2), len(pieces))


class Service:
    """Answers each request with what the test says; remembers what it got."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.requests: list[str] = []
        self.lifetimes_s: list[int | None] = []
        self.cancels: asyncio.Queue[str] = asyncio.Queue()
        self.arrived = asyncio.Event()

    async def serve(self, respond: Callable[["Call"], Awaitable[None]]) -> None:
        async for incoming in self.transport.messages():
            self.transport.acknowledge(incoming)
            if "/cancel/" in incoming.topic:
                self.cancels.put_nowait(topics.parse_cancel(incoming.topic).request_id)
                continue
            topic = topics.parse_request(incoming.topic)
            assert incoming.response_topic is not None
            assert topics.own_response_topic(topic.tenant, incoming.response_topic)
            self.requests.append(topic.request_id)
            self.lifetimes_s.append(incoming.expiry_s)
            self.arrived.set()
            await respond(Call(self, topic.request_id, incoming.response_topic, decode_request(incoming.payload)))


class Call:
    """One delivery of a request."""

    def __init__(self, service: Service, request_id: str, response_topic: str, request: Request) -> None:
        self.service = service
        self.id = request_id
        self.response_topic = response_topic
        self.request = request

    @property
    def attempt(self) -> int:
        return self.service.requests.count(self.id)

    async def say(self, *replies: Reply) -> None:
        """In order, as the service does: chunks at QoS 0, all else at QoS 1."""
        for reply in replies:
            if isinstance(reply, Chunk):
                assert self.service.transport.publish_nowait(self.response_topic, encode(reply))
            else:
                await self.service.transport.publish(self.response_topic, encode(reply))

    async def accept(self) -> None:
        await self.say(Accepted(self.id))

    def chunks(self, *numbers: int) -> list[Chunk]:
        return [chunk(self.id, number, PIECES[number], chat=self.request.is_chat) for number in numbers]

    def result(self) -> Result:
        return result(self.id, chat=self.request.is_chat)


async def whole(call: Call) -> None:
    await call.say(Accepted(call.id), *call.chunks(0, 1, 2, 3), call.result())
