"""Chats, tools and structured output over a real broker to a real model."""

import asyncio
import json
import re

import jsonschema
import pytest

from protocol.chat import Function, Message, Tool
from protocol.client import Client
from protocol.errors import RequestError
from protocol.request import Request
from protocol.structure import JsonObjectFormat, JsonSchemaFormat, NamedSchema, StructuredOutputs

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

ASKED = [Message("user", "Describe Paris: its country, and how many people live there.")]
SCHEMA = {
    "type": "object",
    "properties": {
        "country": {"enum": ["France", "Italy"]},
        "millions": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["country", "millions"],
    "additionalProperties": False,
}


async def test_an_answer_is_of_its_schema_piece_by_piece(running):
    format = JsonSchemaFormat(NamedSchema("city", SCHEMA))
    request = Request(messages=ASKED, response_format=format, max_tokens=80, temperature=0.0, stream=True)
    async with Client(running.broker_url, tenant="alice") as client:
        stream = client.stream(request, model="smollm2")
        text = "".join([chunk.text async for chunk in stream])
    assert text == stream.result.text
    assert stream.result.finish_reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)


async def test_each_of_several_answers_is_of_the_schema(running):
    format = JsonSchemaFormat(NamedSchema("city", SCHEMA))
    request = Request(messages=ASKED, response_format=format, max_tokens=80, temperature=1.0, seed=1, n=4)
    async with Client(running.broker_url, tenant="alice") as client:
        result = await client.complete(request, model="smollm2")
    texts = [choice.text for choice in result.data.choices]
    assert len(set(texts)) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


async def test_scores_of_a_bound_answer_are_the_model_s_own(running):
    fields = {"structured_outputs": StructuredOutputs(choice=["Zebra"]), "logprobs": True, "top_logprobs": 1}
    async with Client(running.broker_url, tenant="alice") as client:
        result = await client.complete(
            Request(messages=ASKED, max_tokens=24, bad_words=["Paris"], **fields), model="smollm2"
        )
    first = result.data.choices[0].logprobs.content[0]
    assert result.text == "Zebra"
    assert first.logprob < first.top_logprobs[0].logprob, "left to itself it would have begun otherwise"


async def test_structures_of_every_kind_in_one_batch(running):
    async def ask(client: Client, **fields) -> str:
        return (await client.complete(Request(messages=ASKED, max_tokens=24, **fields), model="smollm2")).text

    kinds = [StructuredOutputs(regex="[A-Z][a-z]{2}!"), StructuredOutputs(choice=["red", "green"])]
    kinds.append(StructuredOutputs(grammar='start: "a" | "b" "c"'))
    async with Client(running.broker_url, tenant="alice") as client:
        alone = await ask(client, temperature=0.0)
        bound = (ask(client, structured_outputs=kind) for kind in kinds)
        beside, regex, choice, grammar = await asyncio.gather(ask(client, temperature=0.0), *bound)
    assert beside == alone
    assert re.fullmatch("[A-Z][a-z]{2}!", regex)
    assert choice in ("red", "green")
    assert grammar in ("a", "bc")


async def test_json_objects_are_cut_by_length_only(running):
    any_object = Request(messages=ASKED, response_format=JsonObjectFormat(), max_tokens=120, temperature=0.0)
    named = NamedSchema("city", SCHEMA)
    too_short = Request(messages=ASKED, response_format=JsonSchemaFormat(named), max_tokens=4, temperature=0.0)
    async with Client(running.broker_url, tenant="alice") as client:
        whole = await client.complete(any_object, model="smollm2")
        cut = await client.complete(too_short, model="smollm2")
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert isinstance(json.loads(whole.text), dict)
    with pytest.raises(json.JSONDecodeError):
        json.loads(cut.text)


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"structured_outputs": StructuredOutputs(json={"type": "nonsense"})}, "structured_outputs", "nonsense"),
        ({"structured_outputs": StructuredOutputs(json={"uniqueItems": True})}, "structured_outputs", "uniqueItems"),
        ({"structured_outputs": StructuredOutputs(regex="(a")}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": StructuredOutputs(grammar="start: nobody")}, "structured_outputs", "nobody"),
        (
            {"structured_outputs": StructuredOutputs(grammar='start: "a" <|no_such_token|>'), "max_tokens": 5},
            "structured_outputs",
            "can't be followed",
        ),
        ({"tools": [Tool(Function("look"))]}, "tools", "no place for tools"),
    ],
)
async def test_what_can_not_be_followed_is_told_to_its_sender_alone(running, fields, field, says):
    async with Client(running.broker_url, tenant="mallory") as client:
        with pytest.raises(RequestError) as caught:
            await client.complete(Request(messages=ASKED, **fields), model="smollm2")
        assert (caught.value.code, caught.value.body.param) == ("invalid_request", field)
        assert says in caught.value.body.message
        fine = await client.complete(Request(messages=ASKED, max_tokens=1), model="smollm2")
    assert fine.usage.completion_tokens == 1
    assert running.engine.batcher.counters.preemptions == 0


async def test_a_message_is_continued(running):
    messages = [Message("user", "Count to five."), Message("assistant", "One, two, three,")]
    fields = {"add_generation_prompt": False, "continue_final_message": True}
    request = Request(messages=messages, max_tokens=3, temperature=0.0, **fields)
    async with Client(running.broker_url, tenant="alice") as client:
        result = await client.complete(request, model="smollm2")
    assert result.text.strip().startswith("four")
