"""The broker's dropped messages, against a Mosquitto that really drops some."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter

from protocol.transport import BrokerAddress, Incoming, Transport
from scheduler.mqtt.broker import EmbeddedBroker
from scheduler.mqtt.watch import BrokerWatch
from tests.brokers import receive

NAME = "tokenbus_broker_dropped_messages_total"


class Watch:
    """A BrokerWatch with its registry, fed by hand or by a transport."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.watch = BrokerWatch(Counter(NAME, "Dropped", registry=self.registry))

    @property
    def counted(self) -> float | None:
        return self.registry.get_sample_value(NAME)

    async def follow(self, transport: Transport, *, until: float) -> None:
        async with asyncio.timeout(10):
            while self.counted != until:
                self.watch.take(await receive(transport))


def told(payload: bytes) -> Incoming:
    return Incoming(
        topic=BrokerWatch.TOPIC,
        payload=payload,
        response_topic=None,
        correlation=None,
        expiry_s=None,
        received_at=0.0,
        qos=0,
        duplicate=False,
        retained=True,
        mid=0,
        epoch=1,
    )


def test_counts_differences_and_survives_the_brokers_restarts() -> None:
    watch = Watch()
    counted = []
    for payload in (b"40", b"40", b"43", b"43", b"2", b"5", b"0", b"0", b"1"):
        watch.watch.take(told(payload))
        counted.append(watch.counted)
    assert counted == [0, 0, 3, 3, 5, 8, 8, 8, 9]


@pytest.mark.parametrize("payload", [b"", b"-1", b"many", b"1.5", "²".encode()])
def test_what_is_no_count_is_passed_over(payload: bytes) -> None:
    watch = Watch()
    for number in (b"1", payload, b"2"):
        watch.watch.take(told(number))
    assert watch.counted == 1


async def drop(address: BrokerAddress, messages: int, identifier: str) -> None:
    """Overflow the queue of a new session that is away; it has room for one."""
    async with Transport(address, identifier=identifier, subscriptions=[(identifier, 1)], session_expiry_s=60):
        pass
    async with Transport(address) as sender:
        for _ in range(1 + messages):
            assert await sender.publish(identifier, b"x") == 0


async def test_real_drops_are_counted_across_a_restart_of_the_broker(tmp_path: Path) -> None:
    settings = ["max_inflight_messages 1", "max_queued_messages 1", "sys_interval 1"]
    async with EmbeddedBroker(data_dir=tmp_path, settings=settings) as broker:
        address = BrokerAddress.parse(broker.url)
        watch = Watch()
        async with Transport(address, subscriptions=[BrokerWatch.SUBSCRIPTION]) as transport:
            watch.watch.take(await receive(transport))
            await drop(address, 5, "away")
            await watch.follow(transport, until=5)
            await broker.restart()
            await drop(address, 2, "also away")
            await watch.follow(transport, until=7)


async def test_forbidden_watch_breaks_nothing(tmp_path: Path) -> None:
    acl = tmp_path / "acl"
    acl.write_text("topic readwrite in\n")
    acl.chmod(0o600)
    settings = ["sys_interval 1", f"acl_file {acl}"]
    async with EmbeddedBroker(data_dir=tmp_path / "broker", settings=settings) as broker:
        address = BrokerAddress.parse(broker.url)
        async with Transport(address, subscriptions=[("in", 1), BrokerWatch.SUBSCRIPTION]) as transport:
            await asyncio.sleep(1.5)  # the broker would have told by now
            await transport.publish("in", b"x")
            assert (await receive(transport)).payload == b"x"
