from pathlib import Path

import jsonschema
import msgspec
import yaml

import protocol
from protocol import asyncapi, openai, replies
from protocol.errors import DeadlineUnreachable
from protocol.openai import Usage
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.request import Message, Request

FILE = Path(protocol.__file__).with_name("asyncapi.yaml")


def references(node):
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def resolve(document, reference: str):
    node = document
    for part in reference.removeprefix("#/").split("/"):
        node = node[part.replace("~1", "/")]
    return node


def test_the_file_is_what_the_code_says():
    assert FILE.read_text() == asyncapi.to_yaml()


def test_every_reference_resolves():
    document = yaml.safe_load(FILE.read_text())
    found = list(references(document))
    assert len(found) > 20
    for reference in found:
        assert resolve(document, reference)


def test_real_messages_fit_their_schemas():
    document = yaml.safe_load(FILE.read_text())
    answers = [openai.Answer("hi", "stop"), openai.Answer("ho", "length")]
    data = openai.answer(chat=True, request_id="r", created=1, model="m", answers=answers, usage=Usage(1, 4, 5))
    samples = {
        "request": Request(messages=[Message("user", "hi")], max_tokens=5),
        "embed": EmbeddingRequest(input=[[5], [6, 7]], pooling="mean"),
        "score": ScoreRequest(text="b", context="a"),
        "accepted": replies.Accepted("r"),
        "result": replies.Result("r", data, replies.Timings(0.1, 0.2, 0.3), 2),
        "cancelled": replies.Cancelled("r", 1),
        "expired": replies.Expired("r", 1),
        "error": replies.Failed("r", DeadlineUnreachable(100, 200).body),
        "status": replies.Status("online", "m", 128, 8),
    }
    for name, sample in samples.items():
        message = resolve(document, f"#/components/messages/{name}")
        schema = {**message["payload"], "components": document["components"]}
        jsonschema.validate(msgspec.to_builtins(sample), schema)
        nonsense = {"request_id": 5, "max_tokens": 0, "status": "maybe"}
        with_nonsense = msgspec.to_builtins(sample) | nonsense
        assert not jsonschema.Draft202012Validator(schema).is_valid(with_nonsense)
