"""The transport against a real Mosquitto: properties, sessions, acknowledgement, breaks and the end."""

import asyncio
import signal
import socket
import time
from collections.abc import Callable
from itertools import islice

import pytest

from protocol.transport import _MOST_UNREAD as MOST_UNREAD
from protocol.transport import BrokerAddress, Incoming, Transport, TransportError, Will, delays
from scheduler.mqtt.broker import EmbeddedBroker
from tests.brokers import receive, send_signal


async def until_disconnected(transport: Transport) -> None:
    await until(lambda: not transport.connected)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
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
        copy = await receive(second)
        assert (copy.payload, copy.retained) == (b"online", True)
        await second.publish("state", b"offline", retain=True)
        live = await receive(second)
        assert (live.payload, live.retained) == (b"offline", False)


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


async def test_nothing_spins_after_pending_publishes_were_sent_again(
    broker: EmbeddedBroker, address: BrokerAddress
) -> None:
    async with Transport(address) as transport, asyncio.timeout(20):
        send_signal(broker, signal.SIGSTOP)
        pending = asyncio.create_task(transport.publish("nowhere", b"x"))
        await asyncio.sleep(0.05)
        await broker.restart(signal.SIGKILL)
        assert await pending == 16
        used = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - used < 0.15


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


async def test_no_more_unacknowledged_come_than_our_receive_maximum(address: BrokerAddress) -> None:
    async with Transport(address, subscriptions=[("in", 1)], receive_maximum=2) as transport:
        for number in range(4):
            await transport.publish("in", b"%d" % number)
        assert transport.publish_nowait("in", b"overtakes")
        first, second, overtaking = [await receive(transport) for _ in range(3)]
        assert (first.payload, second.payload, overtaking.payload) == (b"0", b"1", b"overtakes")
        assert transport.unacknowledged_incoming == 2
        transport.acknowledge(first)
        transport.acknowledge(second)
        for expected in (b"2", b"3"):
            incoming = await receive(transport)
            transport.acknowledge(incoming)
            assert incoming.payload == expected
        assert transport.unacknowledged_incoming == 0


async def test_unread_qos_0_is_dropped_over_a_bound_and_counted_but_never_qos_1(address: BrokerAddress) -> None:
    async with Transport(address, subscriptions=[("in", 1)]) as transport:
        for number in range(MOST_UNREAD + 5):
            assert transport.publish_nowait("in", b"%d" % number)
        await transport.publish("in", b"kept")
        await until(lambda: transport.unacknowledged_incoming == 1)
        assert transport.dropped == 5
        received = [await receive(transport) for _ in range(MOST_UNREAD + 1)]
        assert [incoming.payload for incoming in received] == [b"%d" % n for n in range(MOST_UNREAD)] + [b"kept"]
        transport.acknowledge(received[-1])
        assert transport.publish_nowait("in", b"room again")
        assert (await receive(transport)).payload == b"room again"
        assert transport.dropped == 5


async def test_unread_qos_0_is_dropped_over_64_mib(address: BrokerAddress) -> None:
    size = 10 * 1024 * 1024
    async with Transport(address, subscriptions=[("in", 1)]) as transport:
        for _ in range(2):
            for _ in range(8):
                assert transport.publish_nowait("in", bytes(size))
                await transport.publish("nowhere", b"")
            await transport.publish("in", b"end")
            await until(lambda: transport.unacknowledged_incoming == 1)
            received = [len((await receive(transport)).payload) for _ in range(6)]
            end = await receive(transport)
            transport.acknowledge(end)
            assert [*received, end.payload] == [size] * 6 + [b"end"]
        assert transport.dropped == 4


async def test_unacknowledged_counts_what_waits_both_ways(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    async with Transport(address, identifier="service", subscriptions=[("in", 1)], session_expiry_s=60) as transport:
        assert (transport.unacknowledged, transport.unacknowledged_incoming) == (0, 0)
        send_signal(broker, signal.SIGSTOP)
        more_than_a_window = [asyncio.create_task(transport.publish("nowhere", b"x")) for _ in range(1100)]
        await asyncio.sleep(0)
        assert transport.unacknowledged == 1100
        send_signal(broker, signal.SIGCONT)
        await asyncio.gather(*more_than_a_window)
        assert transport.unacknowledged == 0

        await transport.publish("in", b"held")
        stale = await receive(transport)
        assert transport.unacknowledged_incoming == 1
        await reconnect(broker, transport)
        again = await receive(transport)
        transport.acknowledge(stale)
        assert transport.unacknowledged_incoming == 1
        transport.acknowledge(again)
        assert transport.unacknowledged_incoming == 0


async def test_broker_that_comes_back_is_found_soon(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    """However long it was away: no pause is over 2 s."""
    assert max(islice(delays(), 20)) <= 2.0
    async with Transport(address) as transport:
        await broker.stop()
        await asyncio.sleep(3)  # long enough for the pauses to have grown to their longest
        await broker.start()
        async with asyncio.timeout(3):
            await transport.wait_connected()


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


async def collect(transport: Transport) -> list[Incoming]:
    return [incoming async for incoming in transport.messages()]
