"""Until when a request lives: what its message and its body say, and one end whatever comes at the same moment."""

import time
from types import SimpleNamespace

import pytest
from prometheus_client import Counter

from protocol import topics
from protocol.replies import Accepted, Cancelled, Expired
from protocol.request import Request, encode_request
from protocol.transport import Incoming
from scheduler.journal.entry import Entry
from scheduler.mqtt.ingress import Ingress, Reader, Refusal
from scheduler.mqtt.watch import BrokerWatch
from scheduler.turns import Turns
from tests.scheduler.test_generation import INFO
from tests.scheduler.test_recovery import Process, entry, unfinished

TEXT = SimpleNamespace(prompt_tokens=lambda request: request.prompt)
READER = Reader(TEXT, INFO, model="tiny", max_payload_bytes=10_000)


def message(expiry_s: int | None = None, *, ago_s: float = 0.0, id: str = "a", **fields) -> Incoming:
    """A request that came so long ago, with what was left of its lifetime then."""
    return Incoming(
        topic=topics.request("alice", "tiny", id),
        payload=encode_request(Request(prompt=[65, 66], max_tokens=4, **fields)),
        response_topic=None,
        correlation=None,
        expiry_s=expiry_s,
        received_at=time.time() - ago_s,
        qos=1,
        duplicate=False,
        retained=False,
        mid=1,
        epoch=1,
    )


def left_s(incoming: Incoming) -> float | None:
    """Of the request that this message makes."""
    read = READER.read(incoming)
    assert isinstance(read, Entry)
    return None if read.expires_at is None else read.expires_at - time.time()


def test_the_earlier_deadline_counts_and_the_messages_own_from_when_it_came():
    assert left_s(message()) is None
    assert left_s(message(100)) == pytest.approx(100, abs=1)
    assert left_s(message(100, ago_s=30)) == pytest.approx(70, abs=1)
    assert left_s(message(100, deadline_ms=5_000)) == pytest.approx(5, abs=1)
    assert left_s(message(100, deadline_ms=500_000)) == pytest.approx(100, abs=1)
    assert left_s(message(deadline_ms=5_000, ago_s=30)) == pytest.approx(5, abs=1)


def test_to_be_refused_when_late_needs_something_to_be_late_for():
    refused = READER.read(message(refuse_late=True))
    assert isinstance(refused, Refusal)
    assert (refused.error.body.code, refused.error.body.param) == ("invalid_request", "refuse_late")
    assert left_s(message(100, refuse_late=True)) == pytest.approx(100, abs=1)
    assert left_s(message(deadline_ms=9_000, refuse_late=True)) == pytest.approx(9, abs=1)


async def take(process: Process, *messages: Incoming) -> list[Incoming]:
    """Have them taken in at once; what was acknowledged."""
    acknowledged: list[Incoming] = []

    async def batches(_most: int):
        yield list(messages)

    transport = SimpleNamespace(batches=batches, acknowledge=acknowledged.append)
    watch = BrokerWatch(Counter("any", "any", registry=None))
    parts = (process.journal, process.admission, process.outlook, process.egress, process.delivery)
    alone = Turns(0, lambda: 0.0, lambda _: 0.0)
    await Ingress(transport, READER, *parts, watch, process.metrics, alone).run()
    return acknowledged


async def test_what_waited_too_long_before_it_was_taken_in_expires_without_being_computed(path):
    late, in_time, joins = message(5, ago_s=6), message(100, id="b"), message(100)
    async with Process(path) as process:
        await process.recovery
        assert await take(process, late, in_time) == [late, in_time]
        await process.settle()
        assert {name for step in process.worker.steps for name in step.names} == {"b"}
        assert process.broker.told("a") == [Expired("a", 0)]
        await take(process, joins)
        await process.settle()
        assert process.broker.told("a") == [Expired("a", 0)] * 2, "it has ended, and is replayed"
    assert await unfinished(path) == {}


@pytest.mark.parametrize("first", ["cancel", "deadline"])
async def test_a_cancel_at_the_very_deadline_leaves_one_end(path, first):
    """The cancel comes before the loop has seen that the deadline passed, or when it just has."""
    async with Process(path, fatal="a") as process:
        await process.recovery
        due = time.time() + 0.2
        dying = entry("a", expires_at=due)
        process.admission.enter_anyway(dying)
        process.egress.begin(dying)
        await process.worker.reached.wait()
        if first == "deadline":
            while "alice/a" in process.egress:
                await process.egress._changes()
        while time.time() < due:
            pass
        assert process.egress.cancel("alice/a") == (first == "cancel")
        process.worker.release.set()
        await process.settle()
        assert process.broker.told("a") == [Accepted("a"), {"cancel": Cancelled, "deadline": Expired}[first]("a", 0)]
    assert await unfinished(path) == {}
