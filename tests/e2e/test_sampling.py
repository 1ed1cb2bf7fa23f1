"""Sampling parameters over a real broker to a real model, every request of the batch with another mix."""

import asyncio
import urllib.request
from collections import Counter
from statistics import fmean

import msgspec
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from protocol.client import Client, RequestCancelled
from protocol.errors import RequestError
from protocol.request import Message, Request
from scheduler.sampling import seed_of
from tests.faults.service import totals

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


async def test_eight_answers_are_told_apart_and_their_prompt_is_computed_once(running):
    def scrape() -> Counter[str]:
        with urllib.request.urlopen(running.metrics_url, timeout=10) as answer:
            return Counter(totals(answer.read().decode()))

    story = "Once upon a time there was a lighthouse keeper who counted the waves. " * 8
    request = Request(messages=[Message("user", story)], n=8, temperature=1.0, seed=5, max_tokens=8, stream=True)
    async with Client(running.broker_url, tenant="eight") as client:
        before = await asyncio.to_thread(scrape)
        stream = client.stream(request, model="smollm2")
        chunks = [chunk async for chunk in stream]
        grown = await asyncio.to_thread(scrape)
        grown.subtract(before)
        alone = [
            await client.complete(msgspec.structs.replace(request, n=1, seed=seed), model="smollm2")
            for seed in (5, seed_of(5, 3))
        ]
    usage = stream.result.usage
    assert grown['tokenbus_computed_tokens_total{kind="prefill"}'] == usage.prompt_tokens + 7
    assert grown["tokenbus_forked_prompt_tokens_total"] == 7 * (usage.prompt_tokens - 1)
    assert grown['tokenbus_tokens_total{kind="prompt"}'] == usage.prompt_tokens
    assert grown['tokenbus_tokens_total{kind="generated"}'] == usage.completion_tokens
    assert grown["tokenbus_service_units_total"] == usage.prompt_tokens + 2 * usage.completion_tokens
    assert grown["tokenbus_time_to_first_token_seconds_count"] == 1
    assert grown["tokenbus_inter_token_latency_seconds_count"] == usage.completion_tokens - 8
    whole = ChatCompletion.model_validate_json(msgspec.json.encode(stream.result.data), strict=True)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == list(range(8))
    assert len(set(texts)) == 8
    streamed, reasons = [""] * 8, {}
    for chunk in chunks:
        (choice,) = ChatCompletionChunk.model_validate_json(msgspec.json.encode(chunk.data), strict=True).choices
        streamed[choice.index] += choice.delta.content
        reasons[choice.index] = choice.finish_reason
    assert streamed == texts
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert [result.text for result in alone] == [texts[0], texts[3]]


async def test_the_best_of_several_are_the_likeliest(running):
    all_of_them = Request(prompt=COUNT, n=4, temperature=1.2, seed=3, max_tokens=6, ignore_eos=True, logprobs=0)
    best = msgspec.structs.replace(all_of_them, n=2, best_of=4, logprobs=None)
    async with Client(running.broker_url, tenant="alice") as client:
        whole, told = [await client.complete(request, model="smollm2") for request in (all_of_them, best)]
    assert len({choice.text for choice in whole.data.choices}) > 1
    ranked = sorted(whole.data.choices, key=lambda choice: -fmean(choice.logprobs.token_logprobs))
    parsed = Completion.model_validate_json(msgspec.json.encode(told.data), strict=True)
    assert [choice.text for choice in parsed.choices] == [choice.text for choice in ranked[:2]]
    assert [(choice.index, choice.logprobs) for choice in parsed.choices] == [(0, None), (1, None)]
    assert told.usage.completion_tokens == 4 * 6


async def test_more_answers_than_the_service_allows_are_refused_and_a_cancel_ends_them_all(running):
    endless = Request(prompt=COUNT, n=16, max_tokens=400, ignore_eos=True, stream=True)
    async with Client(running.broker_url, tenant="alice") as client:
        with pytest.raises(RequestError, match="at most 16 here") as refused:
            await client.complete(msgspec.structs.replace(endless, n=17), model="smollm2")
        assert (refused.value.code, refused.value.body.param) == ("invalid_request", "n")
        with pytest.raises(RequestCancelled) as cancelled:
            async for chunk in client.stream(endless, model="smollm2", request_id="endless"):
                if chunk.index == 3:
                    await client.cancel("endless")
    assert cancelled.value.completion_tokens >= 4
    assert len(running.engine.batcher) == 0
    assert running.engine.batcher.pool.num_free == running.engine.batcher.pool.num_blocks
