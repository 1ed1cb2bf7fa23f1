"""Requests with deadlines, through a real broker, a real worker, and the death of the service."""

import asyncio
import os
import signal
import sqlite3
import time
from pathlib import Path

import msgspec
import pytest

from protocol import topics
from protocol.client import Client, RequestExpired
from protocol.errors import ErrorBody, RequestError
from protocol.replies import Accepted, Cancelled, Chunk, Expired, Reply
from protocol.request import Request, encode_request
from protocol.transport import BrokerAddress, Transport
from scheduler.journal.entry import Entry
from scheduler.journal.row import load
from tests.faults.service import Ear, ServiceProcess

pytestmark = pytest.mark.timeout(120)

SHORT = Request(prompt=[5, 6, 7], max_tokens=20, temperature=0.0, ignore_eos=True, stream=True)
LONG = msgspec.structs.replace(SHORT, max_tokens=4000)
LONG_PROMPT = msgspec.structs.replace(SHORT, prompt=[5] * 4000)
DEADLINE_MS = 6000


async def told(ear: Ear, kind: type[Reply], *ids: str, times: int = 1) -> None:
    """Wait until there are so many such replies for each."""
    async with asyncio.timeout(60):
        for id in ids:
            while sum(isinstance(reply, kind) for reply in ear.heard.get(id, ())) < times:
                await asyncio.sleep(0.005)


async def send(transport: Transport, id: str, request: Request, **given) -> None:
    await transport.publish(topics.request("alice", "tiny", id), encode_request(request), **given)


async def test_a_deadline_ends_a_request_wherever_it_is_and_waits_for_no_step(tmp_path, broker, model):
    """The worker is held up in a step until all have expired."""
    in_time = {"deadline_ms": DEADLINE_MS}
    sizes = {"engine__max_running": 2, "engine__max_batch_tokens": 4}
    async with (
        ServiceProcess(tmp_path, model, broker.url, **sizes) as service,
        Transport(BrokerAddress.parse(broker.url)) as alice,
        Client(broker.url, tenant="bob") as bob,
        Ear(broker.url, "alice") as ear,
    ):
        alone = (await bob.complete(SHORT, model="tiny")).text
        begun = time.monotonic()
        decoding = msgspec.structs.replace(LONG, **in_time)
        await send(alice, "decoding", decoding)
        await told(ear, Chunk, "decoding")
        await send(alice, "decoding", decoding, response_topic=topics.out("alice", "joins"))
        await send(alice, "prefilling", msgspec.structs.replace(LONG_PROMPT, **in_time))
        await send(alice, "waiting", msgspec.structs.replace(SHORT, **in_time))
        await told(ear, Accepted, "prefilling", "waiting")
        await told(ear, Accepted, "decoding", times=2)
        metrics = await service.metrics()
        assert (metrics["tokenbus_running_requests"], metrics["tokenbus_waiting_requests"]) == (2, 1)
        os.kill(service.worker_pid, signal.SIGSTOP)
        try:
            await told(ear, Expired, "prefilling", "waiting")
            await told(ear, Expired, "decoding", times=2)
            assert time.monotonic() - begun >= DEADLINE_MS / 1000
        finally:
            os.kill(service.worker_pid, signal.SIGCONT)
        assert (await bob.complete(SHORT, model="tiny")).text == alone
        metrics = await service.settled()
    (once, to_who_joined) = ear.terminal("decoding")
    assert once == to_who_joined
    assert 0 < once.completion_tokens < LONG.max_tokens
    assert ear.terminal("prefilling") == [Expired("prefilling", 0)]
    assert ear.terminal("waiting") == [Expired("waiting", 0)]
    assert metrics['tokenbus_requests_total{outcome="expired"}'] == 3


async def test_a_request_expires_with_its_message(tmp_path, broker, model):
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Transport(BrokerAddress.parse(broker.url)) as alice,
        Ear(broker.url, "alice") as ear,
    ):
        begun = time.monotonic()
        await send(alice, "message", LONG, expiry_s=2)
        await send(alice, "sooner", msgspec.structs.replace(LONG, deadline_ms=600_000), expiry_s=2)
        await told(ear, Expired, "message", "sooner")
        assert time.monotonic() - begun >= 1, "brokers count whole seconds"
        await send(alice, "message", LONG, expiry_s=100)
        await told(ear, Expired, "message", times=2)
        assert ear.terminal("message")[0] == ear.terminal("message")[1], "what has ended is replayed"
        await service.settled()


def journalled(journal: Path, id: str) -> Entry:
    with sqlite3.connect(journal) as database:
        columns = "id, accepted_at, attempt, trials, listeners, body, reply"
        (row,) = database.execute(f"SELECT {columns} FROM requests WHERE id = ?", (f"alice/{id}",))
    database.close()
    return load(row, [])


async def test_the_time_a_message_waits_at_the_broker_counts(tmp_path, broker, model):
    lifetime_s = 600
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Transport(BrokerAddress.parse(broker.url)) as alice,
        Ear(broker.url, "alice") as ear,
    ):
        assert await service.stop(signal.SIGTERM) == 0
        published = time.time()
        await send(alice, "gone", LONG, expiry_s=1)
        await send(alice, "kept", LONG, expiry_s=lifetime_s)
        held = time.time()
        await asyncio.sleep(3)
        fetched = time.time()
        await service.start()
        await told(ear, Accepted, "kept")
        await service.stop(signal.SIGKILL)
        assert "gone" not in ear.heard
    assert service.rows().total() == 1
    kept = journalled(service.journal, "kept")
    assert kept.expires_at - kept.accepted_at <= lifetime_s - int(fetched - held), "brokers count whole seconds"
    assert kept.expires_at > published + lifetime_s - 1.1


async def test_a_deadline_holds_across_kill_9(tmp_path, broker, model):
    overdue = msgspec.structs.replace(LONG, deadline_ms=2000)
    later = msgspec.structs.replace(SHORT, max_tokens=3000, deadline_ms=600_000)
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Client(broker.url, tenant="alice") as alice,
        Ear(broker.url, "alice") as ear,
    ):
        results = asyncio.gather(
            alice.complete(overdue, model="tiny", request_id="overdue"),
            alice.complete(later, model="tiny", request_id="later"),
            return_exceptions=True,
        )
        await told(ear, Chunk, "overdue", "later")
        await service.stop(signal.SIGKILL)
        left_s = journalled(service.journal, "overdue").expires_at - time.time()
        assert left_s < 2
        await asyncio.sleep(left_s)
        await service.start()
        expired, result = await results
        await service.settled()
        assert await service.stop(signal.SIGTERM) == 0
    assert isinstance(expired, RequestExpired)
    assert 0 < expired.completion_tokens < LONG.max_tokens
    assert ear.terminal("overdue") == [Expired("overdue", expired.completion_tokens, attempt=2)]
    assert (result.usage.completion_tokens, result.attempt) == (3000, 2)
    assert service.rows() == {2: 2}


async def test_cancels_around_the_deadline_leave_each_request_one_end(tmp_path, broker, model):
    ids = [f"r{number}" for number in range(60)]
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Transport(BrokerAddress.parse(broker.url)) as alice,
        Ear(broker.url, "alice") as ear,
        asyncio.TaskGroup() as group,
    ):

        async def race(id: str, after_s: float) -> None:
            await send(alice, id, msgspec.structs.replace(LONG, deadline_ms=2000))
            await asyncio.sleep(after_s)
            await alice.publish(topics.cancel("alice", id), b"")

        for number, id in enumerate(ids):
            group.create_task(race(id, 1.7 + number * 0.01), name=id)
        await told(ear, Accepted, *ids)
        metrics = await service.settled()
    ends = [ear.terminal(id) for id in ids]
    assert all(len(end) == 1 and isinstance(end[0], Cancelled | Expired) for end in ends)
    outcomes = [metrics.get(f'tokenbus_requests_total{{outcome="{name}"}}', 0) for name in ("cancelled", "expired")]
    assert sum(outcomes) == len(ids)


async def refusal(client: Client, request: Request) -> ErrorBody:
    with pytest.raises(RequestError) as caught:
        await client.complete(msgspec.structs.replace(request, deadline_ms=1, refuse_late=True), model="tiny")
    assert caught.value.code == "deadline_unreachable"
    return caught.value.body


async def test_who_would_be_late_is_refused_with_an_estimate_and_leaves_no_trace(tmp_path, broker, model):
    async with (
        ServiceProcess(tmp_path, model, broker.url) as service,
        Transport(BrokerAddress.parse(broker.url)) as sender,
        Client(broker.url, tenant="alice") as alice,
        Client(broker.url, tenant="bob") as bob,
        Ear(broker.url, "alice") as ear,
    ):
        await alice.complete(SHORT, model="tiny")
        idle_ms = (await refusal(alice, SHORT)).estimate_ms
        punctual = msgspec.structs.replace(SHORT, deadline_ms=10_000 + 100 * idle_ms, refuse_late=True)
        assert (await alice.complete(punctual, model="tiny")).usage.completion_tokens == SHORT.max_tokens

        ahead = [f"r{number}" for number in range(40)]
        for id in ahead:
            await send(sender, id, LONG)
        await told(ear, Accepted, *ahead)
        urgent = msgspec.structs.replace(SHORT, priority=1)
        late_ms, urgent_ms, other_ms = [
            (await refusal(client, request)).estimate_ms
            for client, request in ((alice, SHORT), (alice, urgent), (bob, SHORT))
        ]
        assert late_ms > 10 * max(urgent_ms, other_ms), "neither the urgent nor the other tenant waits for all of that"
        for id in ahead:
            await sender.publish(topics.cancel("alice", id), b"")
        metrics = await service.settled()
        assert metrics['tokenbus_rejections_total{reason="deadline_unreachable"}'] == 4
        assert metrics["tokenbus_requests_accepted_total"] == 2 + len(ahead)
        assert await service.stop(signal.SIGTERM) == 0
    assert service.rows() == {2: 2 + len(ahead)}
