"""What we need of the MQTT client library: the one file that knows aiomqtt and, beneath it, paho."""

# ruff: noqa: SLF001 (paho has no public way to close a socket at once, or to publish without taking an identifier)

import asyncio
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiomqtt
import msgspec
import paho.mqtt.properties
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt.client import MQTT_ERR_QUEUE_SIZE, MQTT_ERR_SUCCESS, Client, MQTTMessage, MQTTMessageInfo
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from protocol.address import BrokerAddress, tls_context
from protocol.trace import TRACEPARENT, find_traceparent
from protocol.transport_errors import BrokerUnreachable, ConnectionRefused, PayloadTooLarge, TransportError

logger = logging.getLogger(__name__)

#: MQTT 5.0, 2.4: reason codes from here on are failures.
FAILURE = 128
#: MQTT 5.0, 3.4.2.1: the broker took the message, and nobody is subscribed to its topic.
NO_SUBSCRIBER = 16

#: Topics on which brokers tell of themselves: good to have, and nothing depends on them.
_BROKERS_OWN = "$SYS/"

#: CONNACK codes that time may heal: server unavailable, server busy, quota exceeded, connection rate exceeded.
_PASSING = frozenset({136, 137, 151, 159})

#: TLS 1.3 ends a handshake here before the other end has looked at our certificate.
_CLOSED_EARLY = "the broker closed the connection before a CONNACK; does it want TLS, or another certificate?"

_KEEPALIVE_S = 20
#: For each of: the TCP and TLS handshakes, the CONNACK, a SUBACK.
_ANSWER_S = 5.0
_GOODBYE_S = 2.0

#: QoS 0 messages are dropped while this many packets wait for a slow connection.
_MOST_UNSENT_PACKETS = 10_000
#: Fixed header, topic length and packet identifier: what a packet holds besides topic, properties and payload.
_PACKET_OVERHEAD_BYTES = 9

#: MQTT 5.0, 1.5.4 and 1.5.6: the longest text and binary data.
_LONGEST_FIELD_BYTES = 65_535
#: Mosquitto ends the connection of who publishes to more levels than this.
_MOST_LEVELS = 200
#: MQTT 5.0, 1.5.4: brokers end the connection over surrogates and NUL, and may over control characters and non-characters.
_UNSENDABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef"
    + "".join(f"{chr(plane + 0xFFFE)}{chr(plane + 0xFFFF)}" for plane in range(0, 0x110000, 0x10000))
    + "]"
)


class Will(msgspec.Struct, frozen=True):
    """What the broker publishes at QoS 1 when we vanish without a goodbye."""

    topic: str
    payload: bytes
    retain: bool = False


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """A message to publish; ``expiry_s`` is how long the broker may keep it for a receiver that is away."""

    topic: str
    payload: bytes
    retain: bool = False
    response_topic: str | None = None
    correlation: bytes | None = None
    expiry_s: int | None = None
    traceparent: str | None = None


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """A received message. ``expiry_s`` is what was left of its lifetime when it came, at ``received_at`` (Unix seconds).

    ``epoch`` names the connection it came on. ``retained``: the broker's copy of an earlier one, which comes with every
    subscription.
    """

    topic: str
    payload: bytes
    response_topic: str | None
    correlation: bytes | None
    expiry_s: int | None
    received_at: float
    qos: int
    duplicate: bool
    retained: bool
    mid: int
    epoch: int
    traceparent: str | None = None


class Reason(msgspec.Struct, frozen=True):
    """The broker's answer to a publish: MQTT 5.0, 3.4.2.1."""

    code: int
    name: str


class Link(aiomqtt.Client):
    """aiomqtt's glue between paho and the event loop, opened again and again.

    One object for all connections: a QoS 1 publish that is under way when one breaks is sent again on the next.
    ``epoch`` counts the attempts to connect; ``receive_maximum`` and ``packet_limit`` are what the broker announced.
    Raises CertificateError.
    """

    def __init__(
        self,
        address: BrokerAddress,
        identifier: str,
        will: Will | None,
        session_expiry_s: int,
        receive_maximum: int,
        *,
        received: Callable[[Incoming], None],
        published: Callable[[int, Reason], None],
    ) -> None:
        super().__init__(
            address.host,
            address.port,
            identifier=identifier,
            username=address.username,
            password=address.password,
            protocol=aiomqtt.ProtocolVersion.V5,
            will=aiomqtt.Will(will.topic, will.payload, 1, will.retain) if will is not None else None,
            timeout=_ANSWER_S,
            keepalive=_KEEPALIVE_S,
            clean_start=session_expiry_s == 0,
            properties=_properties(
                PacketTypes.CONNECT, SessionExpiryInterval=session_expiry_s, ReceiveMaximum=receive_maximum
            ),
            tls_context=tls_context(address) if address.tls else None,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self.epoch = 0
        self.receive_maximum = 65_535
        self.packet_limit: int | None = None
        self._received = received
        self._published = published
        self._thread = threading.get_ident()
        self._client.connect_timeout = _ANSWER_S
        self._client.manual_ack_set(True)
        # The window is kept by the transport: on a reconnect paho sends everything pending, whatever its own window.
        self._client.max_inflight_messages_set(0)

    async def open(self, filters: Sequence[tuple[str, int]]) -> None:
        """One attempt to connect and subscribe. Raises BrokerUnreachable or ConnectionRefused."""
        self.epoch += 1
        # aiomqtt leaves all three as they were after a connection that was lost, and then wouldn't wait for a CONNACK.
        self._connected = self._loop.create_future()
        self._disconnected = lost = self._loop.create_future()
        if self._lock.locked():
            self._lock.release()
        attempt = asyncio.create_task(self.__aenter__(), name="mqtt attempt")
        try:
            await asyncio.shield(attempt)
            _check_not_lost(lost)
            await self._subscribe(filters)
        except BaseException as error:
            # paho connects in a thread, which can't be interrupted; the socket is safe to close only after it.
            await asyncio.wait({attempt})
            self._client._sock_close()
            if isinstance(error, aiomqtt.MqttError):
                raise _translate(error) from None
            raise

    async def _subscribe(self, filters: Sequence[tuple[str, int]]) -> None:
        if not filters:
            return
        answers = await self.subscribe([(name, SubscribeOptions(qos=qos)) for name, qos in filters])
        for (name, _), answer in zip(filters, answers, strict=True):
            if not isinstance(answer, ReasonCode) or answer.value < FAILURE:
                continue
            if name.startswith(_BROKERS_OWN):
                logger.info("the broker tells us nothing of itself: no subscription to %s (%s)", name, answer)
            else:
                raise ConnectionRefused(f"the broker refused the subscription to {name}: {answer}")

    async def lost(self) -> str:
        """Wait for the connection to break; returns why."""
        await asyncio.wait({self._disconnected})
        self._client._sock_close()
        return _why(self._disconnected)

    async def close(self, *, forget_session: bool) -> None:
        """Say goodbye, so that no will is published, and give back the socket."""
        if self._client.socket() is not None:
            expiry = _properties(PacketTypes.DISCONNECT, SessionExpiryInterval=0 if forget_session else None)
            self._client.disconnect(properties=expiry)
            await asyncio.wait({self._disconnected}, timeout=_GOODBYE_S)
            if self._disconnected.done():
                self._disconnected.exception()  # a loss at the same moment makes no difference now
            self._client._sock_close()
        if self._misc_task is not None:
            self._misc_task.cancel()
            await asyncio.wait({self._misc_task})

    def send(self, message: Outgoing) -> int:
        """Hand a QoS 1 publish to paho, which keeps it until its PUBACK; returns the packet identifier."""
        properties = _publish_properties(message)
        while True:
            info = self._client.publish(message.topic, message.payload, 1, message.retain, properties)
            if info.rc != MQTT_ERR_QUEUE_SIZE:  # which here means: this identifier is still in use, 65,535 publishes on
                return info.mid

    def send_nowait(self, message: Outgoing) -> bool:
        """Queue a QoS 0 publish for the socket; False when it was dropped.

        Under identifier 0: paho's own ``publish`` would take an identifier as for QoS 1 and report that the message has
        left just as it reports a PUBACK, so after 65,535 of them for a QoS 1 message still waiting under the same one.
        """
        if len(self._client._out_packet) >= _MOST_UNSENT_PACKETS:
            return False
        sent = self._client._send_publish(
            0, message.topic.encode(), message.payload, info=MQTTMessageInfo(0), properties=_publish_properties(message)
        )
        return sent == MQTT_ERR_SUCCESS

    def acknowledge(self, incoming: Incoming) -> bool:
        """Send the PUBACK, unless the message came on an earlier connection: there its identifier meant another one."""
        if incoming.epoch != self.epoch:
            return False
        self._client.ack(incoming.mid, incoming.qos)
        return True

    def check(self, message: Outgoing) -> None:
        """Whether it can be sent: one that can't would end this connection and, sent again, each that follows.

        Raises ValueError or PayloadTooLarge.
        """
        _check_topic(message.topic)
        _check_text("the Response Topic", message.response_topic or "")
        if len(message.correlation or b"") > _LONGEST_FIELD_BYTES:
            raise ValueError(f"Correlation Data must have at most {_LONGEST_FIELD_BYTES} bytes")
        if self.packet_limit is None:
            return
        size = _PACKET_OVERHEAD_BYTES + len(message.topic.encode()) + len(message.payload)
        properties = _publish_properties(message)
        size += 1 if properties is None else len(properties.pack())  # type: ignore[no-untyped-call]
        if size > self.packet_limit:
            raise PayloadTooLarge(size, self.packet_limit)

    def _on_connect(
        self, client: Client, userdata: Any, flags: Any, reason_code: ReasonCode, properties: Properties | None = None
    ) -> None:
        self.receive_maximum = getattr(properties, "ReceiveMaximum", 65_535)
        self.packet_limit = getattr(properties, "MaximumPacketSize", None)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self, client: Client, userdata: Any, flags: Any, reason_code: ReasonCode, properties: Properties | None = None
    ) -> None:
        if not self._connected.done():  # aiomqtt would go on waiting for the CONNACK
            self._connected.set_exception(aiomqtt.MqttError(_CLOSED_EARLY))
        super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_socket_register_write(self, client: Client, _userdata: Any, sock: Any) -> None:
        """At once, not in the loop's next turn as aiomqtt does: by then the socket may be closed, or all be written.

        The latter would leave a writer that nobody removes and keep the loop spinning. For the CONNECT alone, which
        paho queues in aiomqtt's thread, there is no other way.
        """
        if threading.get_ident() == self._thread:
            self._loop.add_writer(sock, client.loop_write)
        else:
            super()._on_socket_register_write(client, _userdata, sock)

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        self._received(
            Incoming(
                topic=message.topic,
                payload=bytes(message.payload),
                response_topic=getattr(message.properties, "ResponseTopic", None),
                correlation=getattr(message.properties, "CorrelationData", None),
                expiry_s=getattr(message.properties, "MessageExpiryInterval", None),
                received_at=time.time(),
                qos=message.qos,
                duplicate=bool(message.dup),
                retained=bool(message.retain),
                mid=message.mid,
                epoch=self.epoch,
                traceparent=find_traceparent(getattr(message.properties, "UserProperty", ())),
            )
        )

    def _on_publish(
        self, _client: Client, _userdata: Any, mid: int, reason_code: ReasonCode, _properties: Properties
    ) -> None:
        self._published(mid, Reason(reason_code.value, reason_code.getName()))


def _check_not_lost(lost: asyncio.Future[None]) -> None:
    """Catch a loss right behind the CONNACK: aiomqtt then puts a fresh future in this one's place and never tells."""
    if lost.done():
        raise aiomqtt.MqttError(_why(lost))


def _why(lost: asyncio.Future[None]) -> str:
    error = lost.exception()
    return "closed by the broker" if error is None else str(error)


def _translate(error: aiomqtt.MqttError) -> TransportError:
    """A CONNACK that refuses for good, or a trouble that may pass."""
    if isinstance(error, MqttConnectError):
        code = error.rc.value if isinstance(error.rc, ReasonCode) else error.rc
        if code not in _PASSING:
            return ConnectionRefused(f"the broker refused the connection: {error}")
    return BrokerUnreachable(str(error))


def _check_topic(topic: str) -> None:
    """Raises ValueError."""
    if not topic:
        raise ValueError("the topic must not be empty")
    if "+" in topic or "#" in topic:
        raise ValueError("the topic must not contain wildcards")
    if topic.count("/") >= _MOST_LEVELS:
        raise ValueError(f"the topic must have at most {_MOST_LEVELS} levels")
    _check_text("the topic", topic)


def _check_text(name: str, text: str) -> None:
    """Raises ValueError."""
    if _UNSENDABLE.search(text):
        raise ValueError(f"{name} must not contain control characters, surrogates or non-characters")
    if len(text.encode()) > _LONGEST_FIELD_BYTES:
        raise ValueError(f"{name} must have at most {_LONGEST_FIELD_BYTES} bytes")


def _publish_properties(message: Outgoing) -> Properties | None:
    return _properties(
        PacketTypes.PUBLISH,
        ResponseTopic=message.response_topic,
        CorrelationData=message.correlation,
        MessageExpiryInterval=message.expiry_s,
        UserProperty=None if message.traceparent is None else (TRACEPARENT, message.traceparent),
    )


def _properties(packet: int, **values: str | bytes | int | tuple[str, str] | None) -> Properties | None:
    """MQTT 5 properties by their names there, those that aren't None; None when nothing is left."""
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return None
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in given.items():
        setattr(properties, name, value)
    return properties


def _read_text(buffer: bytes, length_left: int) -> tuple[str, int]:
    """The text at the beginning of ``buffer`` and the bytes it takes. Raises ValueError, which paho turns into its own.

    In the place of paho's own, which takes U+FEFF for malformed. It isn't (MQTT 5.0, 1.5.4.1), so brokers pass it on, and
    one message with it in any property would end every connection it is delivered on.
    """
    size = int.from_bytes(buffer[:2])
    if not 2 <= 2 + size <= length_left:
        raise ValueError("a text is longer than the properties it is in")
    return buffer[2 : 2 + size].decode(), 2 + size


paho.mqtt.properties.readUTF = _read_text
