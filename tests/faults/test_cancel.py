"""A hundred cancels at once, of requests in every state there is."""

import asyncio
import random

import pytest

from protocol import replies, topics
from protocol.client import Client
from protocol.replies import Accepted, Cancelled, Chunk, Failed, Reply, Result
from protocol.request import Request, encode_request
from protocol.transport import BrokerAddress, Transport
from tests.faults.neighbour import answers
from tests.faults.service import Ear, ServiceProcess

pytestmark = pytest.mark.timeout(120)


def request(prompt: int, max_tokens: int) -> bytes:
    tokens = [number % 90 + 5 for number in range(prompt)]
    return encode_request(Request(prompt=tokens, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, stream=True))


def ids(state: str, count: int) -> list[str]:
    return [f"{state}-{number}" for number in range(count)]


DECODING, WAITING, FINISHED, AGAIN = ids("decoding", 10), ids("waiting", 45), ids("finished", 20), ids("again", 10)
PREFILLING, UNKNOWN = ["prefilling"], ids("unknown", 14)
RAN = [*DECODING, *PREFILLING, *WAITING, *AGAIN]
WASTED = 'tokenbus_wasted_tokens_total{reason="cancelled"}'
ALL = [*RAN, *FINISHED, *UNKNOWN]


async def told(ear: Ear, kind: type[Reply], ids: list[str]) -> None:
    """Wait until there is such a reply for each."""
    async with asyncio.timeout(30):
        while not all(any(isinstance(reply, kind) for reply in ear.heard.get(id, ())) for id in ids):
            await asyncio.sleep(0.005)


async def test_a_hundred_cancels_in_every_state_at_once(tmp_path, broker, model):
    async def send(ids: list[str], body: bytes) -> None:
        for id in ids:
            await alice.publish(topics.request("alice", "tiny", id), body)

    async def cancel(id: str) -> None:
        asked = topics.out("alice", id) if id in UNKNOWN else None
        await alice.publish(topics.cancel("alice", id), b"", response_topic=asked)

    assert len(ALL) == 100
    async with (
        ServiceProcess(tmp_path, model, broker.url, engine__num_blocks=4000, engine__max_batch_tokens=32) as service,
        Transport(BrokerAddress.parse(broker.url)) as alice,
        Client(broker.url, tenant="bob") as bob,
        Ear(broker.url, "alice") as ear,
        asyncio.TaskGroup() as group,
    ):
        alone = await answers(bob)
        await send(FINISHED, request(3, 2))
        await send(AGAIN, request(3, 3000))
        await told(ear, Result, FINISHED)
        await told(ear, Chunk, AGAIN)
        await asyncio.gather(*map(cancel, AGAIN))
        await told(ear, Cancelled, AGAIN)
        await send(DECODING, request(3, 3000))
        await told(ear, Chunk, DECODING)
        await send(PREFILLING, request(4000, 50))
        await send(WAITING, request(3, 50))
        await told(ear, Accepted, [*PREFILLING, *WAITING])
        before = await service.metrics()
        assert before["tokenbus_running_requests"] == len([*DECODING, *PREFILLING])
        assert before["tokenbus_waiting_requests"] == len(WAITING)
        beside = group.create_task(answers(bob), name="beside")
        await asyncio.gather(*map(cancel, random.Random(4).sample(ALL, 100)))

        metrics = await service.settled()
        await alice.publish(topics.out("alice", "last"), replies.encode(Accepted("last")))
        await told(ear, Accepted, ["last"])
        assert await beside == alone
    check(ear)
    assert metrics['tokenbus_requests_total{outcome="cancelled"}'] == len(RAN)
    # One step is under way when a cancel comes, and the next one may be in the worker's pipe.
    assert metrics[WASTED] - before[WASTED] <= 2 * len([*DECODING, *PREFILLING, *WAITING])


def check(ear: Ear) -> None:
    for id in RAN:
        *earlier, last = ear.heard[id]
        assert isinstance(last, Cancelled)
        assert {type(reply) for reply in earlier} <= {Accepted, Chunk}
        assert last.completion_tokens > 0 or id in (*PREFILLING, *WAITING)
    for id in FINISHED:
        assert [type(reply) for reply in ear.heard[id] if not isinstance(reply, Chunk)] == [Accepted, Result]
    for id in UNKNOWN:
        assert [(type(reply), reply.error.code) for reply in ear.heard[id]] == [(Failed, "not_found")]
