"""Getting connected, and the broker's limits and refusals."""

import asyncio
import signal
import socket
from pathlib import Path

import pytest

from protocol.transport import (
    NO_SUBSCRIBER,
    BrokerAddress,
    BrokerUnreachable,
    CertificateError,
    ConnectionRefused,
    PayloadTooLarge,
    PublishRefused,
    Transport,
    TransportError,
)
from scheduler.mqtt.broker import EmbeddedBroker
from tests.brokers import receive, send_signal


async def test_receive_maximum_is_kept() -> None:
    """Against a peer that counts: Mosquitto announces one but lets more through."""
    connack_receive_maximum_2 = bytes.fromhex("20 06 00 00 03 21 00 02")
    publish = bytes.fromhex("32 07 00 01") + b"t"  # then the packet identifier, no properties, one byte of payload
    packets: asyncio.Queue[bytes] = asyncio.Queue()
    peers: list[asyncio.StreamWriter] = []

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peers.append(writer)
        await reader.readuntil(b"name")  # our CONNECT ends with the identifier
        writer.write(connack_receive_maximum_2)
        while packet := await reader.read(len(publish) + 4):
            packets.put_nowait(packet)
        writer.close()

    async with await asyncio.start_server(peer, "127.0.0.1", 0) as server, asyncio.timeout(10):
        address = BrokerAddress(*server.sockets[0].getsockname())
        async with Transport(address, identifier="name") as transport:
            publishing = [asyncio.create_task(transport.publish("t", b"x")) for _ in range(4)]
            sent = [await packets.get() for _ in range(2)]
            assert [packet[:5] for packet in sent] == [publish] * 2
            await asyncio.sleep(0.1)
            assert packets.empty()
            peers[0].write(bytes.fromhex("40 02") + sent[0][5:7])
            assert (await packets.get())[:5] == publish
            await asyncio.sleep(0.1)
            assert packets.empty()
            assert [task.done() for task in publishing] == [True, False, False, False]
    for task in publishing[1:]:
        with pytest.raises(TransportError, match="closed"):
            await task


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


UNSENDABLE = ["\0", "\x1f", "\x7f", "\x9f", "\ud800", "\ufdd0", "\uffff", "\U0010fffe", "x" * 65_536]


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a+b", "/" * 200, *UNSENDABLE], ids=ascii)
async def test_a_topic_that_no_broker_takes_is_refused_at_the_caller(address: BrokerAddress, topic: str) -> None:
    async with Transport(address) as transport:
        with pytest.raises(ValueError, match="the topic must"):
            await transport.publish(topic, b"x")
        with pytest.raises(ValueError, match="the topic must"):
            transport.publish_nowait(topic, b"x")
        assert await transport.publish("nowhere", b"x") == NO_SUBSCRIBER


@pytest.mark.parametrize("text", UNSENDABLE, ids=ascii)
async def test_properties_that_no_broker_takes_are_refused_at_the_caller(address: BrokerAddress, text: str) -> None:
    async with Transport(address) as transport:
        with pytest.raises(ValueError, match="the Response Topic must"):
            await transport.publish("nowhere", b"x", response_topic=text)
        with pytest.raises(ValueError, match="Correlation Data must"):
            await transport.publish("nowhere", b"x", correlation=b"x" * 65_536)
        assert await transport.publish("nowhere", b"x", correlation=b"x" * 65_535) == NO_SUBSCRIBER


@pytest.mark.parametrize(
    "text", ["\ufeff", "in/\ufeff", "\u2028\u200b", "\ue000", "x" * 65_535, "/" * 199], ids=lambda text: ascii(text[:9])
)
async def test_whatever_text_a_broker_passes_on_arrives(address: BrokerAddress, text: str) -> None:
    """One that doesn't would come again on the next connection, and break that too."""
    async with Transport(address, subscriptions=[("#", 1)]) as transport:
        await transport.publish("in", b"x", response_topic=text)
        await transport.publish(text, b"x")
        assert (await receive(transport)).response_topic == text
        assert (await receive(transport)).topic == text
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


async def test_broker_that_tells_nothing_of_itself_is_served_all_the_same() -> None:
    """Unlike Mosquitto, some refuse a subscription to $SYS in so many words."""
    connack, suback_not_authorised = bytes.fromhex("20 03 00 00 00"), bytes.fromhex("90 04 00 01 00 87")
    gone: asyncio.Queue[None] = asyncio.Queue()

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"name")  # our CONNECT ends with the identifier
        writer.write(connack)
        await reader.readuntil(b"\x00")
        writer.write(suback_not_authorised)
        await reader.read()
        writer.close()
        gone.put_nowait(None)

    async with await asyncio.start_server(peer, "127.0.0.1", 0) as server, asyncio.timeout(10):
        address = BrokerAddress(*server.sockets[0].getsockname())
        async with Transport(address, identifier="name", subscriptions=[("$SYS/broker/uptime", 0)]) as transport:
            assert transport.connected
        await gone.get()
        with pytest.raises(ConnectionRefused, match=r"subscription to in: Not authorized"):
            await Transport(address, identifier="name", subscriptions=[("in", 0)]).__aenter__()
        await gone.get()


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


async def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    def file(name: str) -> str:
        return str(tmp_path / name)

    key = ["-newkey", "rsa:2048", "-subj", "/CN=a"]
    for name, secret in (("one", ["-nodes"]), ("two", ["-nodes"]), ("locked", ["-passout", "pass:hunter2"])):
        made = ["-keyout", file(f"{name}.key"), "-out", file(f"{name}.crt")]
        await run("openssl", "req", "-x509", *key, *secret, *made)
    (tmp_path / "text").write_text("hello")
    unusable: list[tuple[dict[str, str], str]] = [
        ({"ca_file": file("none")}, "none can't be read: No such file"),
        ({"ca_file": file("text")}, "text holds no certificate in PEM"),
        ({"cert_file": file("one.crt"), "key_file": file("none")}, "none can't be read"),
        ({"cert_file": file("one.crt"), "key_file": str(tmp_path)}, "can't be read: Is a directory"),
        ({"cert_file": file("one.crt"), "key_file": file("two.key")}, "one.crt and .*two.key must be .* its own"),
        ({"cert_file": file("one.crt"), "key_file": file("text")}, "one.crt and .*text must be"),
        ({"cert_file": file("text")}, "text must be a certificate"),
        ({"cert_file": file("locked.crt"), "key_file": file("locked.key")}, "unencrypted"),
    ]
    for files, problem in unusable:
        with pytest.raises(CertificateError, match=problem):
            await Transport(BrokerAddress.parse("mqtts://127.0.0.1:1", **files)).__aenter__()


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


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    assert await process.wait() == 0
