"""What the shipped broker keeps, drops and refuses, beside who gets in."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from protocol.transport import NO_SUBSCRIBER, ConnectionRefused, PayloadTooLarge, PublishRefused, Transport
from tests.security.conftest import Broker, connected, heard, make_broker, run, running_mosquitto

pytestmark = pytest.mark.timeout(60)

DROPPED = "$SYS/broker/publish/messages/dropped"
MIB = 1 << 20


@pytest.fixture
def stopped(tmp_path: Path) -> Broker:
    """Set up, not started, and quick with its figures."""
    broker = make_broker(tmp_path)
    edit(broker, "sys_interval 10", "sys_interval 1")
    return broker


def edit(broker: Broker, old: str, new: str, file: str = "mosquitto.conf") -> None:
    path = broker.root / "etc/mosquitto" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def away(broker: Broker, filter: str = "tokenbus/v1/bob/out/#") -> Transport:
    """Bob's session, which lives on while he doesn't."""
    return Transport(broker.by_password("bob"), subscriptions=[(filter, 1)], identifier="bobs", session_expiry_s=600)


async def publish(broker: Broker, *ids: str, body: bytes = b"x") -> None:
    async with connected(broker.by_certificate("_service")) as service:
        for id in ids:
            await service.publish(f"tokenbus/v1/bob/out/{id}", body)


async def test_sessions_and_their_rights_outlive_the_broker(stopped):
    """A clean stop keeps everything; kill -9 keeps what is older than autosave_interval."""
    with running_mosquitto(stopped):
        async with away(stopped):
            pass
        await publish(stopped, "before")
    with running_mosquitto(stopped) as process:
        await publish(stopped, "between")  # to a session that was only read from disk
        await asyncio.sleep(3.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with running_mosquitto(stopped):
        async with away(stopped) as bob:
            ids = [message.topic.rpartition("/")[2] for message in await heard(bob)]
    assert ids == ["before", "between"]


async def test_a_client_that_does_not_read_costs_a_bounded_amount(stopped):
    with running_mosquitto(stopped) as process:
        async with away(stopped):
            pass
        await publish(stopped, *(str(number) for number in range(120)), body=b"x" * MIB)
        assert resident(process) < 100 * MIB
        async with connected(stopped.by_password("_monitor"), DROPPED) as monitor:
            dropped = await some_dropped(monitor)
        async with away(stopped) as bob:  # what was kept is whole and in order
            ids = [int(message.topic.rpartition("/")[2]) for message in await heard(bob, 1)]
        assert ids == list(range(120 - dropped))


async def test_chunks_to_a_client_that_does_not_read_are_bounded_too(stopped):
    """They are QoS 0, which max_queued_bytes doesn't count."""
    edit(stopped, "max_queued_messages 100000", "max_queued_messages 100")
    with running_mosquitto(stopped) as process:
        async with (
            connected(stopped.by_password("bob"), "tokenbus/v1/bob/out/#") as deaf,
            connected(stopped.by_certificate("_service")) as service,
            connected(stopped.by_password("_monitor"), DROPPED) as monitor,
        ):
            asyncio.get_running_loop().remove_reader(deaf._link._client.socket())
            for _ in range(300):
                assert service.publish_nowait("tokenbus/v1/bob/out/1", b"x" * (MIB // 4))
                await service.publish("tokenbus/v1/_svc/main/status", b"")  # so that none waits on our side
            assert await some_dropped(monitor) > 100
            assert resident(process) < 50 * MIB


async def some_dropped(monitor: Transport) -> int:
    """The first figure above zero."""
    async with asyncio.timeout(10):
        async for message in monitor.messages():
            if int(message.payload):
                return int(message.payload)
    raise AssertionError


def resident(process: subprocess.Popen[bytes]) -> int:
    pages = Path(f"/proc/{process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


async def test_a_message_over_the_limit_is_reported_never_swallowed(stopped):
    with running_mosquitto(stopped):
        async with connected(stopped.by_password("bob")) as bob:
            with pytest.raises(PayloadTooLarge) as refused:
                await bob.publish("tokenbus/v1/bob/req/m/1", b"x" * 16 * MIB)
            assert refused.value.limit == 16 * MIB
            assert await bob.publish("tokenbus/v1/bob/req/m/1", b"x" * (16 * MIB - 100)) == NO_SUBSCRIBER


async def test_users_named_like_filters_can_do_nothing_in_anothers_tree(stopped):
    users = ("+", "b#", "$SYS", "_svc", "%u", "..")
    for user in users:
        stopped.add_password(user, "any")
    with running_mosquitto(stopped):
        for user in users:
            async with connected(stopped.by_password(user, "any"), "#", "tokenbus/v1/+/out/#", "$SYS/#") as odd:
                for topic in ("tokenbus/v1/bob/req/m/1", "tokenbus/v1/bob/out/1", "tokenbus/v1/_svc/main/status"):
                    with pytest.raises(PublishRefused):
                        await odd.publish(topic, b"x")
                await publish(stopped, "1")
                assert await heard(odd, 0.2) == []


async def test_a_tenant_is_locked_out_at_once(stopped):
    """By the lines at the end of the ACL, whatever certificate the tenant holds; or by deleting the password."""
    with running_mosquitto(stopped) as process:
        async with connected(stopped.by_certificate("alice")) as alice:
            await alice.publish("tokenbus/v1/alice/req/m/1", b"x")
            edit(stopped, "# user mallory\n# topic", "user alice\ntopic", "acl")
            process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.5)
            with pytest.raises(PublishRefused):
                await alice.publish("tokenbus/v1/alice/req/m/1", b"x")
        async with connected(stopped.by_password("bob")) as bob:
            await bob.publish("tokenbus/v1/bob/req/m/1", b"x")
            run(["mosquitto_passwd", "-D", str(stopped.root / "etc/mosquitto/passwords"), "bob"])
            process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.5)
            assert not bob.connected
        with pytest.raises(ConnectionRefused):
            await Transport(stopped.by_password("bob")).__aenter__()
