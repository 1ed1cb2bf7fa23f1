"""The transport against a real Mosquitto."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from protocol.transport import (
    BrokerAddress,
    BrokerUnreachable,
    ConnectionRefused,
    Incoming,
    PayloadTooLarge,
    PublishRefused,
    Transport,
    TransportError,
    Will,
)
from scheduler.mqtt.broker import EmbeddedBroker


async def receive(transport: Transport) -> Incoming:
    async with asyncio.timeout(10):
        return await anext(transport.messages())


async def until_disconnected(transport: Transport) -> None:
    async with asyncio.timeout(10):
        while transport.connected:  # noqa: ASYNC110 (the state has no event of its own: only connecting has)
            await asyncio.sleep(0.005)


async def reconnect(broker: EmbeddedBroker, transport: Transport, how: signal.Signals = signal.SIGTERM) -> None:
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(transport.wait_reconnected(), name="reconnected")
        await broker.restart(how)


async def test_round_trip_carries_every_property(address: BrokerAddress) -> None:
    async with Transport(address, subscriptions=[("in/+", 1)]) as transport:
        code = await transport.publish("in/1", b"\x00body", response_topic="out/1", correlation=b"\xffc", expiry_s=60)
        incoming = await receive(transport)
        transport.acknowledge(incoming)
        assert code == 0
        assert (incoming.topic, incoming.payload, incoming.qos) == ("in/1", b"\x00body", 1)
        assert (incoming.response_topic, incoming.correlation, incoming.expiry_s) == ("out/1", b"\xffc", 60)
        assert not incoming.duplicate


async def test_qos_0_arrives_in_order_before_a_later_qos_1(address: BrokerAddress) -> None:
    async with Transport(address, subscriptions=[("in", 1)]) as transport:
        for number in range(100):
            assert transport.publish_nowait("in", b"%d" % number, correlation=b"c")
        await transport.publish("in", b"end")
        received = [await receive(transport) for _ in range(101)]
        assert [incoming.payload for incoming in received] == [b"%d" % number for number in range(100)] + [b"end"]
        assert received[0].correlation == b"c"
        assert received[0].qos == 0


async def test_nobody_subscribed_is_told(address: BrokerAddress) -> None:
    async with Transport(address) as transport:
        assert await transport.publish("nowhere", b"x") == 16


async def test_retained_message_comes_to_a_later_subscriber(address: BrokerAddress) -> None:
    async with Transport(address) as first:
        await first.publish("state", b"online", retain=True)
    async with Transport(address, subscriptions=[("state", 1)]) as second:
        assert (await receive(second)).payload == b"online"


async def test_unacknowledged_comes_again_after_a_reconnect(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    async with Transport(address, identifier="service", subscriptions=[("in", 1)], session_expiry_s=60) as transport:
        await transport.publish("in", b"held")
        await transport.publish("in", b"done")
        held, done = await receive(transport), await receive(transport)
        transport.acknowledge(done)
        assert (held.payload, held.duplicate) == (b"held", False)
        await transport.publish("nowhere", b"")  # its PUBACK proves that the one before has been sent
        await reconnect(broker, transport)
        again = await receive(transport)
        assert (again.payload, again.duplicate) == (b"held", True)
        assert again.epoch > held.epoch
        transport.acknowledge(again)


async def test_unacknowledged_comes_again_to_the_next_process(address: BrokerAddress) -> None:
    def service() -> Transport:
        return Transport(address, identifier="service", subscriptions=[("in", 1)], session_expiry_s=60)

    async with service() as first:
        await first.publish("in", b"held")
        await receive(first)
    async with service() as second:
        again = await receive(second)
        assert (again.payload, again.duplicate) == (b"held", True)
        second.acknowledge(again)
    async with service() as third:
        await third.publish("in", b"new")
        assert (await receive(third)).payload == b"new"


async def test_stale_acknowledgement_is_ignored(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    """Its packet identifier now means the redelivered message, which a PUBACK would lose."""
    async with Transport(address, identifier="service", subscriptions=[("in", 1)], session_expiry_s=60) as transport:
        await transport.publish("in", b"held")
        stale = await receive(transport)
        await reconnect(broker, transport)
        again = await receive(transport)
        assert again.mid == stale.mid
        transport.acknowledge(stale)
        await reconnect(broker, transport)
        assert (await receive(transport)).payload == b"held"


async def test_session_under_a_generated_identifier_ends_with_the_exit(
    broker: EmbeddedBroker, address: BrokerAddress
) -> None:
    async with Transport(address, subscriptions=[("in", 1)], session_expiry_s=60):
        pass
    async with Transport(address) as other:
        assert await other.publish("in", b"x") == 16


async def test_kept_session_queues_while_away(address: BrokerAddress) -> None:
    def service() -> Transport:
        return Transport(address, identifier="service", subscriptions=[("in", 1)], session_expiry_s=60)

    async with service():
        pass
    async with Transport(address) as tenant:
        assert await tenant.publish("in", b"queued") == 0
    async with service() as back:
        assert (await receive(back)).payload == b"queued"


async def test_reconnects_and_subscribes_again_after_kill_9(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    async with Transport(address, subscriptions=[("in", 1)]) as transport:
        await reconnect(broker, transport, signal.SIGKILL)
        assert transport.connected
        assert await transport.publish("in", b"after") == 0
        assert (await receive(transport)).payload == b"after"


async def test_pending_publishes_survive_a_broker_restart(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    """More of them than the broker's Receive Maximum, and one given while it is away."""

    def receiver() -> Transport:
        return Transport(address, identifier="in", subscriptions=[("in", 1)], session_expiry_s=60)

    async with receiver():
        pass
    await broker.restart()  # saves the receiver's session, which a SIGKILL then doesn't take away
    messages = {b"%d" % number for number in range(1500)}
    async with Transport(address) as sender, asyncio.timeout(60):
        send_signal(broker, signal.SIGSTOP)
        pending = [asyncio.create_task(sender.publish("in", message)) for message in messages]
        await asyncio.sleep(0.05)  # so that some are in the socket
        await broker.stop(signal.SIGKILL)
        await until_disconnected(sender)
        pending.append(asyncio.create_task(sender.publish("in", b"late")))
        await asyncio.sleep(0)
        assert not any(task.done() for task in pending)
        await broker.start()
        assert {await task for task in pending} == {0}
        async with receiver() as back:
            arrived = set()
            for _ in pending:
                arrived.add((incoming := await receive(back)).payload)
                back.acknowledge(incoming)
            assert arrived == messages | {b"late"}


async def test_qos_0_is_dropped_while_disconnected(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    async with Transport(address, subscriptions=[("in", 1)]) as transport:
        await broker.stop()
        await until_disconnected(transport)
        assert transport.publish_nowait("in", b"dropped") is False
        await broker.start()
        async with asyncio.timeout(10):
            await transport.wait_connected()
        assert transport.publish_nowait("in", b"sent") is True
        assert (await receive(transport)).payload == b"sent"


async def test_qos_0_is_dropped_when_too_much_is_unsent(address: BrokerAddress) -> None:
    async with Transport(address) as transport:
        sent = [transport.publish_nowait("nowhere", b"x") for _ in range(10_001)]
        assert sent == [True] * 10_000 + [False]
        assert await transport.publish("nowhere", b"") == 16
        assert transport.publish_nowait("nowhere", b"x") is True


async def test_message_over_the_brokers_limit_raises(tmp_path: Path) -> None:
    """And none that is let through vanishes."""
    limit = 1000
    async with (
        EmbeddedBroker(data_dir=tmp_path, settings=[f"max_packet_size {limit}"]) as broker,
        Transport(BrokerAddress.parse(broker.url), subscriptions=[("in", 1)]) as transport,
    ):
        largest = 0
        for size in range(limit - 40, limit + 1):
            try:
                await transport.publish("in", b"x" * size, response_topic="out")
            except PayloadTooLarge as error:
                assert error.limit == limit
                break
            transport.acknowledge(await receive(transport))
            largest = size
        assert limit - 30 < largest < limit
        with pytest.raises(PayloadTooLarge):
            transport.publish_nowait("in", b"x" * limit)
        assert transport.connected


async def test_publish_outside_the_acl_is_refused(tmp_path: Path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("pattern write tokenbus/v1/%u/req/#\npattern read tokenbus/v1/%u/out/#\n")
    acl.chmod(0o600)
    async with EmbeddedBroker(data_dir=tmp_path / "broker", settings=[f"acl_file {acl}"]) as broker:
        address = BrokerAddress.parse(broker.url, username="alice", password="any")
        async with Transport(address) as transport:
            assert await transport.publish("tokenbus/v1/alice/req/m/1", b"x") == 16
            with pytest.raises(PublishRefused, match=r"Not authorized \(135\)") as refused:
                await transport.publish("tokenbus/v1/bob/req/m/1", b"x")
            assert refused.value.code == 135
            assert transport.connected


async def test_wrong_password_is_refused_at_once_and_never_shown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    passwords = tmp_path / "passwords"
    await run("mosquitto_passwd", "-b", "-c", str(passwords), "alice", "right")
    settings = ["allow_anonymous false", f"password_file {passwords}"]
    async with EmbeddedBroker(data_dir=tmp_path / "broker", settings=settings) as broker:
        async with Transport(BrokerAddress.parse(broker.url, username="alice", password="right")) as transport:
            assert transport.connected
        wrong = BrokerAddress.parse(broker.url, username="alice", password="hunter2")
        with pytest.raises(ConnectionRefused) as refused:
            await Transport(wrong).__aenter__()
    assert "Not authorized" in str(refused.value)
    assert "hunter2" not in caplog.text + str(refused.value) + repr(wrong)


async def test_first_connection_waits_for_the_broker(tmp_path: Path) -> None:
    broker = EmbeddedBroker(data_dir=tmp_path)

    async def connect() -> int:
        async with Transport(BrokerAddress.parse(broker.url)) as transport:
            return await transport.publish("nowhere", b"x")

    connecting = asyncio.create_task(connect())
    await asyncio.sleep(0.2)
    assert not connecting.done()
    async with broker:
        assert await connecting == 16


async def test_first_connection_gives_up_in_time() -> None:
    with socket.socket() as taken:  # bound, so that nobody else listens there either
        taken.bind(("127.0.0.1", 0))
        address = BrokerAddress("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(BrokerUnreachable, match=r"within 0\.3 s: .*refused"):
            await Transport(address, connect_timeout_s=0.3).__aenter__()


@pytest.mark.parametrize("greeting", [b"", bytes.fromhex("2003000000")], ids=["silent", "right after the CONNACK"])
async def test_broker_that_hangs_up_is_tried_again(greeting: bytes) -> None:
    """As one behind a load balancer does while it starts."""
    visits = 0
    enough = asyncio.Event()

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal visits
        await reader.read(1024)
        writer.write(greeting)
        writer.close()
        visits += 1
        if visits == 3:
            enough.set()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
        transport = Transport(BrokerAddress(*server.sockets[0].getsockname()))

        async def stay() -> None:
            async with transport:
                await asyncio.Event().wait()

        staying = asyncio.create_task(stay())
        async with asyncio.timeout(4):  # well under aiomqtt's time limit for one CONNACK
            await enough.wait()
        staying.cancel()
        await asyncio.wait({staying})


async def test_will_is_published_for_a_broken_connection_only(address: BrokerAddress) -> None:
    def service() -> Transport:
        return Transport(address, will=Will("status", b"offline", retain=True))

    async with Transport(address, subscriptions=[("status", 1)]) as watcher:
        async with service() as transport:
            await transport.publish("status", b"clean exit")
        async with service() as transport:
            await transport.publish("status", b"breaking")
            connection = transport._link._client.socket()
            assert connection is not None
            connection.shutdown(socket.SHUT_RDWR)
            assert [(await receive(watcher)).payload for _ in range(3)] == [b"clean exit", b"breaking", b"offline"]


async def test_closing_ends_every_wait(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    async with Transport(address) as transport:
        listening = asyncio.create_task(collect(transport))
        send_signal(broker, signal.SIGSTOP)
        publishing = asyncio.create_task(transport.publish("nowhere", b"x"))
        await asyncio.sleep(0)
    send_signal(broker, signal.SIGCONT)
    assert await listening == []
    with pytest.raises(TransportError, match="closed"):
        await publishing
    with pytest.raises(TransportError, match="closed"):
        await transport.publish("nowhere", b"x")


async def test_cancelled_publish_leaves_the_others_alone(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    async with Transport(address) as transport:
        send_signal(broker, signal.SIGSTOP)
        first, second = (asyncio.create_task(transport.publish("nowhere", b"x")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait({first})
        send_signal(broker, signal.SIGCONT)
        assert first.cancelled()
        assert await second == 16


async def test_qos_0_never_answers_for_a_qos_1_under_the_same_identifier(
    broker: EmbeddedBroker, address: BrokerAddress
) -> None:
    """paho numbers both from one counter of 65,535."""
    async with Transport(address) as transport:
        send_signal(broker, signal.SIGSTOP)
        waiting = asyncio.create_task(transport.publish("nowhere", b"x"))
        await asyncio.sleep(0)
        transport._link._client._last_mid -= 1
        assert transport.publish_nowait("nowhere", b"x")
        await asyncio.sleep(0.1)
        assert not waiting.done()
        send_signal(broker, signal.SIGCONT)
        assert await waiting == 16


async def test_tls_trusts_the_given_authority_only(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    await run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, *files)
    port = EmbeddedBroker(data_dir=tmp_path).port
    settings = [f"listener {port} 127.0.0.1", f"certfile {certificate}", f"keyfile {key}", "max_packet_size 4000000"]
    async with EmbeddedBroker(data_dir=tmp_path / "broker", settings=settings):
        url = f"mqtts://127.0.0.1:{port}"
        address = BrokerAddress.parse(url, ca_file=str(certificate))
        async with Transport(address, subscriptions=[("in", 1)]) as transport:
            await transport.publish("in", b"x" * 1_000_000)
            assert len((await receive(transport)).payload) == 1_000_000
        with pytest.raises(BrokerUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            await Transport(BrokerAddress.parse(url), connect_timeout_s=0.3).__aenter__()


def test_address_is_read_from_a_url() -> None:
    assert BrokerAddress.parse("mqtt://alice@host") == BrokerAddress("host", 1883, "alice")
    assert BrokerAddress.parse("mqtts://host", username="bob", ca_file="ca") == BrokerAddress(
        "host", 8883, "bob", tls=True, ca_file="ca"
    )
    assert BrokerAddress.parse("mqtt://a%40b@[::1]:99") == BrokerAddress("::1", 99, "a@b")


@pytest.mark.parametrize("url", ["http://host", "host:1883", "mqtt://", "mqtt://host/path", "mqtt://u:secret@host"])
def test_address_outside_the_form_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match="broker's URL") as refused:
        BrokerAddress.parse(url)
    assert "secret" not in str(refused.value)


async def collect(transport: Transport) -> list[Incoming]:
    return [incoming async for incoming in transport.messages()]


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0


def send_signal(broker: EmbeddedBroker, how: signal.Signals) -> None:
    assert broker.pid is not None
    os.kill(broker.pid, how)
