"""Generation that goes on in another process is the same generation, to the last chunk."""

import math
from collections import Counter
from functools import cache
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from protocol import replies
from protocol.chat import Function, Message, Tool
from protocol.errors import BadRequest
from protocol.openai import PromptLogprob
from protocol.plan import NO_TOKEN, Scored, WorkerInfo
from protocol.request import Request
from protocol.structure import StructuredOutputs
from scheduler.core.sequence import Sequence
from scheduler.generation import Generation
from scheduler.journal.entry import Entry, Listener, Piece, Token
from scheduler.kinds import run_of
from scheduler.structure import grammar_for
from scheduler.tools import FORMATS, ToolParser
from tests.scheduler.test_text import any_text, byte_tokenizer
from workers.weights import demo_model

INFO = WorkerInfo(
    model_path="",
    max_model_len=1000,
    vocab_size=256,
    hidden_size=4,
    eos_ids=[],
    num_blocks=100,
    block_size=16,
    kv_bytes_per_block=1,
    device="cpu",
    dtype="float32",
    kv_dtype="float32",
    attention="reference",
)
NOWHEN = replies.Timings(0.0, 0.0, 0.0)
TEXT = "ab 🚌é\n"
CALL = '<tool_call>{"name": "wave", "arguments": {"to": "é"}}</tool_call>'


@cache
def tokenizer(name: str) -> Tokenizer:
    return byte_tokenizer() if name == "bytes" else Tokenizer.from_file(str(demo_model() / "tokenizer.json"))


def tool_parser(request: Request, id: str) -> ToolParser | None:
    return ToolParser(FORMATS["hermes"], ["wave"], id) if request.tools else None


#: Of which choice, the token, and whether its sequence ends with it.
Event = tuple[int, Token, str | None]


class Process:
    """What a service does with one entry: rebuilds it from the journal, feeds it tokens, journals pieces."""

    def __init__(self, entry: Entry, backend: Tokenizer, journal: list[Piece]) -> None:
        entry = msgspec.structs.replace(entry, pieces=list(journal))
        self.journal = journal
        self.journalled = Counter(piece.choice for piece in journal for _ in piece.tokens)
        self.final: bytes | None = None
        self.generation = Generation.of(entry, SimpleNamespace(backend=backend, tool_parser=tool_parser), 0.0)
        self.rebuilt = self.state()
        self.at_last_cut = self.rebuilt

    def state(self) -> tuple:
        """What is told of the pieces that are out."""
        generation = self.generation
        chunks = tuple(replies.encode(generation.chunk(number)) for number in range(len(generation.parts)))
        return [choice.text[: choice.cut_at] for choice in generation.choices], chunks

    def run(self, events: list[Event], cuts: list[bool], until: int) -> None:
        """Take the tokens that aren't journalled yet, up to the one with this number."""
        generation, journalled = self.generation, self.journalled.copy()
        for number, (index, token, finish) in enumerate(events[:until]):
            choice = generation.choices[index]
            if journalled[index]:
                journalled[index] -= 1
                continue
            if choice.reason is not None:
                continue  # a stop string ended it
            generation.push(choice, token, float(number), finish)
            if not generation.unended():
                result = msgspec.structs.replace(generation.result(0.0), timings=NOWHEN)
                self.final = replies.encode([generation.last_chunks(), result])
                return
            if cuts[number]:
                for place, piece in generation.cut():
                    assert place == len(self.journal)
                    self.journal.append(piece)
                self.at_last_cut = self.state()


@st.composite
def stories(draw, backend: Tokenizer) -> dict:
    """An entry, the tokens that the model will come up with, where pieces are cut, and where processes die."""
    ids = st.integers(0, backend.get_vocab_size() - 1)
    texts = st.lists(
        st.one_of(
            st.one_of(st.text(TEXT, min_size=1, max_size=8), st.sampled_from([CALL, CALL[:-3]])).map(
                lambda text: backend.encode(text).ids
            ),
            st.lists(ids, min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=8,
    ).map(lambda parts: [token for part in parts for token in part])
    stream, n, spare = draw(st.booleans()), draw(st.sampled_from([1, 1, 2, 3])), draw(st.sampled_from([0, 0, 1]))
    best_of = n + spare if spare and not stream else None
    choices = [draw(texts) for _ in range(best_of or n)]
    logprobs = draw(st.sampled_from([None, 0, 2]))
    if logprobs is not None or best_of is not None:
        choices = [
            [Scored(token, -0.5 - number % 3, 2, [(draw(ids), -0.25)] * (logprobs or 0)) for number, token in row]
            for row in map(enumerate, choices)
        ]
    order = draw(st.permutations([index for index, tokens in enumerate(choices) for _ in tokens]))
    ends = draw(st.sampled_from(["stop", "length"]))
    left = [list(zip(tokens, [None] * (len(tokens) - 1) + [ends], strict=True)) for tokens in choices]
    events = [(index, *left[index].pop(0)) for index in order]
    prompt = draw(st.lists(ids, min_size=1, max_size=8))
    stop = draw(st.none() | st.lists(st.text(TEXT, min_size=1, max_size=4), min_size=1, max_size=3))
    chat = draw(st.booleans())
    request = Request(
        messages=[Message("user", "Hello")] if chat else None,
        prompt=None if chat else prompt,
        tools=[Tool(Function("wave"))] if chat and draw(st.booleans()) else None,
        stop=stop,
        min_tokens=draw(st.sampled_from([0, 0, 3])),
        include_stop_str_in_output=draw(st.booleans()),
        logprobs=logprobs is not None if chat else logprobs,
        top_logprobs=logprobs if chat else None,
        stream=stream,
        n=n,
        best_of=best_of,
    )
    entry = Entry(
        id="alice/a",
        model="tiny",
        request=request,
        prompt=prompt,
        seed=1,
        accepted_at=1e9,
        listeners=[Listener("tokenbus/v1/alice/out/a")],
    )
    return {
        "entry": entry,
        "events": events,
        "cuts": draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events))),
        "deaths": sorted(draw(st.lists(st.integers(0, len(events) - 1), max_size=3))),
    }


@pytest.mark.parametrize("name", ["bytes", "demo"])
@given(data=st.data())
@settings(deadline=None)
def test_stopped_anywhere_it_goes_on_as_if_it_never_had(name, data):
    backend = tokenizer(name)
    story = data.draw(stories(backend))
    told = {key: story[key] for key in ("events", "cuts")}
    never = Process(story["entry"], backend, [])
    never.run(**told, until=len(story["events"]))
    assert never.final is not None

    journal: list[Piece] = []
    process = Process(story["entry"], backend, journal)
    for death in story["deaths"]:
        process.run(**told, until=death)
        assume(process.final is None)
        before = process.at_last_cut
        process = Process(story["entry"], backend, journal)
        assert process.rebuilt == before, "text and chunks are those that were published"
        assert process.generation.published == len(journal)
    process.run(**told, until=len(story["events"]))
    assert journal == never.journal
    assert process.state() == never.state()
    assert process.final == never.final


def test_a_generation_that_calls_tools_says_so():
    request = Request(messages=[Message("user", "Hi")], tools=[Tool(Function("wave"))], stream=True)
    tokens = byte_tokenizer().encode(f"One moment. {CALL}").ids
    chunks, result = answer_of(request, [*tokens, 0], [True] * (len(tokens) + 1), ends="stop")
    assert (result.text, result.finish_reason) == ("One moment.", "tool_calls")
    assert [(call.function.name, call.function.arguments) for call in result.calls] == [("wave", '{"to": "\\u00e9"}')]
    assert "".join(chunk.text for chunk in chunks) == result.text
    streamed = [(call.index, call.id) for chunk in chunks for call in chunk.calls]
    assert streamed == [(0, result.calls[0].id)]
    assert all(chunk.text or chunk.calls for chunk in chunks[:-1]), "a piece that says nothing isn't published"


@given(data=st.data())
@settings(deadline=None)
def test_other_cuts_after_a_death_change_pieces_and_no_text(data):
    backend = tokenizer("bytes")
    story = data.draw(stories(backend))
    events = story["events"]
    other = data.draw(st.lists(st.booleans(), min_size=len(events), max_size=len(events)))
    never = Process(story["entry"], backend, [])
    never.run(events, story["cuts"], until=len(events))
    first = Process(story["entry"], backend, [])
    first.run(events, story["cuts"], until=len(events) // 2)
    second = Process(story["entry"], backend, first.journal)
    second.run(events, other, until=len(events))
    assume(first.final is None)
    published, whole = first.at_last_cut[1], second.state()[1]
    assert whole[: len(published)] == published
    assert [choice.text for choice in second.generation.choices] == [choice.text for choice in never.generation.choices]
    assert second.generation.completion_tokens == never.generation.completion_tokens


def answer_of(request: Request, ids: list[int], cuts: list[bool], ends: str = "length") -> tuple[list, replies.Result]:
    """What a request whose generation comes up with these tokens is sent: chunks and result."""
    entry = Entry(id="a/a", model="m", request=request, prompt=[70], seed=1, accepted_at=0.0, listeners=[])
    generation = Generation.of(entry, SimpleNamespace(backend=byte_tokenizer(), tool_parser=tool_parser), 0.0)
    (choice,) = generation.choices
    chunks = []
    for number, token in enumerate(ids):
        scored = token if request.logprobs is None else Scored(token, -float(number), 1, [])
        generation.push(choice, scored, 0.0, ends if number == len(ids) - 1 else None)
        if not generation.unended():
            return [*chunks, *generation.last_chunks()], generation.result(0.0)
        if cuts[number]:
            chunks += [generation.chunk(place) for place, _ in generation.cut()]
    raise AssertionError("it ends with its last token")


def test_log_probabilities_are_those_of_all_that_the_model_wrote_its_calls_included():
    written = f"One moment. {CALL}"
    ids = byte_tokenizer().encode(written).ids
    messages, tools = [Message("user", "Hi")], [Tool(Function("wave"))]
    request = Request(messages=messages, tools=tools, stream=True, logprobs=True)
    chunks, result = answer_of(request, ids, [True] * len(ids))
    assert (result.text, len(result.calls)) == ("One moment.", 1)
    told = result.data.choices[0].logprobs.content
    assert bytes(byte for token in told for byte in token.bytes).decode() == written
    assert [token for chunk in chunks for token in chunk.data.choices[0].logprobs.content] == told


#: Characters of one to four bytes, each a token: so most of them, and all stop strings of several, are cut by tokens.
UNICODE = "aé日🚌"


@given(data=st.data(), include=st.booleans())
@settings(deadline=None)
def test_nothing_after_a_stop_string_is_ever_published_and_nothing_before_it_is_withheld(data, include):
    text = data.draw(st.text(UNICODE, min_size=1, max_size=30) | any_text.filter(bool))
    at = data.draw(st.integers(0, len(text) - 1))
    stops = [
        text[at : at + data.draw(st.integers(1, 4))],
        *data.draw(st.lists(st.text(UNICODE, min_size=1, max_size=3), max_size=2)),
    ]
    ids = byte_tokenizer().encode(text).ids
    cuts = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    request = Request(prompt="x", stop=stops, stream=True, logprobs=0, include_stop_str_in_output=include)
    chunks, result = answer_of(request, ids, cuts)
    # The first to be complete is the one; of those that end with the same character the leftmost.
    end, begin = min((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    wanted = text[:end] if include else text[:begin]
    assert result.text == wanted
    assert "".join(chunk.text for chunk in chunks) == wanted
    assert result.finish_reason == "stop"
    # Nor do log probabilities tell of what comes after; those of the chunks together are those of the result.
    told = result.data.choices[0].logprobs
    assert told.token_logprobs == [-float(number) for number in range(len(wanted.encode()))]
    assert [score for chunk in chunks for score in chunk.data.choices[0].logprobs.token_logprobs] == told.token_logprobs
    assert told.text_offset == [at for at, char in enumerate(wanted) for _ in char.encode()]


def test_stop_strings_are_not_looked_for_before_min_tokens():
    ids = byte_tokenizer().encode("abcabcabc").ids
    for least, text in ((0, "a"), (2, "a"), (3, "abca"), (6, "abcabca")):
        _, result = answer_of(Request(prompt="x", stop="bc", min_tokens=least), ids, [False] * len(ids))
        assert result.text == text
    _, result = answer_of(Request(prompt="x", stop=["abca", "b"], min_tokens=3), ids, [False] * len(ids))
    assert result.text == ""  # it began early and ended late enough, unlike the "b" that was held back with it


def test_a_stop_token_is_part_of_the_text_only_on_request():
    ids = byte_tokenizer().encode("ab.").ids
    for include, text, scores in ((False, "ab", [-0.0, -1.0]), (True, "ab.", [-0.0, -1.0, -2.0])):
        request = Request(prompt="x", logprobs=0, include_stop_str_in_output=include)
        _, result = answer_of(request, ids, [False] * 3, ends="stop")
        assert (result.text, result.usage.completion_tokens, result.finish_reason) == (text, 3, "stop")
        assert result.data.choices[0].logprobs.token_logprobs == scores


def test_a_prompt_s_scores_come_with_the_result_however_often_they_were_computed():
    entry = Entry(
        id="a/a",
        model="m",
        request=Request(prompt="x", prompt_logprobs=1),
        prompt=byte_tokenizer().encode("héh").ids,
        seed=1,
        accepted_at=0.0,
        listeners=[],
    )
    _, first, second, last = entry.prompt
    generation = Generation.of(entry, SimpleNamespace(backend=byte_tokenizer(), tool_parser=tool_parser), 0.0)
    generation.score_prompt(1, [Scored(first, -1.0, 3, [(last, -0.5)]), Scored(second, -2.0, 1, [(second, -2.0)])])
    generation.score_prompt(2, [Scored(second, -2.0, 1, [(second, -2.0)]), Scored(last, -3.0, 9, [(first, -0.1)])])
    generation.push(generation.choices[0], last, 0.0, "length")
    assert generation.result(0.0).data.choices[0].prompt_logprobs == [
        None,
        {last: PromptLogprob(-0.5, 1, "h"), first: PromptLogprob(-1.0, 3, "\\xc3")},
        {second: PromptLogprob(-2.0, 1, "\\xa9")},
        {first: PromptLogprob(-0.1, 1, "\\xc3"), last: PromptLogprob(-3.0, 9, "h")},
    ]


def sequences_of(entry: Entry, info: WorkerInfo = INFO) -> list[Sequence]:
    chat = SimpleNamespace(backend=byte_tokenizer(), tool_parser=tool_parser)
    return run_of(entry, chat, info, 0.0)[1][0]


def test_the_batcher_goes_on_after_the_journalled_tokens():
    entry = Entry(
        id="alice/a",
        model="tiny",
        request=Request(prompt=[1, 2], max_tokens=10, seed=5, priority=-3),
        prompt=[1, 2],
        seed=5,
        accepted_at=0.0,
        listeners=[],
        expires_at=2e9,
        pieces=[Piece([7]), Piece([Scored(8, -0.5, 1, []), 9])],
    )
    (sequence,) = sequences_of(entry)
    assert (sequence.tokens, sequence.prompt_len, sequence.max_tokens) == ([1, 2, 7, 8, 9], 2, 10)
    assert sequence.sampling.seed == 5
    assert (sequence.priority, sequence.deadline) == (-3, 2e9)
    (sequence,) = sequences_of(msgspec.structs.replace(entry, expires_at=None))
    assert (sequence.output, sequence.deadline) == ([7, 8, 9], math.inf), (
        "whoever looks at an entry takes nothing from it"
    )


def test_a_structure_goes_with_its_sequence_to_any_model_that_can_end():
    request = Request(prompt=[1, 2], structured_outputs=StructuredOutputs(regex="a+"), stop_token_ids=[7])
    entry = Entry(
        id="alice/a",
        model="tiny",
        request=request,
        prompt=[1, 2],
        seed=5,
        accepted_at=0.0,
        listeners=[],
        pieces=[Piece([9])],
    )
    (sequence,) = sequences_of(entry, msgspec.structs.replace(INFO, eos_ids=[3]))
    assert sequence.sampling.grammar == grammar_for(request)
    assert sequence.stop_ids == {3, 7, NO_TOKEN}
    with pytest.raises(BadRequest, match="no token that ends") as caught:
        sequences_of(entry)
    assert caught.value.body.param == "structured_outputs"
