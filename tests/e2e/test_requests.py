"""Requests over a real broker to a real model."""

import ast
import asyncio
import json
import subprocess
import urllib.request
import uuid
from pathlib import Path

import msgspec
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from protocol import replies, topics
from protocol.client import Client, RequestCancelled
from protocol.errors import RequestError
from protocol.replies import Accepted, Failed, Result
from protocol.request import Message, Request
from tests.e2e.conftest import SHARED, tenant
from tests.faults.service import totals

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

QUESTION = Request(
    messages=[Message("user", "What is the capital of France?")], max_tokens=12, temperature=0.0, stream=True
)
GREEDY = b'{"prompt": "One, two, three,", "max_tokens": 4, "temperature": 0}'


async def reply_on(transport, topic: str):
    """The next reply, which must come on this topic."""
    async with asyncio.timeout(60):
        incoming = await anext(transport.messages())
    transport.acknowledge(incoming)
    assert incoming.topic == topic
    return replies.decode_reply(incoming.payload), incoming


async def test_a_chat_streams_and_ends_with_the_whole_text(running):
    async with Client(running.broker_url, tenant="alice") as client:
        status = await client.wait_online()
        assert (status.model, status.max_running) == ("smollm2", 8)
        stream = client.stream(QUESTION, model="smollm2", request_id="chat-1")
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == stream.result.text
    assert "Paris" in stream.result.text
    assert [chunk.seq for chunk in chunks] == list(range(len(chunks)))
    assert stream.result.chunks == len(chunks)
    assert stream.result.usage.completion_tokens <= 12
    assert 0 < stream.result.timings.ttft_s <= stream.result.timings.total_s
    assert ChatCompletion.model_validate_json(msgspec.json.encode(stream.result.data), strict=True).choices
    for chunk in chunks:
        assert ChatCompletionChunk.model_validate_json(msgspec.json.encode(chunk.data), strict=True).choices


async def test_what_begins_alike_is_computed_once_for_its_own_tenant_and_what_is_shared_for_all(running):
    async def cached(tenant: str, system: str, question: str) -> int:
        request = Request(messages=[Message("system", system), Message("user", question)], max_tokens=1)
        async with Client(running.broker_url, tenant=tenant) as client:
            result = await client.complete(request, model="smollm2")
        return result.usage.prompt_tokens_details.cached_tokens

    own = "The following are the rules of the house, all of which hold at all times. " * 4
    assert await cached("prefix-a", own, "Who?") == 0
    assert await cached("prefix-a", own, "When, and where?") >= 48
    assert await cached("prefix-b", own, "When, and where?") == 0
    assert await cached("prefix-a", SHARED, "Who?") == 0
    assert await cached("prefix-b", SHARED, "When, and where?") >= 64


async def test_many_tenants_at_once_get_what_each_gets_alone(running):
    prompts = [f"The number after {number} is" for number in range(24)]

    async def ask(client: Client, prompt: str) -> str:
        return (await client.complete(Request(prompt=prompt, max_tokens=6, temperature=0.0), model="smollm2")).text

    async with Client(running.broker_url, tenant="t0") as first, Client(running.broker_url, tenant="t1") as second:
        alone = [await ask(first, prompt) for prompt in prompts[:4]]
        together = await asyncio.gather(*(ask((first, second)[index % 2], p) for index, p in enumerate(prompts)))
    assert list(together[:4]) == alone


async def test_a_seed_gives_the_same_text(running):
    request = Request(prompt="My favourite word is", max_tokens=8, temperature=1.0, seed=42)
    async with Client(running.broker_url, tenant="alice") as client:
        texts = {(await client.complete(request, model="smollm2")).text for _ in range(3)}
        other = await client.complete(msgspec.structs.replace(request, seed=43), model="smollm2")
    assert len(texts) == 1
    assert other.text not in texts


async def test_stop_strings_end_a_generation(running):
    request = Request(prompt="1, 2, 3, 4, 5, 6,", max_tokens=40, temperature=0.0, stop="9", stream=True)
    async with Client(running.broker_url, tenant="alice") as client:
        stream = client.stream(request, model="smollm2")
        text = "".join([chunk.text async for chunk in stream])
    assert text == stream.result.text == " 7, 8, "
    assert stream.result.finish_reason == "stop"
    assert stream.result.usage.completion_tokens < 40


async def test_cancel_ends_a_generation(running):
    request = Request(prompt="Once upon a time", max_tokens=500, ignore_eos=True, stream=True)
    async with Client(running.broker_url, tenant="alice") as client:
        with pytest.raises(RequestCancelled) as caught:
            async for chunk in client.stream(request, model="smollm2", request_id="long"):
                if chunk.seq == 2:
                    await client.cancel("long")
    assert 0 < caught.value.completion_tokens < 500
    assert len(running.engine.batcher) == 0


async def test_an_id_that_runs_is_confirmed_again_and_runs_once(running):
    async with tenant(running, "alice") as transport:
        topic, out = topics.request("alice", "smollm2", "twice"), topics.out("alice", "twice")
        for _ in range(3):
            await transport.publish(topic, GREEDY)
        kinds = [type((await reply_on(transport, out))[0]) for _ in range(4)]
    assert kinds == [Accepted, Accepted, Accepted, Result]


BAD = [
    ("not JSON", "r1", b"hello", "body", "UTF-8 JSON"),
    ("wrong types", "r1", b'{"prompt": "a", "max_tokens": "many"}', "max_tokens", "int"),
    ("NaN", "r1", b'{"prompt": "a", "temperature": NaN}', "body", "JSON"),
    ("huge number", "r1", b'{"prompt": "a", "temperature": 1e400}', "temperature", "out of range"),
    ("empty prompt", "r1", b'{"prompt": ""}', "prompt", "empty"),
    ("prompt over the context", "r1", msgspec.json.encode({"prompt": "word " * 9000}), "prompt", "8192"),
    ("max_tokens over the context", "r1", b'{"prompt": "a", "max_tokens": 8192}', "prompt", "8192"),
    ("unknown token", "r1", b'{"prompt": [49152]}', "prompt[0]", "below 49152"),
    ("max_tokens 0", "r1", b'{"prompt": "a", "max_tokens": 0}', "max_tokens", ">= 1"),
    ("10 MB", "r1", b'{"prompt": "' + b"a" * 10_000_000 + b'"}', "body", "1048576"),
    ("deep nesting", "r1", b'{"metadata": ' + b'{"a":' * 50_000, "metadata[...]", "str"),
    ("deep nesting in an unknown field", "r1", b'{"x": ' + b"[" * 50_000, "body", "unknown field"),
    ("invalid UTF-8", "r1", b'{"prompt": "\xff"}', "body", "UTF-8"),
    ("empty body", "r1", b"", "body", "JSON"),
    ("another model in the body", "r1", b'{"prompt": "a", "model": "gpt-4"}', "model", "smollm2"),
    ("forbidden characters", "bad id!", GREEDY, "request_id", "1 to 64 characters"),
    ("id of the service's own", "_x", GREEDY, "request_id", "no leading _"),
    ("id too long", "x" * 65, GREEDY, "request_id", "1 to 64 characters"),
    ("one level more", "a/b", GREEDY, "topic", "<request_id>"),
]


@pytest.mark.parametrize(("name", "id", "body", "field", "says"), BAD, ids=[case[0] for case in BAD])
async def test_bad_input_gets_a_typed_error_and_the_service_goes_on(running, name, id, body, field, says):
    del name
    good = uuid.uuid4().hex
    async with tenant(running, "mallory") as transport:
        await transport.publish(f"tokenbus/v1/mallory/req/smollm2/{id}", body, correlation=b"c1")
        usable = id.rpartition("/")[2]
        usable = usable if topics.is_name(usable) else topics.UNADDRESSED
        reply, incoming = await reply_on(transport, topics.out("mallory", usable))
        assert isinstance(reply, Failed)
        assert reply.error.param == field
        assert says in reply.error.message
        assert incoming.correlation == b"c1"
        await transport.publish(topics.request("mallory", "smollm2", good), GREEDY)
        await reply_on(transport, topics.out("mallory", good))
        assert isinstance((await reply_on(transport, topics.out("mallory", good)))[0], Result)


async def test_unknown_model_is_named(running):
    async with Client(running.broker_url, tenant="alice") as client:
        with pytest.raises(RequestError, match="gpt-4 is not served here") as caught:
            await client.complete(QUESTION, model="gpt-4")
    assert caught.value.code == "model_not_found"


async def test_forbidden_characters_in_the_other_levels(running):
    async with tenant(running, "mallory") as transport:
        await transport.publish("tokenbus/v1/mallory/req/bad model/r1", GREEDY)
        reply, _ = await reply_on(transport, topics.out("mallory", "r1"))
        assert (reply.error.code, reply.error.param) == ("invalid_topic", "model")
    async with tenant(running, "mal lory") as transport:
        await transport.publish("tokenbus/v1/mal lory/req/smollm2/r1", GREEDY)
        reply, _ = await reply_on(transport, topics.out("mal lory", "r1"))
        assert (reply.error.code, reply.error.param) == ("invalid_topic", "tenant")


async def test_nobody_is_answered_in_anothers_tree(running):
    victims = topics.out("victim", "inbox")
    async with tenant(running, "mallory") as mallory, tenant(running, "victim") as victim:
        await mallory.publish(topics.request("mallory", "smollm2", "r1"), GREEDY, response_topic=victims)
        reply, _ = await reply_on(mallory, topics.out("mallory", "r1"))
        assert (reply.error.code, reply.error.param) == ("invalid_topic", "response_topic")
        await victim.publish(topics.request("victim", "smollm2", "mine"), GREEDY)
        await reply_on(victim, topics.out("victim", "mine"))


async def test_cancels_that_name_nothing(running):
    async with tenant(running, "alice") as transport:
        own = topics.out("alice", "answers")
        await transport.publish(topics.cancel("alice", "nothing"), b"", response_topic=own)
        reply, _ = await reply_on(transport, own)
        assert reply.error.code == "not_found"
        await transport.publish("tokenbus/v1/alice/cancel/bad id", b"")
        reply, _ = await reply_on(transport, topics.out("alice", topics.UNADDRESSED))
        assert reply.error.code == "invalid_topic"


async def test_mosquitto_pub_and_sub_alone_can_use_the_service(running):
    """The very lines of docs/protocol.md, but for the port."""
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    block = page.split("```sh\n")[1].split("```")[0]
    port = running.broker_url.rpartition(":")[2]
    lines = [line.replace("-p 1883", f"-p {port}") for line in block.splitlines()]
    assert len(lines) == 3
    out = ""
    for line in lines:
        done = await asyncio.to_thread(
            subprocess.run, line, shell=True, capture_output=True, text=True, timeout=90, check=True
        )
        out = done.stdout
    accepted, result = (replies.decode_reply(line.encode()) for line in out.splitlines())
    assert isinstance(accepted, Accepted)
    assert isinstance(result, Result)
    assert "Paris" in result.text


async def test_metrics_tell_what_happened(running):
    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(running.metrics_url, timeout=10) as answer:
            return totals(answer.read().decode())

    before = await asyncio.to_thread(scrape)
    async with Client(running.broker_url, tenant="alice") as client:
        result = await client.complete(msgspec.structs.replace(QUESTION, ignore_eos=True), model="smollm2")
    after = await asyncio.to_thread(scrape)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert result.finish_reason == "length"
    assert grown('tokenbus_requests_total{outcome="length"}') == 1
    assert grown('tokenbus_tokens_total{kind="generated"}') == result.usage.completion_tokens == 12
    cached = grown('tokenbus_tokens_total{kind="cached"}')
    assert cached == result.usage.prompt_tokens_details.cached_tokens > 0
    assert grown('tokenbus_tokens_total{kind="prompt"}') == result.usage.prompt_tokens
    assert grown('tokenbus_computed_tokens_total{kind="prefill"}') + cached == result.usage.prompt_tokens
    assert grown("tokenbus_service_units_total") == result.usage.prompt_tokens - cached + 2 * 12
    assert grown("tokenbus_queue_seconds_count") == 1
    assert grown("tokenbus_time_to_first_token_seconds_count") == 1
    assert grown("tokenbus_inter_token_latency_seconds_count") == 11
    # One that was planned ahead of an earlier request's end may have been running still.
    assert 12 <= grown("tokenbus_step_seconds_count") == grown("tokenbus_batch_rows_count") <= 13
    assert after["tokenbus_worker_up"] == 1
    assert (
        after["tokenbus_running_requests"]
        == after["tokenbus_waiting_requests"]
        == after["tokenbus_kv_usage_ratio"]
        == 0
    )


async def test_health_tells_of_worker_and_broker(running):
    def ask(path: str) -> tuple[int, dict]:
        with urllib.request.urlopen(running.metrics_url.replace("/metrics", path), timeout=10) as answer:
            return answer.status, json.load(answer)

    assert await asyncio.to_thread(ask, "/healthz") == (200, {"ok": True, "checks": {"loop": True}})
    ready = {"ok": True, "checks": dict.fromkeys(("worker", "broker", "journal", "accepting"), True)}
    assert await asyncio.to_thread(ask, "/readyz") == (200, ready)


async def test_the_pages_python_lines_run(running, capsys):
    """The very block of docs/protocol.md, but for the port."""
    page = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    block = page.split("```python\n")[1].split("```")[0].replace("mqtt://127.0.0.1:1883", running.broker_url)
    await eval(compile(block, "protocol.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), {})
    assert "completion_tokens=" in capsys.readouterr().out
