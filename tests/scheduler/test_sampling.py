"""What a request asks for, as the worker is told it: the model's defaults where it says nothing, no token id that isn't one."""

import msgspec
import pytest

from protocol.errors import BadRequest
from protocol.plan import Sampling
from protocol.request import Request
from scheduler.generation import check_fits
from scheduler.sampling import sampling_of
from tests.scheduler.test_generation import INFO
from tests.scheduler.test_text import byte_tokenizer

MODEL = msgspec.structs.replace(
    INFO, eos_ids=[2, 300], sampling=Sampling(0.7, 40, 0.9, typical_p=0.95, repetition_penalty=1.1)
)
TOKENIZER = byte_tokenizer()


def sampling(**fields) -> Sampling:
    return sampling_of(Request(prompt="x", **fields), 5, MODEL, TOKENIZER)


def test_a_request_that_says_nothing_is_drawn_as_the_model_says():
    assert sampling() == Sampling(0.7, 40, 0.9, 0.0, 5, 0.95, 1.1)


def test_what_a_request_says_counts_even_where_it_says_off():
    asked = sampling(temperature=0.0, top_k=-1, top_p=1.0, min_p=0.1, typical_p=1.0, repetition_penalty=1.0)
    assert asked == Sampling(0.0, -1, 1.0, 0.1, 5)


def test_all_that_has_no_default():
    asked = sampling(
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"7": 1.5, "0": -100.0},
        min_tokens=3,
        stop_token_ids=[9, 2, 10_000],
        logprobs=4,
        prompt_logprobs=0,
    )
    assert (asked.presence_penalty, asked.frequency_penalty) == (0.5, -0.5)
    assert asked.logit_bias == ((7, 1.5), (0, -100.0))
    assert (asked.min_tokens, asked.stop_ids) == (3, (2, 9)), "ids that can't be drawn needn't be kept from it"
    assert (asked.logprobs, asked.prompt_logprobs) == (4, 0)
    assert sampling(min_tokens=3, ignore_eos=True).stop_ids == ()
    assert sampling(stop_token_ids=[9]).stop_ids == (), "nothing to keep from being drawn"


def test_bad_words_are_split_as_the_tokenizer_does_alone_and_after_a_space():
    a, b, space = (TOKENIZER.token_to_id(piece) for piece in ("a", "b", "Ġ"))
    assert sampling(bad_words=["ab", " ab", "a"]).bad_words == ((a, b), (space, a, b), (a,), (space, a))
    few = msgspec.structs.replace(MODEL, vocab_size=b)
    assert sampling_of(Request(prompt="x", bad_words=["ab", "a"]), 5, few, TOKENIZER).bad_words == ((a,),)


@pytest.mark.parametrize(
    ("fields", "field", "says"),
    [
        ({"logit_bias": {"3": 1.0, "256": 1.0}}, "logit_bias", "256 is no token id: those are below 256"),
        ({"min_tokens": 999}, "min_tokens", "at most 998"),
    ],
)
def test_what_no_answer_could_satisfy_is_refused_by_name(fields, field, says):
    with pytest.raises(BadRequest, match=says) as caught:
        check_fits(Request(prompt="x", **fields), [1, 2], INFO)
    assert caught.value.body.param == field
    check_fits(Request(prompt="x", logit_bias={"255": 1.0}, min_tokens=998), [1, 2], INFO)
