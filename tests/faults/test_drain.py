"""SIGTERM under load: what runs finishes, what comes waits at the broker; a second one stops at once, and nothing is lost."""

import asyncio
import signal

import pytest

from protocol import topics
from protocol.client import Client
from protocol.replies import decode_status
from protocol.request import Request
from protocol.transport import BrokerAddress, Transport
from tests.faults.load import ask, requests
from tests.faults.service import Ear, ServiceProcess

pytestmark = pytest.mark.timeout(180)

SHORT = Request(prompt=[5, 6, 7], max_tokens=4, temperature=0.0, ignore_eos=True)


async def test_sigterm_drains_and_what_comes_meanwhile_is_served_by_the_next_start(tmp_path, broker, model):
    asked = requests(20, shortest=300)
    begun = asyncio.Event()
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Client(broker.url, tenant="alice") as client,
        Transport(BrokerAddress.parse(broker.url), subscriptions=[(topics.STATUS, 1)]) as status,
    ):
        asking = asyncio.create_task(ask([client], asked, on_chunk=begun.set), name="asking")
        await begun.wait()
        await service.has_accepted(len(asked))
        assert await said(status) == "online"
        service.process.send_signal(signal.SIGTERM)
        assert await said(status) == "draining"
        assert await service.checks() == {"worker": True, "broker": True, "journal": True, "accepting": False}
        late = asyncio.create_task(client.complete(SHORT, model="tiny"), name="late")
        results = await asking
        assert await service.process.wait() == 0
        assert await said(status) == "offline"
        assert not late.done()
        assert service.rows() == {2: len(asked)}
        await service.start()
        assert (await late).usage.completion_tokens == 4
        await service.settled()
    assert all(result.attempt == 1 for result in results.values())


async def said(status: Transport) -> str:
    async with asyncio.timeout(20):
        return decode_status((await anext(status.messages())).payload).status


@pytest.mark.parametrize("how", ["second signal", "deadline"])
async def test_a_second_sigterm_or_the_deadline_leaves_the_rest_to_the_next_start(tmp_path, broker, model, how):
    asked = requests(20, shortest=500, longest=700)
    begun = asyncio.Event()
    drain_s = 0.5 if how == "deadline" else 60
    async with (
        ServiceProcess(tmp_path, model, broker.url, service__drain_s=drain_s) as service,
        Client(broker.url, tenant="alice") as client,
        Ear(broker.url, "alice") as ear,
    ):
        asking = asyncio.create_task(ask([client], asked, on_chunk=begun.set), name="asking")
        await begun.wait()
        await service.has_accepted(len(asked))
        service.process.send_signal(signal.SIGTERM)
        if how == "second signal":
            while (await service.checks())["accepting"]:
                await asyncio.sleep(0.02)
            service.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(15):
            assert await service.process.wait() == 3
        rows = service.rows()
        assert rows[0] > 0
        assert rows.total() == len(asked)
        await service.start()
        results = await asking
        await service.settled()
    assert {result.attempt for result in results.values()} >= {2}
    assert all(len(ear.terminal(id)) == 1 for id in asked)


async def test_sigterm_while_it_starts_ends_it(tmp_path, broker, model):
    service = ServiceProcess(tmp_path, model, broker.url)
    await service.start(wait=False)
    async with asyncio.timeout(60):
        while (await service.ask("/healthz"))[0] == 0:
            await asyncio.sleep(0.02)
        assert (await service.ask("/readyz"))[0] == 503
        assert await service.stop(signal.SIGTERM) == 0
    assert "Traceback" not in service.log.read_text()


async def test_two_services_on_one_journal_are_refused(tmp_path, broker, model):
    async with ServiceProcess(tmp_path, model, broker.url) as service:
        second = ServiceProcess(tmp_path, model, broker.url)
        second.log = tmp_path / "second.log"
        await second.start(wait=False)
        assert await second.process.wait() == 1
        assert "is in use by another process" in second.log.read_text().splitlines()[-1]
        assert (await service.ask("/readyz"))[0] == 200
