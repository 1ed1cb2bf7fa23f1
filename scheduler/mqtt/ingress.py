"""In: decode, check, journal, acknowledge in the order of arrival, start. Every refusal is told to the sender."""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from protocol import topics
from protocol.errors import BadRequest, RequestError, ServiceError
from protocol.kinds import AnyRequest, decode
from protocol.plan import WorkerInfo
from protocol.replies import Failed
from protocol.request import Request
from protocol.topics import Kind, TopicError
from protocol.transport import Incoming, Transport
from scheduler.admission import Admission
from scheduler.chat import Chat
from scheduler.generation import check_adapter, seed_for
from scheduler.journal.entry import Entry, Journal, Listener, Taken, digest
from scheduler.kinds import prompt_of
from scheduler.metrics.series import Metrics
from scheduler.mqtt.delivery import Delivery
from scheduler.mqtt.egress import Egress
from scheduler.mqtt.watch import BrokerWatch
from scheduler.outlook import Outlook
from scheduler.turns import Turns

logger = logging.getLogger(__name__)

#: What the service subscribes to, at QoS 1.
SUBSCRIPTIONS = tuple((filter_, 1) for filter_ in (*topics.REQUESTS, topics.CANCELS))

#: Messages that are journalled together, at most.
_MOST_AT_ONCE = 256
_MOST_CORRELATION_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Cancel:
    """A cancellation of a request; ``listener`` hears of one that comes too late, if it asked to."""

    id: str
    listener: Listener | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """A message that can't be taken, and where its sender hears so."""

    listener: Listener
    request_id: str | None
    error: RequestError


@dataclass(frozen=True, slots=True)
class News:
    """Something that the broker tells of itself."""

    incoming: Incoming


#: None: nothing is to be done.
Content = Entry | Cancel | Refusal | News | None


class Reader:
    """Makes of a message what it means. The tenant is the topic's level, which the broker's ACL ties to the user; nothing in
    a message can claim another. Thread-safe."""

    def __init__(self, chat: Chat, info: WorkerInfo, *, model: str, max_payload_bytes: int) -> None:
        self._chat = chat
        self._info = info
        self._model = model
        self._max_payload_bytes = max_payload_bytes

    def read(self, incoming: Incoming) -> Content:
        if incoming.topic == BrokerWatch.TOPIC:
            return News(incoming)
        if incoming.retained:
            logger.info("retained message ignored", extra={"topic": incoming.topic})
            return None
        try:
            is_cancel = incoming.topic.split("/", 4)[3] == "cancel"
            return self._cancel(incoming) if is_cancel else self._request(incoming)
        except RequestError as error:
            return self._refusal(incoming, error)
        except TopicError as error:
            detail = str(error).partition(": ")[2]
            return self._refusal(incoming, BadRequest(error.field, detail, "invalid_topic"))
        except Exception as error:  # noqa: BLE001 - whatever one message does to us, the next is another tenant's
            # Only the type: the text may hold a prompt.
            logger.error("a message on %r raised %s", incoming.topic, type(error).__name__)
            return self._refusal(incoming, ServiceError("internal", "the service failed on this request"))

    def _request(self, incoming: Incoming) -> Entry:
        address = topics.parse_request(incoming.topic)
        listener = _listener(incoming, address.request_id)
        if address.model != self._model:
            raise BadRequest("model", f"{address.model} is not served here, {self._model} is", "model_not_found")
        request = self._decode(address.kind, incoming.payload, address.model)
        prompt, splits = prompt_of(request, self._chat, self._info)
        accepted_at = time.time()
        return Entry(
            id=f"{address.tenant}/{address.request_id}",
            model=address.model,
            request=request,
            prompt=prompt,
            seed=seed_for(request) if isinstance(request, Request) else 0,
            accepted_at=accepted_at,
            listeners=[listener],
            splits=splits,
            expires_at=_expires_at(request, incoming, accepted_at),
        )

    def _decode(self, kind: Kind, payload: bytes, model: str) -> AnyRequest:
        if len(payload) > self._max_payload_bytes:
            raise BadRequest(
                "body", f"{len(payload)} bytes are over the limit of {self._max_payload_bytes}", "payload_too_large"
            )
        request = decode(kind, payload)
        base, _, adapter = (model if request.model is None else request.model).partition(":")
        if base != model:
            raise BadRequest("model", f"must be absent or {model}, the model the topic names, perhaps with an adapter")
        check_adapter(adapter, self._info)
        return request

    def _cancel(self, incoming: Incoming) -> Cancel:
        address = topics.parse_cancel(incoming.topic)
        if incoming.payload:
            raise BadRequest("body", "must be empty")
        asked = incoming.response_topic is not None
        listener = _listener(incoming, address.request_id) if asked else None
        return Cancel(f"{address.tenant}/{address.request_id}", listener)

    def _refusal(self, incoming: Incoming, error: RequestError) -> Refusal:
        """To the sender's Response Topic, or under its id where these are usable, else to its catch-all topic."""
        _, _, tenant, _, *rest = incoming.topic.split("/")  # the filter lets a topic through that ends with its kind
        request_id = rest[-1] if rest and topics.is_name(rest[-1]) else None
        # The answers to a request are no place for what is wrong with its cancellation.
        is_request = topics.kind_of(incoming.topic) is not None
        name = request_id if request_id is not None and is_request else topics.UNADDRESSED
        topic, correlation = topics.out(tenant, name), incoming.correlation
        if incoming.response_topic is not None:
            with contextlib.suppress(TopicError):
                topic = topics.own_response_topic(tenant, incoming.response_topic)
        if correlation is not None and len(correlation) > _MOST_CORRELATION_BYTES:
            correlation = None
        return Refusal(Listener(topic, correlation), request_id, error)


class Ingress:
    """Takes messages in, as many at once as have come; ``draining`` ends the taking up of new requests."""

    def __init__(
        self,
        transport: Transport,
        reader: Reader,
        journal: Journal,
        admission: Admission,
        outlook: Outlook,
        egress: Egress,
        delivery: Delivery,
        watch: BrokerWatch,
        metrics: Metrics,
        turns: Turns,
    ) -> None:
        self._transport = transport
        self._reader = reader
        self._journal = journal
        self._admission = admission
        self._outlook = outlook
        self._egress = egress
        self._delivery = delivery
        self._watch = watch
        self._metrics = metrics
        self.turns = turns
        self.accepting = False
        self.draining = False

    async def run(self) -> None:
        """Acknowledgements go out in the order the messages came, once what they asked for is journalled."""
        self.accepting = not self.draining
        async for batch in self._transport.batches(_MOST_AT_ONCE):
            self._metrics.redeliveries.inc(sum(incoming.duplicate for incoming in batch))
            await self._delivery.room()
            contents = await asyncio.to_thread(self._read_all, batch)
            held = await self._take_in_turn(batch, contents)
            for index, incoming in enumerate(batch):
                if index not in held:
                    self._transport.acknowledge(incoming)

    def drain(self) -> None:
        """Hold new requests back from now on: the broker keeps them for whoever serves next."""
        self.draining = True
        self.accepting = False

    def _read_all(self, batch: list[Incoming]) -> list[Content]:
        return [self._reader.read(incoming) for incoming in batch]

    async def _take_in_turn(self, batch: list[Incoming], contents: list[Content]) -> set[int]:
        """Do what the messages ask for, each when its time has come; returns the numbers of those not to be acknowledged."""
        waiting = self._when(batch, contents)
        held: set[int] = set()
        late: list[tuple[Entry, RequestError]] = []
        while waiting:
            await _sleep_until(min(waiting.values()))
            now = time.monotonic()
            due = {index: contents[index] for index, at in waiting.items() if at <= now}
            waiting = {index: at for index, at in waiting.items() if index not in due}
            for index, entry, error in await self._take(due):
                if error is None:
                    held.add(index)
                else:
                    late.append((entry, error))
        if late:
            await _sleep_until(_after(batch[-1], self.turns.over_after_s))
            await self._refuse(late)
        return held

    def _when(self, batch: list[Incoming], contents: list[Content]) -> dict[int, float]:
        """From when on each message is to be looked at; what isn't a request may be about one that came before it."""
        whens: dict[int, float] = {}
        latest = 0.0
        for index, (incoming, content) in enumerate(zip(batch, contents, strict=True)):
            when = _after(incoming, self.turns.pause_s(content)) if isinstance(content, Entry) else latest
            latest = max(latest, when)
            whens[index] = when
        return whens

    async def _take(self, contents: dict[int, Content]) -> list[tuple[int, Entry, RequestError | None]]:
        """Do what these messages ask for; returns the requests that nobody knows and that may not be taken up here, with the
        reason, or None for those that are to be held because we are draining."""
        entries = {index: content for index, content in contents.items() if isinstance(content, Entry)}
        refused = self._refused(entries)
        admitted = [index for index in entries if index not in refused]
        taken = dict(zip(admitted, await self._journal.accept([entries[index] for index in admitted]), strict=True))
        # Over a limit or not: a known id joins or replays.
        if refused:
            known = await self._journal.find([entries[index].id for index in refused])
            taken.update(zip(refused, known, strict=True))
        for index, content in contents.items():
            if not isinstance(content, Entry):
                await self._act(content)
            elif (earlier := taken[index]) is not None:
                await self._repeated(content, earlier)
                if index in refused:
                    del refused[index]
                else:
                    self._admission.undo(content)
            elif index not in refused:
                self._egress.begin(content)
        return [(index, entries[index], error) for index, error in refused.items()]

    async def _refuse(self, late: list[tuple[Entry, RequestError]]) -> None:
        """Every replica has had its turn: what none of them took up is refused by one."""
        known = await self._journal.find([entry.id for entry, _ in late])
        for (entry, error), taken in zip(late, known, strict=True):
            if taken is None and self.turns.speaks:
                self._egress.refuse(entry.listeners[0], entry.request_id, error.body)

    async def _act(self, content: Cancel | Refusal | News | None) -> None:
        match content:
            case Refusal():
                if self.turns.speaks:
                    self._egress.refuse(content.listener, content.request_id, content.error.body)
            case Cancel():
                await self._cancel(content)
            case News():
                self._watch.take(content.incoming)
            case None:
                pass

    def _refused(self, entries: dict[int, Entry]) -> dict[int, RequestError | None]:
        """Those that may not be taken up now: with the reason, or to be held because we are draining."""
        refused: dict[int, RequestError | None] = {}
        admitted: list[Entry] = []
        for index, entry in entries.items():
            try:
                if self.draining:
                    refused[index] = None
                else:
                    self._outlook.check(entry, time.time(), admitted)
                    self._admission.enter(entry, journal_full=self._journal.full)
                    admitted.append(entry)
            except RequestError as error:
                refused[index] = error
        return refused

    async def _repeated(self, entry: Entry, taken: Taken) -> None:
        """An id that is known already: join or replay, if the request is the same one."""
        listener = entry.listeners[0]
        if not taken.ours:
            return  # whose it is has heard this too
        if taken.digest != digest(entry.model, entry.request):
            error = BadRequest("request_id", "was given to another request", "id_conflict")
            self._egress.refuse(listener, entry.request_id, error.body)
            return
        self._metrics.duplicates.inc()
        if entry.id in self._egress:
            await self._egress.join(entry.id, listener)
        elif (reply := taken.reply or await self._reply_of(entry)) is not None:
            self._delivery.send(listener, reply)

    async def _reply_of(self, entry: Entry) -> bytes | Failed | None:
        """The terminal message of a request that ended while we looked; None while it is only about to be taken over."""
        (taken,) = await self._journal.find([entry.id])
        if taken is not None:
            return taken.reply
        return Failed(entry.request_id, ServiceError("unavailable", "the result is gone; send the request again").body)

    async def _cancel(self, cancel: Cancel) -> None:
        if self._egress.cancel(cancel.id) or cancel.listener is None:
            return
        (taken,) = await self._journal.find([cancel.id])
        if not (self.turns.speaks if taken is None else taken.ours):
            return
        # A cancel that comes too late is no error, so only who asked for an answer gets one.
        request_id = cancel.id.partition("/")[2]
        error = BadRequest("request_id", f"{request_id} is not running", "not_found")
        self._egress.refuse(cancel.listener, request_id, error.body)


def _after(incoming: Incoming, pause_s: float) -> float:
    """When a message came so long ago, on the monotonic clock; never later than if it had come now."""
    age_s = time.time() - incoming.received_at
    return time.monotonic() + pause_s - max(age_s, 0.0)


async def _sleep_until(at: float) -> None:
    if (left_s := at - time.monotonic()) > 0:
        await asyncio.sleep(left_s)


def _expires_at(request: AnyRequest, incoming: Incoming, accepted_at: float) -> float | None:
    """The earlier of what the request and its message say, in Unix seconds. Raises BadRequest."""
    deadlines = []
    if request.deadline_ms is not None:
        deadlines.append(accepted_at + request.deadline_ms / 1000)
    if incoming.expiry_s is not None:
        deadlines.append(incoming.received_at + incoming.expiry_s)
    if request.refuse_late and not deadlines:
        raise BadRequest("refuse_late", "needs deadline_ms or a Message Expiry Interval")
    return min(deadlines, default=None)


def _listener(incoming: Incoming, name: str) -> Listener:
    """Who hears the answer. Raises TopicError for a Response Topic outside the sender's own tree, BadRequest for
    Correlation Data that is too long to keep."""
    tenant = topics.tenant_of(incoming.topic)
    if incoming.correlation is not None and len(incoming.correlation) > _MOST_CORRELATION_BYTES:
        raise BadRequest("correlation_data", f"must be at most {_MOST_CORRELATION_BYTES} bytes")
    if incoming.response_topic is None:
        topic = topics.out(tenant, name)
    else:
        topic = topics.own_response_topic(tenant, incoming.response_topic)
    return Listener(topic, incoming.correlation, incoming.traceparent)
