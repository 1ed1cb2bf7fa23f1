"""Structured output from a real step: what is sampled follows its grammar, beside rows without one, after a preemption too."""

import json
import re
import threading
from pathlib import Path

import jsonschema
import msgspec
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedModel

from benchmarks.structured import read_schemas
from protocol.chat import Function, FunctionChoice, Message, NamedTool, Tool
from protocol.errors import BadRequest
from protocol.plan import NO_TOKEN, Admission, Sampling
from protocol.request import Request
from protocol.structure import StructuredOutputs
from scheduler.journal.entry import sequence_id
from scheduler.sampling import seed_of
from scheduler.structure import check_grammar, grammar_for
from scheduler.tools import FORCED, ToolParser
from tests.scheduler.test_text import byte_tokenizer
from tests.workers.engine import LocalEngine
from tests.workers.models import tiny
from tests.workers.test_scores import check, reference
from workers.grammar import Grammars

TOKENIZER = byte_tokenizer()
TOKENIZER.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<pad>", special=True)])
EOS = TOKENIZER.token_to_id("<eos>")
VOCAB = TOKENIZER.get_vocab_size()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(str(folder / "tokenizer.json"))
    return folder


def model() -> PreTrainedModel:
    model = tiny("llama", vocab_size=VOCAB, max_position_embeddings=1024)
    model.generation_config.eos_token_id = EOS
    return model


def engine(folder: Path, **sizes) -> LocalEngine:
    return LocalEngine(model(), tokenizer=folder, **{"longest": 256, "blocks": 1024, **sizes})


def grammar(**outputs) -> str:
    request = Request(prompt="a", structured_outputs=StructuredOutputs(**outputs))
    check_grammar(request)
    return grammar_for(request)


def submit(engine: LocalEngine, id: str, grammar: str | None, length: int = 200, seed: int = 0) -> None:
    sampling = Sampling(temperature=1.0, seed=seed, grammar=grammar)
    engine.submit(id, [1, 2, 3], length, sampling, stop=frozenset({EOS, NO_TOKEN}))


def text(tokens: list[int]) -> str:
    assert tokens[-1] == EOS
    return TOKENIZER.decode(tokens[:-1], skip_special_tokens=False)


def test_every_schema_of_the_collection_is_followed_or_refused(folder):
    """Whatever a random model would rather write, a finished text is JSON of its schema."""
    served, refused = {}, 0
    for number, schema in enumerate(read_schemas()):
        try:
            served[str(number)] = schema, grammar(json=schema)
        except BadRequest as error:
            assert error.body.param == "structured_outputs"
            refused += 1
    assert len(served) >= 200
    assert refused
    local = engine(folder, running=32, budget=64)
    for number, (_, text_of_grammar) in served.items():
        submit(local, number, text_of_grammar, length=120, seed=int(number))
    finished = 0
    for number, tokens in local.finish().items():
        assert NO_TOKEN not in tokens, served[number]
        if tokens[-1] == EOS:
            finished += 1
            jsonschema.validate(json.loads(text(tokens)), served[number][0])
    assert finished > len(served) / 2


def test_regex_choice_and_grammar(folder):
    local = engine(folder)
    submit(local, "regex", grammar(regex="[0-9]{3}-[ab]+c"))
    submit(local, "choice", grammar(choice=["yes", 'no "thanks"', "🚌"]))
    submit(local, "grammar", grammar(grammar='start: "(" start ")" | "x"'))
    outputs = local.finish()
    head, _, tail = text(outputs["regex"]).partition("-")
    assert head.isdigit()
    assert set(tail) <= set("abc")
    assert text(outputs["choice"]) in ("yes", 'no "thanks"', "🚌")
    nested = text(outputs["grammar"])
    assert nested == "(" * nested.count("(") + "x" + ")" * nested.count("(")


WEATHER = Function(
    "weather",
    parameters={
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", "Rome"]}},
    },
)


@pytest.mark.parametrize(
    ("choice", "parallel", "names"),
    [
        ("required", True, {"weather", "time"}),
        ("required", False, {"weather", "time"}),
        (NamedTool(FunctionChoice("weather")), True, {"weather"}),
    ],
)
def test_a_call_that_is_forced_is_a_call_of_its_schema(folder, choice, parallel, names):
    request = Request(
        messages=[Message("user", "Hi")],
        tools=[Tool(WEATHER), Tool(Function("time"))],
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )
    check_grammar(request)
    local = engine(folder)
    for seed in range(8):
        submit(local, str(seed), grammar_for(request), seed=seed)
    numbers = set()
    for tokens in local.finish().values():
        said = ToolParser(FORCED, ["weather", "time"], "a/b").parse(text(tokens), complete=True)
        assert said.content == ""
        numbers.add(len(said.calls))
        for call in said.calls:
            assert call.function.name in names
            assert (call.function.name == "time") == (call.function.decoded() == {})
            if call.function.name == "weather":
                jsonschema.validate(call.function.decoded(), WEATHER.parameters)
    assert (numbers == {1}) == (not parallel or names == {"weather"})


def test_rows_without_a_grammar_are_not_touched(folder):
    alone, beside = engine(folder), engine(folder)
    submit(alone, "free", None, length=30)
    submit(beside, "free", None, length=30)
    submit(beside, "bound", grammar(regex="a{40}"))
    assert alone.finish()["free"] == beside.finish()["free"]
    assert text(beside.outputs["bound"]) == "a" * 40


def test_a_slot_forgets_the_grammar_of_its_last_sequence(folder):
    local = engine(folder, running=1)
    submit(local, "bound", grammar(regex="a{3}"))
    submit(local, "free", None, length=30)
    assert set(local.finish()["free"]) != {TOKENIZER.encode("a").ids[0]}


def test_after_a_preemption_the_grammar_goes_on_where_the_output_is(folder):
    schema = {"type": "array", "items": {"enum": ["one", "two", "three"]}, "minItems": 6, "maxItems": 8}
    roomy, tight = engine(folder), engine(folder, blocks=14, longest=100)
    for local in (roomy, tight):
        for number in range(6):
            submit(local, str(number), grammar(json=schema), length=90, seed=number)
    assert tight.finish() == roomy.finish()
    assert tight.batcher.counters.preemptions > 0
    assert roomy.batcher.counters.preemptions == 0
    for tokens in tight.outputs.values():
        jsonschema.validate(json.loads(text(tokens)), schema)


def test_scores_are_the_model_s_own_whatever_is_allowed(folder):
    local = engine(folder)
    sampling = Sampling(temperature=1.0, seed=1, grammar=grammar(regex="[ab]{12}"), logprobs=2)
    local.submit("bound", [1, 2, 3], 20, sampling, stop=frozenset({EOS, NO_TOKEN}))
    output = local.finish()["bound"]
    assert [each.token for each in local.scored["bound"]] == output
    expected = reference(model(), [1, 2, 3, *output])
    for position, scored in enumerate(local.scored["bound"], start=3):
        check(scored, expected[position - 1], 2)
    assert any(scored.rank > 2 for scored in local.scored["bound"]), (
        "the model would rather have written something else"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 3, "top_p": 0.5, "min_p": 0.2, "typical_p": 0.3},
        {"repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": -2.0, "temperature": 2.0},
        {"logit_bias": ((5, 100.0), (6, -100.0)), "bad_words": ((7,), (8, 9)), "temperature": 0.0},
    ],
    ids=["filters", "penalties", "bias and bans"],
)
def test_whatever_else_is_done_to_its_logits_a_sequence_keeps_to_its_grammar(folder, fields):
    local = engine(folder)
    for seed in range(4):
        sampling = Sampling(
            **{"temperature": 1.0, **fields}, seed=seed, grammar=grammar(regex="[a-c]{4}(-[0-9]{2}){3}")
        )
        local.submit(str(seed), [1, 2, 3], 60, sampling, stop=frozenset({EOS, NO_TOKEN}))
    for tokens in local.finish().values():
        assert re.fullmatch("[a-c]{4}(-[0-9]{2}){3}", text(tokens))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_bad_words_leave_nothing_its_own_sequence_ends_alone(folder, temperature):
    local = engine(folder)
    (banned,) = TOKENIZER.encode("b").ids
    sampling = Sampling(temperature, grammar=grammar(regex="a{3}b"), bad_words=((banned,),))
    local.submit("lost", [1, 2, 3], 20, sampling, stop=frozenset({EOS, NO_TOKEN}))
    submit(local, "bound", grammar(regex="a{5}"))
    outputs = local.finish()
    assert outputs["lost"] == [*TOKENIZER.encode("aaa").ids, NO_TOKEN]
    assert text(outputs["bound"]) == "aaaaa"


ITEMS = {"type": "array", "items": {"enum": ["one", "two", "three"]}, "minItems": 6, "maxItems": 8}


@pytest.mark.parametrize("by", ["ngram", "model"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafts_change_nothing_of_what_a_grammar_allows(folder, by, temperature):
    """Beside a row without one, among preemptions, with the next step planned before the drafts are judged."""
    drafting = engine(
        folder, blocks=24, longest=120, prefix_cache=True, draft="ngram" if by == "ngram" else model(), max_draft=4
    )
    plain = engine(folder)
    for local in (plain, drafting):
        local.submit("free", [1, 2, 3] * 6, 60)
        for seed in range(6):
            rule = grammar(json=ITEMS) if seed % 2 else grammar(regex="(ab){20}|c{40}")
            sampling = Sampling(temperature, seed=seed, grammar=rule)
            local.submit(str(seed), [1, 2, 3], 90, sampling, stop=frozenset({EOS, NO_TOKEN}))
        local.finish(ahead=2)
    assert drafting.outputs == plain.outputs
    assert drafting.batcher.counters.preemptions > 0
    assert sum(accepted for accepted, _ in drafting.accepted) > 20


@pytest.mark.parametrize("by", ["ngram", "model"])
def test_eight_texts_of_one_prompt_follow_its_grammar_with_drafts_as_without(folder, by):
    draft = "ngram" if by == "ngram" else model()
    drafting, plain = engine(folder, draft=draft, max_draft=4), engine(folder)
    rule, stop = "(one|two|three)(,(one|two|three)){5,7}", frozenset({EOS, NO_TOKEN})
    sampling = Sampling(1.0, seed=1, grammar=grammar(regex=rule))
    drafting.submit("several", [1, 2, 3] * 6, 90, sampling, stop, choices=8)
    for index in range(8):
        alone = msgspec.structs.replace(sampling, seed=seed_of(1, index))
        plain.submit(sequence_id("several", index), [1, 2, 3] * 6, 90, alone, stop)
    assert drafting.finish(ahead=2) == plain.finish()
    texts = [text(tokens) for tokens in plain.outputs.values()]
    assert len(set(texts)) == 8
    assert all(re.fullmatch(rule, each) for each in texts)
    assert drafting.batcher.counters.forked_tokens == 7 * 17
    assert drafting.accepted, "something was drafted"


def test_a_sequence_with_a_grammar_is_drafted_for(folder):
    local = engine(folder, draft="ngram")
    submit(local, "bound", grammar(regex="(ab){30}"))
    steps = 0
    while local.step():
        steps += 1
    assert text(local.outputs["bound"]) == "ab" * 30
    accepted = sum(accepted for accepted, _ in local.accepted)
    assert accepted > 30
    assert steps == 61 - accepted


def test_drafts_that_the_grammar_forbids_are_not_computed(folder):
    local = engine(folder, draft="ngram")
    prompt = TOKENIZER.encode("abababababxabababababy").ids
    sampling = Sampling(grammar=grammar(regex="(ab){3}c"))
    local.submit("bound", prompt, 20, sampling, stop=frozenset({EOS, NO_TOKEN}))
    assert text(local.finish()["bound"]) == "abababc"
    assert local.batcher.counters.rejected_tokens == 0
    assert sum(accepted for accepted, _ in local.accepted) > 0


#: One token of it is too many Earley items.
COMPLEX = "start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(1900)) + 'a1900: "x"'


@pytest.mark.parametrize("lark", ['start: "a" <|nobody_knows_this|>', COMPLEX], ids=["unknown token", "too complex"])
def test_a_grammar_that_this_model_can_not_follow_ends_its_own_sequence_alone(folder, lark):
    local = engine(folder)
    submit(local, "lost", grammar(grammar=lark))
    submit(local, "bound", grammar(regex="a{5}"))
    outputs = local.finish()
    assert outputs["lost"][-1] == NO_TOKEN
    assert text(outputs["bound"]) == "aaaaa"


def test_masks_are_found_while_the_forward_pass_runs(folder, monkeypatch):
    """They come once it is over; who waited for them before that would wait in vain."""
    computed = threading.Event()
    look = Grammars._look

    def late(self, looks):
        assert computed.wait(20)
        return look(self, looks)

    monkeypatch.setattr(Grammars, "_look", late)
    local = engine(folder, draft="ngram")
    local.runner._module.register_forward_pre_hook(lambda *_: computed.clear())
    local.runner._module.register_forward_hook(lambda *_: computed.set())
    submit(local, "bound", grammar(regex="(ab){8}"))
    assert text(local.finish()["bound"]) == "ab" * 8
    assert sum(accepted for accepted, _ in local.accepted) > 0


def test_where_looking_ahead_fails_the_text_goes_on_if_it_goes_elsewhere(folder):
    """What may follow the draft "x" can't be found out; the model writes something else."""
    rule = grammar(grammar=COMPLEX.replace("start: a0", 'start: "a" start | "x" a0 | "b"'))
    a, b, x = (TOKENIZER.encode(letter).ids[0] for letter in "abx")
    grammars = Grammars(folder, VOCAB, [EOS])
    grammars.assign(Admission(0, [1], Sampling(grammar=rule), 1))
    assert grammars.check({0: [a, x, b]}) == {0: [a, x]}
    mask = grammars.mask([0, 0, 0], {0: [a, x]})
    assert mask.told([a, b, b]) == [a, b, NO_TOKEN]
    grammars.advance([(0, [a, b])])
    assert grammars.mask([0], {}).told([EOS]) == [EOS]


def test_tokens_planned_ahead_of_an_end_do_no_harm(folder):
    """The step after the end token is on its way before anybody knows of the end."""
    local = engine(folder)
    submit(local, "bound", grammar(regex="ab"))
    plans = [local.batcher.plan(), local.batcher.plan()]
    while plans[0] is not None:
        result = local.runner.step(plans.pop(0))
        for event in local.batcher.apply(result.step, result.tokens):
            local.outputs[event.id].append(event.token)
        plans.append(local.batcher.plan() if plans[0] is not None else None)
    assert text(local.outputs["bound"]) == "ab"
    assert local.batcher.counters.late_tokens == 1
