"""Embeddings and scores over a real broker, from a real model, among generations; held against transformers."""

import ast
import asyncio
import base64
import re
import sys
import urllib.request
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from openai.types import Completion, CreateEmbeddingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from protocol import replies, topics
from protocol.client import Client, RequestCancelled, RequestExpired
from protocol.errors import RequestError
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.replies import Accepted, Failed, Result
from protocol.request import Request
from tests.e2e.conftest import tenant
from tests.faults.service import totals
from workers.weights import demo_model

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

PAGE = (Path(__file__).parents[2] / "docs" / "embeddings.md").read_text()
#: Longer than a step, which has 64 tokens here.
STORY = "Once upon a time there was a bus that many rode at once. " * 6
TEXTS = [STORY, "The sky is blue.", "Grass is green.", "Why?"]
CONTEXT = STORY + "At every stop some got off, and"


@cache
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()


@cache
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model())


@torch.inference_mode()
def hidden_states(text: str) -> np.ndarray:
    """``[T, H]``, as AutoModel gives them."""
    ids = tokenizer()(text, return_tensors="pt")
    return model().base_model(**ids).last_hidden_state[0].double().numpy()


@torch.inference_mode()
def logprobs(context: str, text: str) -> list[float]:
    """Of each of the text's tokens."""
    ids = tokenizer()(context + text, return_tensors="pt").input_ids
    count = ids.shape[1] - len(tokenizer()(context).input_ids)
    scored = model()(ids).logits[0, -count - 1 : -1].log_softmax(-1)
    return scored.gather(-1, ids[0, -count:, None])[:, 0].tolist()


def parsed(result: Result) -> CreateEmbeddingResponse:
    return CreateEmbeddingResponse.model_validate_json(msgspec.json.encode(result.data), strict=True)


async def test_vectors_are_transformers_own_among_generations(running):
    greedy = Request(prompt="One, two, three,", max_tokens=24, temperature=0.0)
    async with Client(running.broker_url, tenant="alice") as alice, Client(running.broker_url, tenant="bob") as bob:
        alone = await bob.complete(greedy, model="smollm2")
        *results, among = await asyncio.gather(
            *(
                alice.complete(EmbeddingRequest(input=TEXTS, pooling=pooling, normalize=normalize), model="smollm2")
                for pooling in ("mean", "last")
                for normalize in (False, True)
            ),
            bob.complete(greedy, model="smollm2"),
        )
    assert among.text == alone.text
    mean, mean_1, last, last_1 = (np.array([one.embedding for one in parsed(result).data]) for result in results)
    for number, text in enumerate(TEXTS):
        states = hidden_states(text)
        for plain, long_1, expected in ((mean, mean_1, states.mean(axis=0)), (last, last_1, states[-1])):
            length = np.linalg.norm(expected)
            assert plain[number] == pytest.approx(expected, abs=1e-4 * np.abs(expected).max())
            assert long_1[number] == pytest.approx(expected / length, abs=1e-5)
    tokens = sum(len(tokenizer()(text).input_ids) for text in TEXTS)
    assert {(one.usage.prompt_tokens, one.usage.total_tokens) for one in map(parsed, results)} == {(tokens, tokens)}
    assert [result.usage.prompt_tokens_details.cached_tokens for result in results[:2]] == [0, 0]


async def test_as_base64_and_from_token_ids_it_is_the_same_vector(running):
    ids = tokenizer()("The sky is blue.").input_ids
    async with Client(running.broker_url, tenant="alice") as client:
        (plain,) = await client.embed(EmbeddingRequest(input="The sky is blue."), model="smollm2")
        result = await client.complete(EmbeddingRequest(input=ids, encoding_format="base64"), model="smollm2")
    body = CreateEmbeddingResponse.construct(**msgspec.to_builtins(result.data))
    # As the openai package decodes what it asks for itself.
    decoded = np.frombuffer(base64.b64decode(body.data[0].embedding), dtype="float32")
    assert decoded == pytest.approx(np.array(plain), abs=1e-6)
    assert result.embeddings == [decoded.tolist()]


async def test_scores_are_transformers_own_and_a_context_is_read_once(running):
    texts = [" others got on.", " the driver slept.", " so did I."]
    before = await metrics(running)
    async with Client(running.broker_url, tenant="scoring") as client:
        results = [await client.complete(ScoreRequest(context=CONTEXT, text=text), model="smollm2") for text in texts]
        whole = await client.score(ScoreRequest(text=STORY, logprobs=2), model="smollm2")
    after = await metrics(running)
    for text, result in zip(texts, results, strict=True):
        expected = logprobs(CONTEXT, text)
        choice = Completion.model_validate_json(msgspec.json.encode(result.data), strict=True).choices[0]
        assert choice.text == "".join(choice.logprobs.tokens) == text
        assert choice.logprobs.token_logprobs == pytest.approx(expected, abs=1e-3)
        assert choice.cumulative_logprob == pytest.approx(sum(expected), abs=1e-2)
        assert choice.cumulative_logprob == pytest.approx(sum(choice.logprobs.token_logprobs))
    cached = [result.usage.prompt_tokens_details.cached_tokens for result in results]
    context = len(tokenizer()(CONTEXT).input_ids)
    assert cached == [0, *[(context - 1) // 16 * 16] * 2]
    expected = logprobs(tokenizer().decode(tokenizer()(STORY).input_ids[:1]), STORY[4:])
    assert whole.text == STORY[4:]
    assert whole.logprobs.token_logprobs == pytest.approx(expected, abs=1e-3)
    assert {len(top) for top in whole.logprobs.top_logprobs} <= {2, 3}
    # Only input is charged, and of that what was computed.
    tokens = sum(result.usage.prompt_tokens for result in results) + len(tokenizer()(STORY).input_ids)
    cached_story = grown(before, after, 'tokenbus_tokens_total{kind="cached"}') - sum(cached)
    assert grown(before, after, "tokenbus_service_units_total") == tokens - sum(cached) - cached_story
    assert grown(before, after, 'tokenbus_tokens_total{kind="prompt"}') == tokens
    assert grown(before, after, 'tokenbus_tokens_total{kind="generated"}') == 0
    assert grown(before, after, 'tokenbus_requests_total{outcome="computed"}') == 4
    assert grown(before, after, "tokenbus_queue_seconds_count") == 4
    assert grown(before, after, "tokenbus_time_to_first_token_seconds_count") == 0


async def metrics(running) -> dict[str, float]:
    def scrape() -> dict[str, float]:
        with urllib.request.urlopen(running.metrics_url, timeout=10) as answer:
            return totals(answer.read().decode())

    return await asyncio.to_thread(scrape)


def grown(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[name] - before.get(name, 0)


async def test_they_are_cancelled_and_expire_like_others(running):
    many = EmbeddingRequest(input=[f"{STORY} {number}" for number in range(40)], pooling="mean")
    async with Client(running.broker_url, tenant="alice") as client:
        asking = asyncio.create_task(client.embed(many, model="smollm2", request_id="many"))
        while len(running.engine.batcher) < 40:
            await asyncio.sleep(0.01)
        await client.cancel("many")
        with pytest.raises(RequestCancelled) as caught:
            await asking
        assert caught.value.completion_tokens == 0
        assert len(running.engine.batcher) == 0
        late = msgspec.structs.replace(many, deadline_ms=200)
        with pytest.raises(RequestExpired):
            await client.embed(late, model="smollm2")
        assert len(running.engine.batcher) == 0
        refused = msgspec.structs.replace(many, deadline_ms=200, refuse_late=True)
        with pytest.raises(RequestError) as unreachable:
            await client.embed(refused, model="smollm2")
        assert unreachable.value.code == "deadline_unreachable"


async def test_an_id_is_joined_and_replayed_and_is_of_one_kind(running):
    request = EmbeddingRequest(input=STORY)
    async with Client(running.broker_url, tenant="alice") as one, Client(running.broker_url, tenant="alice") as two:
        first, second = await asyncio.gather(
            *(client.embed(request, model="smollm2", request_id="shared") for client in (one, two))
        )
        assert first == second == await one.embed(request, model="smollm2", request_id="shared")
        with pytest.raises(RequestError) as caught:
            await two.score(ScoreRequest(text=STORY), model="smollm2", request_id="shared")
    assert caught.value.code == "id_conflict"


BAD = [
    ("embed", {}, "body", "missing required field `input`"),
    ("embed", {"input": "a", "temperature": 0}, "body", "unknown field `temperature`"),
    ("embed", {"input": ["a", ""]}, "input", "empty"),
    ("embed", {"input": [1, "a"]}, "input", "mixture"),
    ("embed", {"input": ["a"] * 2049}, "input", "2048"),
    ("embed", {"input": ["a", "word " * 9000]}, "input", "8192"),
    ("embed", {"input": [[5], [49152]]}, "input[1][0]", "49152"),
    ("embed", {"input": "a", "dimensions": 64}, "dimensions", "576"),
    ("embed", {"input": "a", "encoding_format": "hex"}, "encoding_format", "hex"),
    ("embed", {"input": "a", "model": "other"}, "model", "smollm2"),
    ("score", {"input": "a"}, "body", "unknown field `input`"),
    ("score", {"text": ""}, "text", "empty"),
    ("score", {"text": [5]}, "text", "another one before it"),
    ("score", {"text": "a", "context": [5]}, "context", "whichever"),
    ("score", {"text": "a b", "logprobs": 21}, "logprobs", "20"),
    ("score", {"text": "word " * 9000}, "text", "8192"),
]


async def test_bad_input_gets_a_typed_error(running):
    async with tenant(running, "mallory") as transport:
        for number, (kind, body, field, says) in enumerate(BAD):
            topic = topics.request("mallory", "smollm2", f"bad{number}", kind)
            await transport.publish(topic, msgspec.json.encode(body))
            incoming = await anext(transport.messages())
            transport.acknowledge(incoming)
            reply = replies.decode_reply(incoming.payload)
            assert isinstance(reply, Failed)
            assert (reply.request_id, reply.error.param) == (f"bad{number}", field)
            assert says in reply.error.message
        await transport.publish(topics.request("mallory", "smollm2", "good", "embed"), b'{"input": "a"}')
        kinds = [type(replies.decode_reply((await anext(transport.messages())).payload)) for _ in range(2)]
    assert kinds == [Accepted, Result]


async def test_the_pages_python_lines_run(running, capsys):
    """The very block of docs/embeddings.md, but for the port."""
    block = PAGE.split("```python\n")[1].split("```")[0].replace("mqtt://127.0.0.1:1883", running.broker_url)
    await eval(compile(block, "embeddings.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), {})
    similarity, logprob = map(float, capsys.readouterr().out.split())
    assert 0 < similarity < 1
    assert logprob == pytest.approx(sum(logprobs("The capital of France is", " Paris")), abs=1e-3)


async def test_the_pages_commands_run(running):
    lines = PAGE.split("```sh\n")[1].split("```")[0].splitlines()
    told = []
    for line in lines:
        command = re.sub(r"^tokenbus (\w+)", rf"tokenbus \1 --broker {running.broker_url}", line)
        process = await asyncio.create_subprocess_shell(
            command.replace("tokenbus", f"{sys.executable} -m scheduler.cli", 1), stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        told.append([msgspec.json.decode(line) for line in out.splitlines()])
    sky, grass = told[0]
    assert len(sky) == len(grass) == 576
    assert told[1] == [pytest.approx(sum(logprobs("The capital of France is", " Paris")), abs=1e-3)]
