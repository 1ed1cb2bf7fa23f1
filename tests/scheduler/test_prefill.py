"""Embeddings and scores: what is computed for them, what is refused, and what is made of what the worker tells."""

import base64
import struct

import msgspec
import pytest
from openai.types import Completion, CreateEmbeddingResponse

from protocol.errors import BadRequest, ServiceError
from protocol.kinds import AnyRequest
from protocol.plan import Scored
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.request import Request
from scheduler.chat import Chat
from scheduler.journal.entry import Entry, digest
from scheduler.journal.row import body_of, load
from scheduler.kinds import prompt_of, run_of
from scheduler.outlook import Outlook
from tests.scheduler.test_generation import INFO
from workers.weights import demo_model

WIDE = msgspec.structs.replace(INFO, vocab_size=50_000, max_model_len=50, hidden_size=3)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(str(demo_model()))


def entry(request: AnyRequest, chat: Chat) -> Entry:
    prompt, splits = prompt_of(request, chat, WIDE)
    return Entry(
        id="alice/r1",
        model="m",
        request=request,
        prompt=prompt,
        splits=splits,
        seed=0,
        accepted_at=1.0,
        listeners=[],
    )


def vector(*numbers: float) -> bytes:
    return struct.pack(f"={len(numbers)}d", *numbers)


def embedded(request: EmbeddingRequest, chat: Chat, *parts: tuple[str, int, bytes]) -> CreateEmbeddingResponse:
    asked = entry(request, chat)
    run, _ = run_of(asked, chat, WIDE, 0.0)
    for part in parts:
        run.pool(*part)
    for _ in asked.sequence_ids:
        assert not run.is_whole
        run.complete()
    assert run.is_whole
    return CreateEmbeddingResponse.construct(**msgspec.to_builtins(run.result(1.0).data))


def test_a_sequence_for_each_text(chat):
    texts = ["The sky is blue.", "Why?", "Once upon a time"]
    tokens = [chat.backend.encode(text).ids for text in texts]
    for given in (texts, tokens):
        asked = entry(EmbeddingRequest(input=given, pooling="mean", priority=3), chat)
        _, families = run_of(asked, chat, WIDE, 0.0)
        sequences = [sequence for (sequence,) in families]
        assert [sequence.tokens for sequence in sequences] == tokens
        assert [sequence.id for sequence in sequences] == ["alice/r1", "alice/r1#1", "alice/r1#2"]
        assert {(one.max_tokens, one.tenant, one.priority, one.sampling.pooling) for one in sequences} == {
            (0, "alice", 3, "mean")
        }
    assert entry(EmbeddingRequest(input=tokens[0]), chat).prompt == tokens[0], "a list of tokens is one text"


def test_a_mean_is_made_of_all_parts_and_who_began_anew_counts_once(chat):
    request = EmbeddingRequest(input=[[5, 6, 7, 8], [9]], pooling="mean", normalize=False)
    parts = [
        ("alice/r1", 0, vector(100, 100, 100)),
        ("alice/r1#1", 0, vector(1, 2, 3)),
        ("alice/r1", 0, vector(1, 2, 3)),
        ("alice/r1", 3, vector(3, 2, 1)),
    ]
    response = embedded(request, chat, *parts)
    assert [one.embedding for one in response.data] == [[1, 1, 1], [1, 2, 3]]
    assert [one.index for one in response.data] == [0, 1]


def test_vectors_are_1_long_unless_told_otherwise(chat):
    request = EmbeddingRequest(input=[5, 6])
    assert embedded(request, chat, ("alice/r1", 1, vector(0, 3, 4))).data[0].embedding == pytest.approx([0, 0.6, 0.8])
    assert embedded(request, chat, ("alice/r1", 1, vector(0, 0, 0))).data[0].embedding == [0, 0, 0]


def test_as_base64_they_are_the_same_numbers(chat):
    part = ("alice/r1", 1, vector(0.1, 3, 4))
    numbers = embedded(EmbeddingRequest(input=[5, 6]), chat, part)
    packed = embedded(EmbeddingRequest(input=[5, 6], encoding_format="base64"), chat, part)
    # As the openai package decodes what it asks for itself.
    assert list(struct.unpack("<3f", base64.b64decode(packed.data[0].embedding))) == numbers.data[0].embedding
    assert CreateEmbeddingResponse.model_validate_json(numbers.model_dump_json(), strict=True).usage.total_tokens == 2


def test_what_is_no_number_is_an_error(chat):
    for worst in (float("nan"), float("inf")):
        with pytest.raises(ServiceError, match="finite"):
            embedded(EmbeddingRequest(input=[5]), chat, ("alice/r1", 0, vector(worst, 1, 1)))


@pytest.mark.parametrize(
    ("context", "text", "scored"),
    [
        ("The capital of France is", " Paris.", [" Paris", "."]),
        ("The capital of France is ", "Paris.", [" Paris", "."]),  # the space is part of the first token
        ("The capital of France i", "s Paris.", [" is", " Paris", "."]),  # so is what the context begins
        (None, "The capital", [" capital"]),
        ("", "The capital", [" capital"]),
        ("é", "è é", ["è", " é"]),
    ],
)
def test_scored_is_the_text_as_the_model_knows_it_after_its_context(chat, context, text, scored):
    asked = entry(ScoreRequest(text=text, context=context), chat)
    run, ((sequence,),) = run_of(asked, chat, WIDE, 0.0)
    assert chat.backend.decode(asked.prompt) == (context or "") + text
    first = sequence.sampling.score_from
    assert asked.splits == [first]
    tokens = asked.prompt[first:]
    run.score_prompt(first, [Scored(token, -0.5 * n, 1, []) for n, token in enumerate(tokens, 1)])
    completion = Completion.model_validate_json(msgspec.json.encode(run.result(1.0).data), strict=True)
    (choice,) = completion.choices
    assert choice.logprobs.tokens == scored or len(choice.logprobs.tokens) > len(scored)
    assert choice.text == "".join(scored)
    assert choice.cumulative_logprob == pytest.approx(-0.5 * sum(range(1, len(tokens) + 1)))
    assert choice.logprobs.text_offset[0] == 0
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(asked.prompt), 0)


@pytest.mark.parametrize(
    ("request_", "field", "code", "says"),
    [
        (EmbeddingRequest(input=["a", "word " * 60]), "input", "context_length_exceeded", "context of 50"),
        (EmbeddingRequest(input=[[5], [50_000]]), "input[1][0]", "invalid_request", "below 50000"),
        (EmbeddingRequest(input=[50_000]), "input[0]", "invalid_request", "below 50000"),
        (EmbeddingRequest(input="a", dimensions=2), "dimensions", "invalid_request", "must be 3"),
        (ScoreRequest(text="word " * 60), "text", "context_length_exceeded", "context of 50"),
        (ScoreRequest(text=[5, 50_000]), "text[1]", "invalid_request", "below 50000"),
        (ScoreRequest(text=[5], context=[6, 50_000]), "context[1]", "invalid_request", "below 50000"),
        (ScoreRequest(text=[5]), "text", "invalid_request", "another one before it"),
        (ScoreRequest(text=[5], context=[]), "text", "invalid_request", "another one before it"),
    ],
)
def test_what_cannot_be_done_is_said(chat, request_, field, code, says):
    with pytest.raises(BadRequest, match=says) as caught:
        prompt_of(request_, chat, WIDE)
    assert (caught.value.body.param, caught.value.code) == (field, code)


def test_a_whole_context_may_be_read(chat):
    """Nothing has to follow."""
    assert entry(EmbeddingRequest(input=[5] * 50, dimensions=3), chat).prompt == [5] * 50
    _, ((sequence,),) = run_of(entry(ScoreRequest(text=[5] * 50), chat), chat, WIDE, 0.0)
    assert sequence.end_len == 50


@pytest.mark.parametrize(
    "request_",
    [EmbeddingRequest(input=["a", "b"], pooling="mean"), ScoreRequest(text=" b", context="a"), Request(prompt="a")],
)
def test_the_journal_keeps_every_kind(chat, request_):
    kept = msgspec.structs.replace(entry(request_, chat), listeners=[])
    row = ("alice/r1", 1.0, 1, 0, msgspec.msgpack.encode([]), body_of(kept), None)
    assert load(row, []) == kept


def test_bodies_of_earlier_releases_are_still_read(chat):
    """They had neither kinds nor splits."""
    kept = entry(Request(prompt="a"), chat)
    for missing in (2, 3):
        old = msgspec.msgpack.encode(msgspec.msgpack.decode(body_of(kept))[:-missing])
        assert load(("alice/r1", 1.0, 1, 0, msgspec.msgpack.encode([]), old, None), []) == kept


def test_the_same_text_asked_otherwise_is_another_request():
    requests = [
        EmbeddingRequest(input="a"),
        EmbeddingRequest(input="a", pooling="mean"),
        ScoreRequest(text="a"),
        Request(prompt="a"),
    ]
    assert len({digest("m", request) for request in requests}) == 4


def test_what_generates_nothing_is_estimated_as_such(chat):
    outlook = Outlook(8, lambda _: 1.0)
    asked = entry(EmbeddingRequest(input=[5, 6, 7]), chat)
    outlook.begin(asked)
    (rank,) = outlook._tenants["alice"].ranks.values()
    assert (rank.prompt, rank.output) == (3, 0)
    outlook.end(asked.id)
