"""Several answers to one request: told side by side, ended together, and taken up by another process one by one."""

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace

import msgspec

from protocol import replies
from protocol.chat import Message
from protocol.openai import Usage
from protocol.plan import Scored
from protocol.replies import Expired
from protocol.request import Request
from scheduler.core.batcher import TokenEvent
from scheduler.generation import Generation
from scheduler.journal.entry import Entry, Piece, request_of
from scheduler.sampling import seed_of
from tests.scheduler.test_generation import sequences_of, tool_parser
from tests.scheduler.test_outlook import report
from tests.scheduler.test_recovery import LETTER, TOKENIZER, Process, entry, leave, unfinished
from tests.scheduler.test_text import byte_tokenizer


def byte(letter: str) -> int:
    (token,) = byte_tokenizer().encode(letter).ids
    return token


def test_choices_are_told_side_by_side_and_end_by_themselves():
    request = Request(messages=[Message("user", "Hi")], stop="!", stream=True, n=2)
    entry = Entry(id="a/a", model="m", request=request, prompt=[70], seed=1, accepted_at=0.0, listeners=[])
    generation = Generation.of(entry, SimpleNamespace(backend=byte_tokenizer(), tool_parser=tool_parser), 0.0)
    one, two = generation.choices
    generation.push(one, byte("a"), 1.0, None)
    generation.push(two, byte("b"), 1.0, None)
    generation.push(two, byte("!"), 2.0, None)
    assert [generation.chunk(number) for number, _ in generation.cut()] == [generation.chunk(n) for n in (0, 1)]
    assert generation.unended() == [one]
    generation.push(one, byte("c"), 2.0, "length")
    last = generation.last_chunks()
    told = [
        (chunk.seq, chunk.index, chunk.text, choice.delta.role, choice.finish_reason)
        for chunk in [generation.chunk(0), generation.chunk(1), *last]
        for choice in chunk.data.choices
    ]
    assert told == [(0, 0, "a", "assistant", None), (1, 1, "b", "assistant", "stop"), (2, 0, "c", None, "length")]
    result = generation.result(3.0)
    assert [(c.index, c.text, c.finish_reason) for c in result.data.choices] == [(0, "ac", "length"), (1, "b", "stop")]
    assert result.usage == Usage(1, 4, 5)
    assert generation.outcome == "length"


def test_the_likeliest_per_token_are_told_and_all_are_counted():
    request = Request(prompt="x", n=2, best_of=4)
    entry = Entry(id="a/a", model="m", request=request, prompt=[70], seed=1, accepted_at=0.0, listeners=[])
    generation = Generation.of(entry, SimpleNamespace(backend=byte_tokenizer(), tool_parser=tool_parser), 0.0)
    # In all, "bb" is less likely than "a"; each of its tokens is more so. The token that ends a text isn't told, but counts.
    written = [("a.", [-1.4, -1.4]), ("bb.", [-1.0, -1.0, -1.0]), ("c.", [-2.0, -2.0]), ("d.", [-0.1, -5.0])]
    for choice, (text, logprobs) in zip(generation.choices, written, strict=True):
        for letter, logprob in zip(text, logprobs, strict=True):
            scored = Scored(byte(letter), logprob, 1, [])
            generation.push(choice, scored, 1.0, "stop" if letter == "." else None)
    result = generation.result(1.0)
    assert [(choice.index, choice.text) for choice in result.data.choices] == [(0, "bb"), (1, "a")]
    assert result.data.choices[0].logprobs is None, "that wasn't asked for"
    assert result.usage.completion_tokens == 2 + 3 + 2 + 2


def test_each_choice_that_has_not_ended_goes_on_with_draws_of_its_own():
    request = Request(prompt=[1, 2], max_tokens=10, n=4, prompt_logprobs=0, stop="!", stop_token_ids=[3])
    pieces = [Piece([7], 1), Piece([8, 9], 2), Piece([7, 3], 0, "stop"), Piece([7, byte("!")], 3), Piece([9], 2)]
    entry = Entry(
        id="a/a", model="m", request=request, prompt=[1, 2], seed=5, accepted_at=0.0, listeners=[], pieces=pieces
    )
    sequences = sequences_of(entry)
    assert [(sequence.id, sequence.output) for sequence in sequences] == [("a/a#1", [7]), ("a/a#2", [8, 9, 9])]
    assert [sequence.sampling.prompt_logprobs for sequence in sequences] == [0, None], "one of them scores the prompt"
    assert [sequence.sampling.seed for sequence in sequences] == [seed_of(5, 1), seed_of(5, 2)]
    seeds = {seed_of(seed, index) for seed in range(50) for index in range(16)}
    assert len(seeds) == 50 * 16, "no choice repeats another request's draws"
    assert all(-(1 << 63) <= seed < 1 << 63 for seed in seeds)
    assert seed_of(5, 0) == 5
    assert [request_of(sequence.id) for sequence in sequences] == [("a/a", 1), ("a/a", 2)]


async def test_a_request_for_several_texts_goes_on_with_those_that_are_missing(path):
    told = Request(prompt=[65, 66], max_tokens=4, stream=True, n=3)
    pieces = [Piece([LETTER], 0), Piece([LETTER] * 4, 2, "length"), Piece([LETTER], 1), Piece([LETTER], 0)]
    several = msgspec.structs.replace(entry("a", pieces=pieces), request=told)
    await leave(path, several)
    async with Process(path) as process:
        await process.settle()
        given = [tokens for step in process.worker.steps for tokens in step.given]
        assert given == [[65, 66, LETTER, LETTER], [65, 66, LETTER]], "the last one had ended"
        chunks = process.broker.chunks("a")
        assert [chunk.seq for chunk in chunks] == list(range(3, 3 + len(chunks)))
        texts = ["x", "x", "xxxx"]  # in the pieces before the last one
        for chunk in chunks:
            texts[chunk.index] += chunk.text
        (result,) = process.broker.terminal("a")
        choices = [(choice.index, choice.text, choice.finish_reason) for choice in result.data.choices]
        assert choices == [(index, "xxxx", "length") for index in range(3)]
        assert texts == ["xxxx"] * 3
        assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.attempt) == (2, 12, 2)
        assert result.chunks == 3 + len(chunks)
    assert await unfinished(path) == {}


async def test_a_suspect_for_several_texts_is_taken_out_whole_and_goes_on(path):
    several = msgspec.structs.replace(entry("a", attempt=3), request=Request(prompt=[65, 66], max_tokens=4, n=3))
    await leave(path, several, entry("other", attempt=3))
    async with Process(path) as process:
        await process.settle()
        names = [set(step.names) for step in process.worker.steps]
        assert names[0] == {"a"}
        assert {"a", "a#1", "a#2", "other"} in names
        (result,) = process.broker.terminal("a")
        assert [choice.text for choice in result.data.choices] == ["xxxx"] * 3


async def test_what_comes_for_a_text_after_its_stop_string_is_dropped(path):
    (other,) = TOKENIZER.encode("y").ids
    asked = Request(prompt=[65, 66], max_tokens=9, stop="x", n=2)
    await leave(path, msgspec.structs.replace(entry("a"), request=asked))
    async with Process(path, fatal="a") as process:
        await process.worker.reached.wait()
        for first, second in ((LETTER, other), (LETTER, LETTER)):  # the second before the first was looked at
            events = [TokenEvent("alice/a", first, None), TokenEvent("alice/a#1", second, None)]
            process.engine.reports.put_nowait(replace(report(), events=events))
        await process.settle()
        (result,) = process.broker.terminal("a")
        assert [choice.text for choice in result.data.choices] == ["", "y"]
        assert result.usage.completion_tokens == 3


async def test_a_cancel_and_a_deadline_end_all_texts_of_a_request(path):
    asked = Request(prompt=[65, 66], max_tokens=900, n=3)
    entries = [msgspec.structs.replace(entry(name), request=asked) for name in ("cancelled", "expired")]
    entries[1].expires_at = time.time() + 0.5
    await leave(path, *entries)
    async with Process(path, fatal="expired") as process:
        await process.worker.reached.wait()
        assert process.egress.cancel("alice/cancelled")
        while not process.broker.terminal("expired"):
            await asyncio.sleep(0.01)
        process.worker.release.set()
        await process.settle()
        assert len(process.engine.batcher) == 0
        assert process.engine.batcher.pool.num_free == process.engine.batcher.pool.num_blocks
        assert process.broker.terminal("cancelled") == [replies.Cancelled("cancelled", 0, attempt=2)]
        assert process.broker.terminal("expired") == [Expired("expired", 0, attempt=2)]
