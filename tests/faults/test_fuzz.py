"""Ten thousand messages that nobody should send."""

import asyncio

import pytest

from protocol import replies, topics
from protocol.replies import Failed
from protocol.transport import BrokerAddress, Incoming, Transport
from tests.faults.fuzz import Message, messages
from tests.faults.neighbour import neighbour
from tests.faults.service import ServiceProcess

pytestmark = pytest.mark.timeout(180)

COUNT = 10_000
_IN_FLIGHT = 500


async def publish(transport: Transport, all: list[Message]) -> None:
    """Many at once."""
    room = asyncio.Semaphore(_IN_FLIGHT)

    async def one(message: Message) -> None:
        async with room:
            await transport.publish(
                message.topic,
                message.payload,
                response_topic=message.response_topic,
                correlation=message.correlation,
            )

    await asyncio.gather(*map(one, all))


async def hear(transport: Transport, count: int) -> list[Incoming]:
    heard = []
    while len(heard) < count:
        incoming = await anext(transport.messages())
        transport.acknowledge(incoming)
        if topics.tenant_of(incoming.topic) != "neighbour":
            heard.append(incoming)
    return heard


async def test_ten_thousand_malformed_messages_get_a_typed_error_each_and_disturb_nobody(tmp_path, broker, model):
    fuzzed = {message.correlation: message for message in messages(COUNT, seed=9)}
    assert len(fuzzed) == COUNT
    expected = {(m.answer_topic, m.answer_correlation, m.answer_id) for m in fuzzed.values()}
    address = BrokerAddress.parse(broker.url)
    async with ServiceProcess(tmp_path, model, broker.url) as service:
        pids = service.process.pid, service.worker_pid
        async with (
            Transport(address) as sender,
            Transport(address, subscriptions=[("tokenbus/v1/+/out/#", 1)]) as listener,
            neighbour(broker.url),
            asyncio.TaskGroup() as group,
        ):
            hearing = group.create_task(hear(listener, COUNT), name="hearing")
            group.create_task(publish(sender, list(fuzzed.values())), name="publishing")
        metrics = await service.settled()
        assert (service.process.pid, service.worker_pid) == pids
        assert service.process.returncode is None
    heard = [(incoming, replies.decode_reply(incoming.payload)) for incoming in hearing.result()]
    assert [reply for _, reply in heard if not isinstance(reply, Failed)] == []
    assert {(i.topic, i.correlation, reply.request_id) for i, reply in heard} == expected
    assert sum(v for name, v in metrics.items() if name.startswith("tokenbus_rejections_total{")) == COUNT
    assert metrics['tokenbus_rejections_total{reason="internal"}'] == 0
    assert metrics["tokenbus_worker_restarts_total"] == 0
