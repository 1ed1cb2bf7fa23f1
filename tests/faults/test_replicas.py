"""Two replicas behind one broker, with one journal: whatever becomes of one, each request is answered once.

Where the text is of no interest their workers sleep instead of computing, which leaves the cores to what is tested.
"""

import asyncio
import contextlib
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
import psycopg
import pytest

from protocol import replies, topics
from protocol.client import Client, RequestCancelled
from protocol.errors import RequestError
from protocol.replies import Failed, Result
from protocol.request import Request
from protocol.transport import BrokerAddress, Transport
from tests.faults.load import ask, requests, told
from tests.faults.service import Ear, ServiceProcess

pytestmark = pytest.mark.timeout(300)

TENANTS = ("alice", "bob", "carol", "dave")
LEASE_S = 2

T = TypeVar("T")


COMPUTING, SLEEPING = "scheduler.cli", "benchmarks.replicas"
#: What comes all at once may all be taken up by the one that is awake first.
APART_S = 0.05


def replica(name: str, tmp_path, model, broker, database, **given) -> ServiceProcess:
    folder = tmp_path / name
    folder.mkdir()
    shared = {"service__replica": name, "journal__url": database, "journal__lease_s": LEASE_S}
    return ServiceProcess(folder, model, broker.url, **{"module": SLEEPING, **shared, **given})


@pytest.fixture(autouse=True)
def pace(monkeypatch):
    monkeypatch.setenv("SLEEPER_STEP_S", "0.02")


@contextlib.asynccontextmanager
async def two(tmp_path, model, broker, database, **given):
    """Both know of each other."""
    pair = [replica(name, tmp_path, model, broker, database, **given) for name in "ab"]
    async with contextlib.AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as group:
            for one in pair:
                group.create_task(stack.enter_async_context(one), name="start")
        await until(lambda: all_metrics(pair, "tokenbus_replicas"), lambda counts: min(counts) == 2)
        yield pair


@pytest.fixture
async def pair(tmp_path, model, broker, database):
    async with two(tmp_path, model, broker, database) as pair:
        yield pair


async def all_metrics(pair: list[ServiceProcess], name: str) -> list[float]:
    return [(await one.metrics()).get(name, 0.0) for one in pair]


async def until(look: Callable[[], Awaitable[T]], holds: Callable[[T], bool]) -> T:
    async with asyncio.timeout(60):
        while not holds(seen := await look()):
            await asyncio.sleep(0.02)
    return seen


@contextlib.asynccontextmanager
async def clients(url: str):
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Client(url, tenant=tenant)) for tenant in TENANTS]


def rows(database: str) -> Counter[str]:
    """Journalled requests by state."""
    with psycopg.connect(database) as connection:
        return Counter(state for (state,) in connection.execute("SELECT state FROM tokenbus.requests"))


async def stop_between_transactions(one: ServiceProcess, database: str) -> None:
    """The database ends the session of who stops in the middle of one, and with it the service."""
    with psycopg.connect(database, autocommit=True) as connection:
        while True:
            one.process.send_signal(signal.SIGSTOP)
            seen = set()
            for _ in range(2):  # what it sent before may still be on its way
                await asyncio.sleep(0.02)
                query = "SELECT state FROM pg_stat_activity WHERE application_name = %s"
                seen |= {state for (state,) in connection.execute(query, (one.folder.name,))}
            if seen == {"idle"}:
                return
            one.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.02)


def ends(ear: Ear, id: str) -> set[bytes]:
    """The terminal messages of a request, whatever attempt they name: a client that wasn't told in time asks again, and one
    told right before a death is told again by who takes over, the very same."""
    return {replies.encode(msgspec.structs.replace(reply, attempt=1)) for reply in ear.terminal(id)}


def taken_over(one: ServiceProcess) -> int:
    """How often it has taken over what another one left."""
    return one.log.read_text().count("taking over what another replica left")


async def accepted(pair: list[ServiceProcess]) -> list[float]:
    return await all_metrics(pair, "tokenbus_requests_accepted_total")


async def test_one_is_killed_with_100_requests_in_flight_and_the_other_finishes_them_all(
    tmp_path, model, broker, database
):
    asked = requests(100, shortest=20, longest=150)
    begun = asyncio.Event()
    chunks = 0

    def count() -> None:
        nonlocal chunks
        chunks += 1
        if chunks == 60:
            begun.set()

    async with (
        two(tmp_path, model, broker, database, module=COMPUTING) as pair,
        clients(broker.url) as tenants,
        Ear(broker.url, *TENANTS) as ear,
    ):
        expected = {id: told(result) for id, result in (await ask(tenants, asked, "reference-")).items()}
        assert sum(await accepted(pair)) == 100
        asking = asyncio.create_task(ask(tenants, asked, on_chunk=count), name="asking")
        await begun.wait()
        outstanding = await all_metrics(pair, "tokenbus_outstanding_requests")
        victim = pair.pop(outstanding.index(max(outstanding)))
        await victim.stop(signal.SIGKILL)
        results = await asking
        (other,) = pair
        await other.settled()
        assert await other.stop(signal.SIGTERM) == 0
    assert {id: told(result) for id, result in results.items()} == expected
    assert max(result.attempt for result in results.values()) == 2, "some were taken over, and only once"
    assert rows(database) == {"delivered": 200}
    for id in asked:
        assert len(ends(ear, id)) == 1
        ear.pieces(id)


async def test_one_that_was_only_slow_says_nothing_of_what_it_has_lost(pair, broker, database):
    a, b = pair
    asked = requests(40, shortest=50, longest=200)
    async with clients(broker.url) as tenants, Ear(broker.url, *TENANTS) as ear:
        asking = asyncio.create_task(ask(tenants, asked, every_s=APART_S), name="asking")
        await until(lambda: all_metrics(pair, "tokenbus_outstanding_requests"), lambda counts: min(counts) > 5)
        before = taken_over(b)
        await stop_between_transactions(a, database)
        async with asyncio.timeout(30):
            while taken_over(b) == before:
                await asyncio.sleep(0.02)
        a.process.send_signal(signal.SIGCONT)
        await asking
        await a.until_logged("the lease had run out")
        metrics = [await one.settled() for one in pair]
    lost = metrics[0]['tokenbus_requests_total{outcome="taken_over"}']
    assert lost > 0
    assert sum(one["tokenbus_requests_accepted_total"] for one in metrics) == 40 + lost
    assert rows(database) == {"delivered": 40}
    for id in asked:
        assert len(ends(ear, id)) == 1
        ear.pieces(id)


async def test_a_cancel_that_comes_before_the_taking_over_holds_after_it(pair, broker):
    long = Request(prompt=[5, 6, 8], max_tokens=4000, temperature=0.0, ignore_eos=True)
    async with Client(broker.url, tenant="alice") as client, Ear(broker.url, "alice") as ear:
        ids = [f"r{number}" for number in range(12)]
        asking = []
        for id in ids:
            asking.append(asyncio.create_task(client.complete(long, model="tiny", request_id=id), name=id))
            await asyncio.sleep(APART_S)
        assert min(await until(lambda: accepted(pair), lambda counts: sum(counts) == 12)) > 0
        await pair[0].stop(signal.SIGKILL)
        for id in ids:
            await client.cancel(id)
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        await pair[1].settled()
        assert {type(outcome) for outcome in outcomes} == {RequestCancelled}
        assert [len(ends(ear, id)) for id in ids] == [1] * 12


async def test_what_several_hear_is_answered_by_one(pair, broker):
    request = Request(prompt=[5, 6, 7], max_tokens=8, temperature=0.0, ignore_eos=True)
    long = Request(prompt=[5, 6, 8], max_tokens=3000, temperature=0.0, ignore_eos=True, stream=True)
    address = BrokerAddress.parse(broker.url)
    async with (
        Client(broker.url, tenant="alice") as client,
        Ear(broker.url, "alice") as ear,
        Transport(address) as transport,
    ):
        for number in range(10):
            await client.complete(request, model="tiny", request_id=f"r{number}")
        for number in range(10):  # replayed by who ran it
            await client.complete(request, model="tiny", request_id=f"r{number}")
        with pytest.raises(RequestError, match="was given to another request"):
            await client.complete(long, model="tiny", request_id="r0")
        with pytest.raises(RequestError, match="prompt"):
            await client.complete(Request(prompt=[]), model="tiny", request_id="bad")
        async for _ in client.stream(long, model="tiny", request_id="long"):
            break  # which cancels it
        for id in ("r1", "unknown"):
            await transport.publish(topics.cancel("alice", id), b"", response_topic=topics.out("alice", f"late/{id}"))
        for one in pair:
            await one.settled()
        assert {type(reply) for reply in ear.terminal("r1")} == {Result, Failed}
    assert [len(ear.terminal(f"r{number}")) for number in range(10)] == [3, 3, *[2] * 8]
    assert len(ear.terminal("bad")) == len(ear.terminal("long")) == len(ear.terminal("unknown")) == 1
    assert sum(await accepted(pair)) == 11


async def test_a_quota_holds_for_both_together(tmp_path, model, broker, database):
    long = Request(prompt=[5, 6, 8], max_tokens=3000, temperature=0.0, ignore_eos=True)
    async with (
        two(tmp_path, model, broker, database, limits__outstanding_per_tenant=10) as pair,
        Client(broker.url, tenant="alice") as client,
    ):
        streams = [asyncio.create_task(client.complete(long, model="tiny", request_id=f"r{n}")) for n in range(10)]
        await until(lambda: accepted(pair), lambda counts: sum(counts) == 10)
        await asyncio.sleep(LEASE_S)  # they hear of each other several times meanwhile
        with pytest.raises(RequestError, match="10 requests of yours are outstanding") as caught:
            await client.complete(long, model="tiny", request_id="over")
        assert caught.value.code == "rate_limited"
        assert sum(await accepted(pair)) == 10
        assert sum(await all_metrics(pair, 'tokenbus_rejections_total{reason="rate_limited"}')) >= 1
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def test_one_that_drains_leaves_what_it_cannot_finish_to_the_other(tmp_path, model, broker, database):
    asked = requests(20, shortest=60, longest=150)
    async with (
        two(tmp_path, model, broker, database, service__drain_s=0.1) as pair,
        clients(broker.url) as tenants,
        Ear(broker.url, *TENANTS) as ear,
    ):
        asking = asyncio.create_task(ask(tenants, asked), name="asking")
        counts = await until(lambda: accepted(pair), lambda counts: sum(counts) == 20)
        # Of a burst, one may have got all.
        busy, other = pair if counts[0] > counts[1] else reversed(pair)
        assert await busy.stop(signal.SIGTERM) == 3
        await asking
        await other.settled()
        assert all(len(ends(ear, id)) == 1 for id in asked)
    assert rows(database) == {"delivered": 20}
