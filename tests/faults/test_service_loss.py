"""The whole service is killed; what it had accepted is answered all the same, once."""

import asyncio
import signal

import pytest

from protocol.client import Client
from protocol.errors import RequestError
from protocol.replies import Result
from protocol.request import Request
from tests.faults.load import ask, requests, told
from tests.faults.service import Ear, ServiceProcess

pytestmark = pytest.mark.timeout(180)

TENANTS = ("alice", "bob", "carol", "dave")


async def test_kill_9_with_50_requests_in_flight_twice(tmp_path, broker, model):
    asked = requests(50)
    chunks = 0
    moment = asyncio.Event()

    def count() -> None:
        nonlocal chunks
        chunks += 1
        if chunks in (60, 200):
            moment.set()

    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Client(broker.url, tenant="alice") as alice,
        Client(broker.url, tenant="bob") as bob,
        Client(broker.url, tenant="carol") as carol,
        Client(broker.url, tenant="dave") as dave,
        Ear(broker.url, *TENANTS) as ear,
    ):
        clients = [alice, bob, carol, dave]
        expected = {id: told(result) for id, result in (await ask(clients, asked, "reference-")).items()}
        asking = asyncio.create_task(ask(clients, asked, on_chunk=count), name="asking")
        for _ in range(2):
            await moment.wait()
            moment.clear()
            assert not asking.done()
            await service.stop(signal.SIGKILL)
            await service.start()
        results = await asking
        await service.settled()
        assert await service.stop(signal.SIGTERM) == 0
    assert {id: told(result) for id, result in results.items()} == expected
    assert max(result.attempt for result in results.values()) == 3
    assert service.rows() == {2: 100}
    for id in asked:
        # Killed between publishing a result and closing its row, the service says it again, and the client shows one.
        ends = ear.terminal(id)
        assert [told(end) for end in ends] == [expected[id]] * len(ends)
        assert 1 <= len(ends) == len({end.attempt for end in ends}), "at most one from each life of the service"
        pieces = ear.pieces(id)
        assert sorted(pieces) == list(range(len(pieces))), "no gap on the wire"
        heard = dict.fromkeys(expected[id], "")
        for number in sorted(pieces):
            heard[pieces[number].index] += pieces[number].text
        # Killed once the end was journalled, before it was published: the result makes up for the last chunk of each choice.
        missing = results[id].chunks - len(pieces)
        assert missing == 0 or (missing <= len(heard) and results[id].attempt > 1)
        assert all(expected[id][index].startswith(text) for index, text in heard.items())
        assert sum(heard[index] != text for index, text in expected[id].items()) <= missing


async def test_killed_between_publishing_the_result_and_closing_the_row(tmp_path, broker, model):
    request = Request(prompt=[5, 6, 7], max_tokens=20, temperature=0.0, ignore_eos=True, stream=True)
    async with (
        ServiceProcess(tmp_path, model, broker.url, fault="die_before_closing") as service,
        Client(broker.url, tenant="alice") as client,
        Ear(broker.url, "alice") as ear,
    ):
        result = await client.complete(request, model="tiny", request_id="once")
        assert await service.process.wait() == -signal.SIGKILL
        await service.start()
        await service.settled()
        again = await client.complete(request, model="tiny", request_id="once")
        assert await service.stop(signal.SIGTERM) == 0
    attempts = [(reply.attempt, reply.text) for reply in ear.terminal("once")]
    assert attempts == [(1, result.text), (2, result.text), (1, result.text)], "the extra one, and the replay"
    assert again == result
    assert service.rows() == {2: 1}


async def test_the_same_id_a_hundred_times_is_one_generation(tmp_path, broker, model):
    request = Request(prompt=[5, 6, 7], max_tokens=300, temperature=1.0, ignore_eos=True, stream=True)
    async with ServiceProcess(tmp_path, model, broker.url) as service, Ear(broker.url, "alice") as ear:
        async with asyncio.TaskGroup() as group:
            during = [group.create_task(complete(broker.url, request), name=f"during {n}") for n in range(10)]
        async with Client(broker.url, tenant="alice") as client:
            after = [await client.complete(request, model="tiny", request_id="same") for _ in range(90)]
        metrics = await service.settled()
    assert len({result.text for result in [*(task.result() for task in during), *after]}) == 1
    assert metrics["tokenbus_requests_accepted_total"] == 1
    assert metrics['tokenbus_tokens_total{kind="generated"}'] == 300
    assert {type(reply) for reply in ear.terminal("same")} == {Result}


async def complete(url: str, request: Request) -> Result:
    async with Client(url, tenant="alice") as client:
        return await client.complete(request, model="tiny", request_id="same")


async def test_the_same_id_with_another_request_is_refused_and_harms_nobody(tmp_path, broker, model):
    request = Request(prompt=[5, 6, 7], max_tokens=300, temperature=0.0, ignore_eos=True)
    other = Request(prompt=[5, 6, 8], max_tokens=300, temperature=0.0, ignore_eos=True)
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Client(broker.url, tenant="alice") as one,
        Client(broker.url, tenant="alice") as two,
        Client(broker.url, tenant="bob") as bob,
    ):
        running = asyncio.create_task(one.complete(request, model="tiny", request_id="same"), name="one")
        while not (await service.metrics())["tokenbus_running_requests"]:
            await asyncio.sleep(0.01)
        with pytest.raises(RequestError, match="was given to another request") as caught:
            await two.complete(other, model="tiny", request_id="same")
        assert caught.value.code == "id_conflict"
        assert (await bob.complete(other, model="tiny", request_id="same")).usage.completion_tokens == 300
        assert (await running).usage.completion_tokens == 300
        with pytest.raises(RequestError, match="was given to another request"):
            await two.complete(other, model="tiny", request_id="same")
        await service.settled()
