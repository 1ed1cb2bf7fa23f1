"""In: every message on the request and cancel topics is decoded, checked, and admitted or refused, then acknowledged."""

import asyncio
import logging

from protocol import topics
from protocol.errors import BadRequest, RequestError, ServiceError
from protocol.request import Request, decode_request
from protocol.topics import TopicError
from protocol.transport import Incoming, Transport
from scheduler.generation import Generation, sequence_for
from scheduler.loop import Engine
from scheduler.mqtt.egress import Egress
from scheduler.text import Text

logger = logging.getLogger(__name__)

#: What the service subscribes to, at QoS 1.
SUBSCRIPTIONS = ((topics.REQUESTS, 1), (topics.CANCELS, 1))


class Ingress:
    """The tenant is the topic's level, which the broker's ACL ties to the user; nothing in a message can claim another."""

    def __init__(
        self, transport: Transport, text: Text, engine: Engine, egress: Egress, *, model: str, max_payload_bytes: int
    ) -> None:
        self._transport = transport
        self._text = text
        self._engine = engine
        self._egress = egress
        self._model = model
        self._max_payload_bytes = max_payload_bytes

    async def run(self) -> None:
        """One message after the other: acknowledgements must go out in the order the messages came."""
        async for incoming in self._transport.messages():
            await self._take(incoming)
            self._transport.acknowledge(incoming)

    async def _take(self, incoming: Incoming) -> None:
        kind = incoming.topic.split("/", 4)[3]
        try:
            if kind == "cancel":
                self._cancel(incoming)
            else:
                await self._request(incoming)
        except RequestError as error:
            self._refuse(incoming, error)
        except Exception as error:  # noqa: BLE001 - whatever one message does to us, the next is another tenant's
            # Only the type: the text may hold a prompt.
            logger.error("a message on %r raised %s", incoming.topic, type(error).__name__)
            self._refuse(incoming, ServiceError("internal", "the service failed on this request"))

    async def _request(self, incoming: Incoming) -> None:
        try:
            address = topics.parse_request(incoming.topic)
            reply_topic = self._reply_topic(incoming, address.request_id)
        except TopicError as error:
            raise BadRequest(error.field, str(error).partition(": ")[2], "invalid_topic") from None
        if address.model != self._model:
            raise BadRequest("model", f"{address.model} is not served here, {self._model} is", "model_not_found")
        request = self._decode(incoming.payload, address.model)
        id = f"{address.tenant}/{address.request_id}"
        if id in self._egress:
            self._egress.confirm(id)
            return
        prompt = await asyncio.to_thread(self._text.prompt_tokens, request)
        sequence = sequence_for(id, request, prompt, self._engine.info)
        generation = Generation.of(
            sequence,
            request,
            self._text,
            at=self._engine.now(),
            model=address.model,
            topic=reply_topic,
            correlation=incoming.correlation,
        )
        self._engine.submit(sequence)
        self._egress.accept(id, generation)

    def _decode(self, payload: bytes, model: str) -> Request:
        if len(payload) > self._max_payload_bytes:
            raise BadRequest(
                "body", f"{len(payload)} bytes are over the limit of {self._max_payload_bytes}", "payload_too_large"
            )
        request = decode_request(payload)
        if request.model not in (None, model):
            raise BadRequest("model", f"must be absent or {model}, the model the topic names")
        return request

    def _cancel(self, incoming: Incoming) -> None:
        try:
            address = topics.parse_cancel(incoming.topic)
        except TopicError as error:
            raise BadRequest(error.field, str(error).partition(": ")[2], "invalid_topic") from None
        if self._egress.cancel(f"{address.tenant}/{address.request_id}") or incoming.response_topic is None:
            return
        # A cancel that comes too late is no error, so only who asked for an answer gets one.
        raise BadRequest("request_id", f"{address.request_id} is not running", "not_found")

    def _reply_topic(self, incoming: Incoming, request_id: str) -> str:
        """Raises TopicError for a Response Topic outside the sender's own tree."""
        tenant = topics.tenant_of(incoming.topic)
        if incoming.response_topic is None:
            return topics.out(tenant, request_id)
        return topics.own_response_topic(tenant, incoming.response_topic)

    def _refuse(self, incoming: Incoming, error: RequestError) -> None:
        """Tell the sender, on its Response Topic or under its id where these are usable, else on its catch-all topic."""
        last = incoming.topic.rpartition("/")[2]
        request_id = last if topics.is_name(last) else None
        try:
            topic = self._reply_topic(incoming, request_id or topics.UNADDRESSED)
        except TopicError:
            topic = topics.out(topics.tenant_of(incoming.topic), request_id or topics.UNADDRESSED)
        self._egress.refuse(topic, request_id, error.body, incoming.correlation)
