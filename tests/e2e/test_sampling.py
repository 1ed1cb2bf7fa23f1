"""Sampling parameters over a real broker to a real model, every request of the batch with another mix."""

import asyncio

import msgspec
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from protocol.client import Client
from protocol.errors import RequestError
from protocol.request import Message, Request

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

QUESTION = [Message("user", "What is the capital of France?")]
COUNT = "1, 2, 3, 4, 5, 6,"
COMMA = 28


async def test_one_batch_of_many_mixes(running):
    greedy = {"temperature": 0.0, "max_tokens": 8}
    asked = {
        "plain": Request(messages=QUESTION, **greedy),
        "without": Request(messages=QUESTION, bad_words=["Paris"], **greedy),
        "forced": Request(prompt=COUNT, logit_bias={str(COMMA): 100.0}, **greedy),
        "early": Request(prompt=COUNT, stop_token_ids=[COMMA], **greedy),
        "late": Request(prompt=COUNT, stop_token_ids=[COMMA], min_tokens=6, **greedy),
        "varied": Request(prompt=COUNT, presence_penalty=2.0, frequency_penalty=2.0, **greedy),
        "drawn": Request(prompt=COUNT, temperature=1.3, typical_p=0.9, repetition_penalty=1.2, seed=7, max_tokens=8),
        "again": Request(prompt=COUNT, temperature=1.3, typical_p=0.9, repetition_penalty=1.2, seed=7, max_tokens=8),
        "up to": Request(prompt=COUNT, stop="9", include_stop_str_in_output=True, temperature=0.0, max_tokens=20),
    }
    async with Client(running.broker_url, tenant="alice") as client:
        results = await asyncio.gather(*(client.complete(request, model="smollm2") for request in asked.values()))
    told = dict(zip(asked, results, strict=True))
    assert "Paris" in told["plain"].text
    assert "Paris" not in told["without"].text
    assert told["forced"].text == "," * 8
    assert told["early"].text == " 7"
    assert told["early"].usage.completion_tokens < 6 <= told["late"].usage.completion_tokens
    assert "," not in told["late"].text
    assert told["varied"].text.count(",") < 3
    assert told["drawn"].text == told["again"].text
    assert told["up to"].text == " 7, 8, 9"


async def test_a_chat_s_log_probabilities_stream_with_its_text(running):
    request = Request(messages=QUESTION, max_tokens=12, temperature=0.0, stream=True, logprobs=True, top_logprobs=3)
    async with Client(running.broker_url, tenant="alice") as client:
        stream = client.stream(request, model="smollm2")
        chunks = [chunk async for chunk in stream]
    whole = ChatCompletion.model_validate_json(msgspec.json.encode(stream.result.data), strict=True)
    pieces = [ChatCompletionChunk.model_validate_json(msgspec.json.encode(one.data), strict=True) for one in chunks]
    told = whole.choices[0].logprobs.content
    assert bytes(byte for token in told for byte in token.bytes).decode() == stream.result.text
    for token in told:
        best, *others = token.top_logprobs
        assert (best.token, best.logprob) == (token.token, token.logprob), "greedy takes the likeliest"
        assert 0 >= best.logprob >= others[0].logprob >= others[1].logprob
    streamed = [token for one in pieces for token in one.choices[0].logprobs.content]
    assert [(token.token, token.logprob) for token in streamed] == [(token.token, token.logprob) for token in told]


async def test_a_completion_s_log_probabilities_and_its_prompt_s(running):
    request = Request(prompt=COUNT, max_tokens=4, temperature=0.0, logprobs=2, prompt_logprobs=1)
    async with Client(running.broker_url, tenant="alice") as client:
        first, second = [await client.complete(request, model="smollm2") for _ in range(2)]
    assert second.usage.prompt_tokens_details.cached_tokens == 0, "all of the prompt is computed"
    assert second.data.choices[0].prompt_logprobs == first.data.choices[0].prompt_logprobs
    choice = Completion.model_validate_json(msgspec.json.encode(first.data), strict=True).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens) == first.text
    assert told.text_offset == [len("".join(told.tokens[:at])) for at in range(4)]
    assert [top[token] for token, top in zip(told.tokens, told.top_logprobs, strict=True)] == told.token_logprobs
    nothing, *prompt = choice.prompt_logprobs
    assert nothing is None
    assert len(prompt) == first.usage.prompt_tokens - 1
    assert all(1 in {each["rank"] for each in token.values()} for token in prompt)
    # What goes on a count is likely, and said to be.
    assert all(each["logprob"] > -1 for each in prompt[-1].values() if each["decoded_token"] == ",")


async def test_a_token_that_the_model_has_not_is_refused_and_its_neighbour_is_served(running):
    async with Client(running.broker_url, tenant="alice") as client:
        good, bad = await asyncio.gather(
            client.complete(Request(prompt="a", max_tokens=2, logit_bias={"49151": 1.0}), model="smollm2"),
            client.complete(Request(prompt="a", max_tokens=2, logit_bias={"49152": 1.0}), model="smollm2"),
            return_exceptions=True,
        )
    assert good.usage.completion_tokens == 2
    assert isinstance(bad, RequestError)
    assert (bad.code, bad.body.param) == ("invalid_request", "logit_bias")
