"""The topic grammar: built and parsed here and nowhere else.

    tokenbus/v1/{tenant}/req/{model}/{request_id}   tenant  -> service   a request for an answer
    tokenbus/v1/{tenant}/embed/{model}/{request_id} tenant  -> service   one for embeddings
    tokenbus/v1/{tenant}/score/{model}/{request_id} tenant  -> service   one for the score of a text
    tokenbus/v1/{tenant}/cancel/{request_id}        tenant  -> service   a cancellation
    tokenbus/v1/{tenant}/out/{request_id}           service -> tenant    accepted, chunks, result or error
    tokenbus/v1/{tenant}/dead/{request_id}          service -> tenant    a request that was quarantined
    tokenbus/v1/_svc/{replica}/status               service, retained    online / draining / offline

The tenant is always the third level, which the broker's ACL ties to the authenticated user. Names (tenant, model, request
id) match ``[A-Za-z0-9_.-]{1,64}`` and, because the service answers under names of its own, don't begin with ``_``.
"""

import re
from typing import Literal, get_args

import msgspec

#: What is asked for. It is a level of the topic, so the broker's ACL can tell who may.
Kind = Literal["req", "embed", "score"]
KINDS: tuple[Kind, ...] = get_args(Kind)

ROOT = "tokenbus/v1"
REQUESTS = tuple(f"{ROOT}/+/{kind}/#" for kind in KINDS)
CANCELS = f"{ROOT}/+/cancel/#"
STATUS = f"{ROOT}/_svc/+/status"

#: Where a request is answered when its own topic names no usable request id.
UNADDRESSED = "_invalid"

#: MQTT 5.0, 4.7.3: topics are at most 65,535 bytes; ours are far shorter, and so must a Response Topic be.
MAX_TOPIC_BYTES = 512
#: Mosquitto ends the connection of who publishes to more than 200 levels: a tenant could have it end the service's.
MAX_TOPIC_LEVELS = 32

_NAME = re.compile(r"[A-Za-z0-9.-][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "1 to 64 characters of A-Z a-z 0-9 . - _ and no leading _"


class TopicError(ValueError):
    """A topic that doesn't follow the grammar; ``field`` is the level at fault."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field


class RequestTopic(msgspec.Struct, frozen=True):
    tenant: str
    model: str
    request_id: str
    kind: Kind = "req"


class CancelTopic(msgspec.Struct, frozen=True):
    tenant: str
    request_id: str


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def _check_name(field: str, text: str) -> str:
    if not is_name(text):
        raise TopicError(field, f"must be {NAME_RULE}")
    return text


def request(tenant: str, model: str, request_id: str, kind: Kind = "req") -> str:
    """Topic a tenant publishes a request on. Raises TopicError for a name outside the grammar."""
    _check_name("tenant", tenant)
    _check_name("model", model)
    _check_name("request_id", request_id)
    return f"{ROOT}/{tenant}/{kind}/{model}/{request_id}"


def cancel(tenant: str, request_id: str) -> str:
    """Topic a tenant publishes a cancellation on. Raises TopicError for a name outside the grammar."""
    return f"{ROOT}/{_check_name('tenant', tenant)}/cancel/{_check_name('request_id', request_id)}"


def out(tenant: str, name: str) -> str:
    """Default topic the service answers on; ``name`` is a request id or ``UNADDRESSED``."""
    return f"{ROOT}/{tenant}/out/{name}"


def dead(tenant: str, request_id: str) -> str:
    return f"{ROOT}/{tenant}/dead/{request_id}"


def answers(tenant: str, client: str) -> str:
    """Filter for the answers to one client of a tenant. Raises TopicError for a tenant outside the grammar."""
    return f"{ROOT}/{_check_name('tenant', tenant)}/out/{client}/+"


def status(replica: str) -> str:
    return f"{ROOT}/_svc/{replica}/status"


def tenant_of(topic: str) -> str:
    """The tenant level of any topic under the root: the one part that is trusted, since the broker's ACL checked it."""
    return topic.split("/", 3)[2]


def kind_of(topic: str) -> Kind | None:
    """What a topic under the root asks for; None: nothing, it is another's."""
    level = topic.split("/", 4)[3]
    return next((kind for kind in KINDS if kind == level), None)


def parse_request(topic: str) -> RequestTopic:
    """Parse a request topic. Raises TopicError naming the level at fault."""
    kind = kind_of(topic)
    levels = topic.split("/")
    if kind is None or len(levels) != 6:
        raise TopicError("topic", f"must be {ROOT}/<tenant>/{kind or '<kind>'}/<model>/<request_id>")
    _, _, tenant, _, model, request_id = levels
    return RequestTopic(
        _check_name("tenant", tenant), _check_name("model", model), _check_name("request_id", request_id), kind
    )


def parse_cancel(topic: str) -> CancelTopic:
    """Parse a cancel topic. Raises TopicError naming the level at fault."""
    levels = topic.split("/")
    if len(levels) != 5:
        raise TopicError("topic", f"must be {ROOT}/<tenant>/cancel/<request_id>")
    _, _, tenant, _, request_id = levels
    return CancelTopic(_check_name("tenant", tenant), _check_name("request_id", request_id))


def own_response_topic(tenant: str, response_topic: str) -> str:
    """Accept a Response Topic only inside the requester's own ``out`` tree (else a tenant could write to another's).

    Raises TopicError.
    """
    prefix = f"{ROOT}/{tenant}/out/"
    if not response_topic.startswith(prefix) or response_topic == prefix:
        raise TopicError("response_topic", f"must lie under {prefix}")
    if "+" in response_topic or "#" in response_topic:
        raise TopicError("response_topic", "must not contain wildcards")
    # Brokers differ in what they let through, and may end our connection over what another of them let in.
    if not response_topic.isprintable():
        raise TopicError("response_topic", "must not contain characters that can't be printed")
    if response_topic.count("/") >= MAX_TOPIC_LEVELS:
        raise TopicError("response_topic", f"must have at most {MAX_TOPIC_LEVELS} levels")
    if len(response_topic.encode()) > MAX_TOPIC_BYTES:
        raise TopicError("response_topic", f"must be at most {MAX_TOPIC_BYTES} bytes")
    return response_topic
