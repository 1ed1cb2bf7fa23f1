"""The AsyncAPI 3.0 description of the whole surface, made from the message types and the topic grammar.

``python -m protocol.asyncapi > protocol/asyncapi.yaml`` writes the file that a test holds against this module.
"""

from typing import Any

import msgspec
import yaml

from protocol import replies, topics
from protocol.errors import ErrorBody
from protocol.kinds import BODIES

_REPLIES: dict[str, type[msgspec.Struct]] = {
    "accepted": replies.Accepted,
    "chunk": replies.Chunk,
    "result": replies.Result,
    "cancelled": replies.Cancelled,
    "expired": replies.Expired,
    "error": replies.Failed,
}
#: What a body of each kind is called, and the channel that it comes on.
_REQUESTS: dict[topics.Kind, tuple[str, str]] = {
    "req": ("request", "requests"),
    "embed": ("embed", "embeds"),
    "score": ("score", "scores"),
}
_NAMES = {"tenant": "The authenticated user", "model": "Alias of the model", "request_id": "Chosen by the tenant"}


def describe() -> dict[str, Any]:
    """The document as plain data."""
    types: list[type[msgspec.Struct]] = [
        *BODIES.values(),
        replies.Status,
        replies.Quarantined,
        ErrorBody,
        *_REPLIES.values(),
    ]
    references, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    by_type = dict(zip(types, references, strict=True))
    messages = {name: _message(by_type[BODIES[kind]]) for kind, (name, _) in _REQUESTS.items()}
    messages["cancel"] = {"payload": {"type": "string", "maxLength": 0}}
    messages |= {name: _message(by_type[kind]) for name, kind in _REPLIES.items()}
    messages |= {
        "status": _message(by_type[replies.Status]),
        "quarantined": _message(by_type[replies.Quarantined]),
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "tokenbus",
            "version": "1",
            "description": "Prompts in, tokens out, over MQTT 5. docs/protocol.md tells the rules that types can't.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            **{
                channel: _channel(topics.request("T", "M", "R", kind), [name])
                for kind, (name, channel) in _REQUESTS.items()
            },
            "cancels": _channel(topics.cancel("T", "R"), ["cancel"]),
            "replies": _channel(topics.out("T", "R"), list(_REPLIES)),
            "dead": _channel(topics.dead("T", "R"), ["quarantined"]),
            "status": _channel(topics.status("S"), ["status"]),
        },
        "operations": {
            **{
                name: {
                    "action": "receive",
                    "channel": _ref("channels", channel),
                    "reply": {"channel": _ref("channels", "replies")},
                    "bindings": {"mqtt": {"qos": 1}},
                }
                for name, channel in _REQUESTS.values()
            },
            "cancel": {
                "action": "receive",
                "channel": _ref("channels", "cancels"),
                "bindings": {"mqtt": {"qos": 1}},
            },
            "quarantine": {
                "action": "send",
                "channel": _ref("channels", "dead"),
                "bindings": {"mqtt": {"qos": 1}},
            },
            "announce": {
                "action": "send",
                "channel": _ref("channels", "status"),
                "bindings": {"mqtt": {"qos": 1, "retain": True}},
            },
        },
        "components": {"messages": messages, "schemas": schemas},
    }


def _message(schema: dict[str, Any]) -> dict[str, Any]:
    return {"contentType": "application/json", "payload": schema}


def _channel(sample: str, messages: list[str]) -> dict[str, Any]:
    """``sample`` is a topic with one letter for each name, so that the grammar stays where it is."""
    letters = {"T": "tenant", "M": "model", "R": "request_id", "S": "replica"}
    levels = [f"{{{letters[level]}}}" if level in letters else level for level in sample.split("/")]
    used = [letters[level] for level in sample.split("/") if level in letters]
    return {
        "address": "/".join(levels),
        "parameters": {name: {"description": f"{_NAMES.get(name, 'A replica')}: {topics.NAME_RULE}"} for name in used},
        "messages": {name: _ref("components/messages", name) for name in messages},
    }


def _ref(where: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/{where}/{name}"}


def to_yaml() -> str:
    return yaml.safe_dump(describe(), sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    print(to_yaml(), end="")
