"""A step that fails, kills the worker or never ends costs the request at fault, and nobody else."""

import asyncio
import os
import signal

import pytest

from protocol import topics
from protocol.client import Client
from protocol.errors import RequestError
from protocol.prefill import EmbeddingRequest
from protocol.replies import Quarantined, decode_quarantined
from protocol.request import Request
from protocol.transport import BrokerAddress, Transport
from tests.faults.load import ask, requests
from tests.faults.service import POISON, ServiceProcess

pytestmark = pytest.mark.timeout(180)

DEADLY = Request(prompt=[5, POISON, 7], max_tokens=20, temperature=0.0, ignore_eos=True)
#: One of its texts is, and takes the other with it.
DEADLY_EMBEDDING = EmbeddingRequest(input=[[9, 8, 7], [5, POISON, 7]])


async def outcome(client: Client, id: str) -> str:
    try:
        await client.complete(DEADLY_EMBEDDING if id == "poison-1" else DEADLY, model="tiny", request_id=id)
    except RequestError as error:
        return error.code
    return "done"


async def poisoned(service: ServiceProcess, url: str, count: int) -> tuple[set[str], dict[str, float]]:
    """Neighbours at work, then poison among them: how the poisonous ones ended, and the metrics at the end."""
    asked = requests(24)
    begun = asyncio.Event()
    async with Client(url, tenant="alice") as alice, Client(url, tenant="bob") as bob:
        expected = {id: result.text for id, result in (await ask([alice], asked, "reference-")).items()}
        asking = asyncio.create_task(ask([alice], asked, on_chunk=begun.set), name="asking")
        await begun.wait()
        outcomes = await asyncio.gather(*(outcome(bob, f"poison-{number}") for number in range(count)))
        results = await asking
        metrics = await service.settled()
    assert {id: result.text for id, result in results.items()} == expected
    return set(outcomes), metrics


@pytest.mark.parametrize("fault", ["fail", "run_out_of_memory"])
async def test_only_the_culprit_of_a_failing_step_fails_and_the_worker_lives(tmp_path, broker, model, fault):
    async with ServiceProcess(tmp_path, model, broker.url, fault=fault) as service:
        worker = service.worker_pid
        outcomes, metrics = await poisoned(service, broker.url, 2)
        assert service.worker_pid == worker
    assert outcomes == {"internal"}
    assert metrics["tokenbus_worker_restarts_total"] == 0
    assert 6 <= metrics["tokenbus_step_failures_total"] <= 24
    assert metrics['tokenbus_requests_total{outcome="error"}'] == 2


async def test_a_poison_request_is_quarantined_and_its_neighbours_finish(tmp_path, broker, model):
    dead = topics.dead("bob", "poison-0")
    async with (
        ServiceProcess(tmp_path, model, broker.url, fault="die") as service,
        Transport(BrokerAddress.parse(broker.url), subscriptions=[(dead, 1)]) as transport,
    ):
        outcomes, metrics = await poisoned(service, broker.url, 1)
        async with asyncio.timeout(10):
            told = await anext(transport.messages())
    assert outcomes == {"quarantined"}
    letter = decode_quarantined(told.payload)
    assert isinstance(letter, Quarantined)
    assert letter.request_id == "poison-0"
    assert 3 <= letter.failures == metrics["tokenbus_worker_restarts_total"] <= 7
    assert metrics["tokenbus_requests_quarantined_total"] == 1


async def test_a_request_that_kills_the_service_too_is_quarantined_after_some_restarts(tmp_path, broker, model):
    asked = requests(4)
    async with (
        ServiceProcess(tmp_path, model, broker.url, fault="die_with_service", engine__attempts=2) as service,
        Client(broker.url, tenant="alice", accept_timeout_s=120) as alice,
        Client(broker.url, tenant="bob", accept_timeout_s=120) as bob,
    ):
        asking = asyncio.create_task(ask([alice], asked), name="asking")
        deadly = asyncio.create_task(outcome(bob, "poison"), name="poison")
        starts = 0
        while not deadly.done():
            ended = asyncio.create_task(service.process.wait(), name="service")
            await asyncio.wait({ended, deadly}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                starts += 1
                await service.start(wait=False)
            else:
                ended.cancel()
        results = await asking
        await service.until_ready()
        await service.settled()
    assert await deadly == "quarantined"
    assert all(result.finish_reason == "length" for result in results.values())
    assert starts == 4, "two to become a suspect, two on trial"


@pytest.mark.parametrize(
    ("ranks", "asked", "deaths"), [(1, requests(32), (30, 120)), (2, requests(12, longest=80), (12,))], ids=["1", "2"]
)
async def test_kill_9_of_the_worker_in_the_middle_of_a_step(tmp_path, broker, model, ranks, asked, deaths):
    """Where several processes share the model, of one that the service doesn't know."""
    chunks = 0

    def strike() -> None:
        nonlocal chunks
        chunks += 1
        if chunks in deaths:
            (victim,) = service.rank_pids if ranks > 1 else (service.worker_pid,)
            os.kill(victim, signal.SIGKILL)

    async with (
        ServiceProcess(tmp_path, model, broker.url, model__tensor_parallel=ranks) as service,
        Client(broker.url, tenant="alice") as client,
    ):
        pid = service.process.pid
        expected = {id: result.text for id, result in (await ask([client], asked, "reference-")).items()}
        results = await ask([client], asked, on_chunk=strike)
        metrics = await service.settled()
        assert service.process.pid == pid
    assert {id: result.text for id, result in results.items()} == expected
    assert metrics["tokenbus_worker_restarts_total"] == len(deaths)


@pytest.mark.parametrize("busy", [True, False])
async def test_a_worker_that_hangs_is_not_ready_and_is_replaced(tmp_path, broker, model, busy):
    patience = {"engine__step_timeout_s": 2.0, "engine__stalled_after_s": 0.5, "engine__heartbeat_s": 0.2}
    async with (
        ServiceProcess(tmp_path, model, broker.url, fault="hang_once" if busy else None, **patience) as service,
        Client(broker.url, tenant="alice") as client,
    ):
        worker = service.worker_pid
        if busy:
            asking = asyncio.create_task(client.complete(DEADLY, model="tiny"), name="asking")
        else:
            os.kill(worker, signal.SIGSTOP)
        async with asyncio.timeout(20):
            while (await service.checks())["worker"]:
                await asyncio.sleep(0.05)
        assert (await service.ask("/healthz"))[0] == 200
        await service.until_ready()
        assert service.worker_pid != worker
        if busy:
            assert (await asking).usage.completion_tokens == 20
        metrics = await service.settled()
    if busy:
        assert metrics["tokenbus_worker_restarts_total"] == 1
