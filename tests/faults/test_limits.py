"""More than the service takes on: refused with a reason, and only those who are over a limit."""

import asyncio
import signal

import psutil
import pytest

from protocol import topics
from protocol.client import Client
from protocol.errors import RequestError
from protocol.replies import Accepted, Cancelled
from protocol.request import Request, encode_request
from protocol.transport import _MOST_UNREAD as MOST_UNREAD
from protocol.transport import BrokerAddress, Transport
from tests.faults.neighbour import neighbour
from tests.faults.service import Ear, ServiceProcess

pytestmark = pytest.mark.timeout(120)

LONG = Request(prompt=[5, 6, 7], max_tokens=4000, temperature=0.0, ignore_eos=True)
SHORT = Request(prompt=[5, 6, 7], max_tokens=3, temperature=0.0, ignore_eos=True)


async def refusal(client: Client) -> tuple[str, bool]:
    """The code, and whether it says when to come again."""
    with pytest.raises(RequestError) as caught:
        await client.complete(SHORT, model="tiny")
    return caught.value.code, 100 <= (caught.value.body.retry_after_ms or 0) <= 60_000


async def test_over_a_limit_nobody_else_is_refused_and_afterwards_nobody_is(tmp_path, broker, model):
    limits = {"limits__outstanding_per_tenant": 3, "limits__outstanding": 5}
    async with (
        ServiceProcess(tmp_path, model, broker.url, **limits) as service,
        Client(broker.url, tenant="alice") as alice,
        Client(broker.url, tenant="bob") as bob,
        Transport(BrokerAddress.parse(broker.url)) as sender,
        Ear(broker.url, "alice", "bob") as ear,
    ):

        async def run_long(tenant: str, id: str) -> None:
            await sender.publish(topics.request(tenant, "tiny", id), encode_request(LONG))

        async def told(kind: type, *ids: str, times: int = 1) -> None:
            for id in ids:
                while sum(isinstance(reply, kind) for reply in ear.heard.get(id, ())) < times:
                    await asyncio.sleep(0.005)

        for id in ("a1", "a2", "a3"):
            await run_long("alice", id)
        await told(Accepted, "a1", "a2", "a3")
        assert await refusal(alice) == ("rate_limited", True)
        assert (await bob.complete(SHORT, model="tiny")).usage.completion_tokens == 3

        for id in ("b1", "b2"):
            await run_long("bob", id)
        await told(Accepted, "b1", "b2")
        assert await refusal(bob) == ("overloaded", True)
        assert await refusal(alice) == ("rate_limited", True)

        await run_long("alice", "a1")  # joins
        await told(Accepted, "a1", times=2)

        for tenant, id in (("alice", "a1"), ("alice", "a2"), ("alice", "a3"), ("bob", "b1"), ("bob", "b2")):
            await sender.publish(topics.cancel(tenant, id), b"")
        await told(Cancelled, "a1", "a2", "a3", "b1", "b2")
        for client in (alice, bob):
            assert (await client.complete(SHORT, model="tiny")).usage.completion_tokens == 3
        metrics = await service.settled()
    assert metrics['tokenbus_rejections_total{reason="rate_limited"}'] == 2
    assert metrics['tokenbus_rejections_total{reason="overloaded"}'] == 1


async def test_a_flood_of_qos_0_requests_costs_a_bounded_amount_and_the_neighbour_is_served(tmp_path, broker, model):
    """All of it comes at once, after the service was held up."""
    count, size = 5 * MOST_UNREAD, 10_000
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Transport(BrokerAddress.parse(broker.url)) as sender,
    ):
        process = psutil.Process(service.process.pid)
        async with neighbour(broker.url):
            before = process.memory_info().rss
            process.send_signal(signal.SIGSTOP)
            for number in range(count):
                assert sender.publish_nowait(topics.request("mallory", "tiny", f"f{number}"), b"x" * size)
                if number % 1000 == 0:
                    await sender.publish("nowhere", b"")  # what came before has left
            await sender.publish("nowhere", b"")
            process.send_signal(signal.SIGCONT)
        metrics = await service.settled()
        assert process.memory_info().rss - before < 3 * MOST_UNREAD * size
        assert 0 < metrics['tokenbus_rejections_total{reason="invalid_request"}'] <= count
