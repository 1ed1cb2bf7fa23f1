"""Answers that can't be sent, or were given already: somebody is always told, and the service goes on."""

import asyncio

import pytest

from protocol import replies, topics
from protocol.client import Client
from protocol.errors import RequestError
from protocol.replies import Accepted, Failed, Reply, Result
from protocol.request import Request, encode_request
from protocol.transport import BrokerAddress, Transport
from scheduler.mqtt.broker import EmbeddedBroker
from tests.brokers import receive
from tests.faults.neighbour import neighbour
from tests.faults.service import Ear, ServiceProcess

pytestmark = pytest.mark.timeout(120)

SHORT = Request(prompt=[5, 6, 7], max_tokens=1, temperature=0.0, ignore_eos=True)
LONG = Request(prompt=[5, 6, 7], max_tokens=1500, temperature=0.0, ignore_eos=True)
STREAM = Request(prompt=[5, 6, 7], max_tokens=4, temperature=0.0, ignore_eos=True, stream=True)
LIMIT = 1000


async def receive_reply(transport: Transport) -> Reply:
    incoming = await receive(transport)
    transport.acknowledge(incoming)
    return replies.decode_reply(incoming.payload)


async def test_a_result_over_the_brokers_limit_ends_as_a_typed_error(tmp_path, model):
    async with (
        EmbeddedBroker(data_dir=tmp_path / "broker", settings=[f"max_packet_size {LIMIT}"]) as broker,
        ServiceProcess(tmp_path, model, broker.url) as service,
        Client(broker.url, tenant="alice") as client,
    ):
        for _ in range(2):  # the journal's copy is no smaller
            with pytest.raises(RequestError, match=f"over the broker's limit of {LIMIT} bytes") as caught:
                await client.complete(LONG, model="tiny", request_id="long")
            assert caught.value.code == "internal"
        assert (await client.complete(SHORT, model="tiny")).usage.completion_tokens == 1
        metrics = await service.settled()
        assert metrics['tokenbus_publish_failures_total{kind="reply"}'] == 2


async def test_chunks_and_errors_over_the_brokers_limit_are_given_up_and_disturb_nobody(tmp_path, model):
    """Correlation Data leaves room for less and less of the answer."""
    inbox = topics.out("alice", "inbox")
    async with (
        EmbeddedBroker(data_dir=tmp_path / "broker", settings=[f"max_packet_size {LIMIT}"]) as broker,
        ServiceProcess(tmp_path, model, broker.url) as service,
        Transport(BrokerAddress.parse(broker.url), subscriptions=[(inbox, 1)]) as alice,
    ):
        async with neighbour(broker.url):
            for id, room in (("accepted", 170), ("error", 205)):
                topic, correlation = topics.request("alice", "tiny", id), id.encode().ljust(LIMIT - room)
                await alice.publish(topic, encode_request(STREAM), response_topic=inbox, correlation=correlation)
            heard = [await receive_reply(alice) for _ in range(3)]
            assert {(reply.request_id, type(reply)) for reply in heard} == {
                ("accepted", Accepted),
                ("error", Accepted),
                ("error", Failed),
            }
        metrics = await service.settled()
        assert metrics['tokenbus_publish_failures_total{kind="chunk"}'] > 0
        log = service.log.read_text()
        assert f"a chunk to '{inbox}' was lost" in log
        assert log.count(f"a reply to '{inbox}' was lost") == 1


async def test_a_tenant_whose_name_leaves_no_room_for_an_answer_harms_nobody(tmp_path, broker, model):
    """The broker ties names to users, but the embedded one knows none."""
    address = BrokerAddress.parse(broker.url)
    async with ServiceProcess(tmp_path, model, broker.url) as service, Transport(address) as sender:
        async with neighbour(broker.url):
            await sender.publish(f"tokenbus/v1/{'x' * 65_515}/req/m/1", b"")
            await sender.publish(f"tokenbus/v1/{'x' * 65_515}/cancel/", b"")
        metrics = await service.settled()
        assert metrics['tokenbus_rejections_total{reason="invalid_topic"}'] == 2


async def test_a_request_that_is_repeated_around_its_end_is_answered_to_all(tmp_path, broker, model):
    ids, repeats = [f"r{number}" for number in range(40)], range(16)
    address = BrokerAddress.parse(broker.url)
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Transport(address, subscriptions=[(topics.out("alice", "#"), 1)]) as alice,
        asyncio.TaskGroup() as group,
    ):
        for repeat in repeats:
            for id in ids:
                topic, out = topics.request("alice", "tiny", id), topics.out("alice", f"{id}/{repeat}")
                group.create_task(alice.publish(topic, encode_request(SHORT), response_topic=out), name=out)
        results: dict[str, Result] = {}
        while len(results) < len(ids) * len(repeats):
            incoming = await receive(alice)
            alice.acknowledge(incoming)
            reply = replies.decode_reply(incoming.payload)
            if not isinstance(reply, Accepted):
                results[incoming.topic] = reply
        assert {type(reply) for reply in results.values()} == {Result}
        metrics = await service.settled()
        assert metrics["tokenbus_requests_accepted_total"] == len(ids)


async def test_a_retained_request_is_served_once_and_its_copies_are_ignored(tmp_path, broker, model):
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Ear(broker.url, "alice") as ear,
        Transport(BrokerAddress.parse(broker.url)) as sender,
    ):
        await sender.publish(topics.request("alice", "tiny", "kept"), encode_request(SHORT), retain=True)
        await sender.publish(topics.request("alice", "tiny", "bad"), b"no JSON", retain=True)
        await service.settled()
        await broker.restart()
        async with asyncio.timeout(20):
            while service.log.read_text().count("retained message ignored") < 2:
                await asyncio.sleep(0.05)
        metrics = await service.settled()
    assert (len(ear.terminal("kept")), len(ear.terminal("bad"))) == (1, 1)
    assert metrics["tokenbus_requests_accepted_total"] == 1
