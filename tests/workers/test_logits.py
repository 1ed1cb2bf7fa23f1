"""What is done to logits: equal to transformers' own processors, in batches where every row asks for another mix."""

from collections.abc import Iterator

import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.plan import Sampling
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import tiny
from tests.workers.rows import rows
from workers.sampler import Sampler

VOCAB = 40
CPU = torch.device("cpu")
tokens = st.integers(0, VOCAB - 1)
#: Each field at its neutral value or at another, so that a batch holds rows with nothing, one or many of them.
mixes = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1.0, 0.3, 0.9, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.1, 0.7, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.4]),
    typical_p=st.sampled_from([1.0, 1.0, 0.2, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.5, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.5, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.2, 2.0]),
    logit_bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=4).map(
        lambda bias: tuple(bias.items())
    ),
    min_tokens=st.integers(0, 6),
    stop_ids=st.lists(tokens, max_size=3, unique=True).map(tuple),
    bad_words=st.lists(st.lists(tokens, min_size=1, max_size=4).map(tuple), max_size=4, unique=True).map(tuple),
)


@st.composite
def sequences(draw) -> tuple[list[int], int, Sampling]:
    """Tokens, how many of them are the prompt, and parameters whose bad words are likely to be half there."""
    past = draw(st.lists(tokens, min_size=1, max_size=12))
    sampling = draw(mixes)
    if draw(st.booleans()):
        begun = tuple(past[-draw(st.integers(1, 3)) :])
        sampling = Sampling(**(fields(sampling) | {"bad_words": ((*begun, draw(tokens)), *sampling.bad_words)}))
    return past, draw(st.integers(1, len(past))), sampling


def fields(sampling: Sampling) -> dict:
    return {name: getattr(sampling, name) for name in sampling.__struct_fields__}


def expected(logits: torch.Tensor, past: list[int], prompt_len: int, sampling: Sampling) -> torch.Tensor:
    """transformers' processors one after the other, in the order of its ``generate``; logits ``[1, V]``."""
    for processor in [*processors(past, prompt_len, sampling), *(warpers(sampling) if sampling.temperature else [])]:
        logits = processor(torch.tensor([past]), logits)
    return logits


def processors(past: list[int], prompt_len: int, sampling: Sampling) -> Iterator:
    if sampling.logit_bias:
        yield transformers.SequenceBiasLogitsProcessor({(token,): float(bias) for token, bias in sampling.logit_bias})
    if sampling.repetition_penalty != 1:
        yield transformers.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    yield lambda _, scores: openai_penalties(scores, past[prompt_len:], sampling)
    if sampling.bad_words:
        yield transformers.NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words])
    if sampling.min_tokens and sampling.stop_ids:
        yield transformers.MinNewTokensLengthLogitsProcessor(prompt_len, sampling.min_tokens, list(sampling.stop_ids))


def warpers(sampling: Sampling) -> Iterator:
    yield transformers.TemperatureLogitsWarper(sampling.temperature)
    if sampling.top_k:
        yield transformers.TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1:
        yield transformers.TopPLogitsWarper(sampling.top_p)
    if sampling.min_p:
        yield transformers.MinPLogitsWarper(sampling.min_p)
    if sampling.typical_p < 1:
        yield transformers.TypicalLogitsWarper(sampling.typical_p)


def openai_penalties(scores: torch.Tensor, output: list[int], sampling: Sampling) -> torch.Tensor:
    """The formula of OpenAI's API reference, which transformers has no processor for."""
    scores = scores.clone()
    for token in set(output):
        scores[0, token] -= output.count(token) * sampling.frequency_penalty + sampling.presence_penalty
    return scores


@given(batch=st.lists(sequences(), min_size=1, max_size=8), seed=st.integers(0, 1 << 32), fill=tokens)
@settings(deadline=None, max_examples=100)
def test_every_row_of_a_batch_as_transformers_own_processors(batch, seed, fill):
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    sampler = Sampler(len(batch), CPU)
    slots = list(reversed(range(len(batch))))
    for slot, (_, _, sampling) in zip(slots, batch, strict=True):
        sampler.assign(slot, mixes_before(sampling))
        sampler.assign(slot, sampling)
    processed = sampler.process(logits.clone(), rows(slots, [(past, length) for past, length, _ in batch], fill))
    for row, (past, prompt_len, sampling) in enumerate(batch):
        wanted = expected(logits[row : row + 1], past, prompt_len, sampling)[0]
        if wanted.isneginf().all():
            continue  # nothing may come: then what comes is anybody's guess, in transformers too
        assert torch.equal(processed[row].isneginf(), wanted.isneginf()), sampling
        torch.testing.assert_close(processed[row].softmax(-1), wanted.softmax(-1), rtol=1e-5, atol=1e-5)
        # Equal but for the shift of the temperature.
        finite = wanted.isfinite()
        shift = (processed[row] - wanted)[finite]
        torch.testing.assert_close(shift, shift[:1].expand_as(shift), rtol=1e-5, atol=1e-4)


def mixes_before(sampling: Sampling) -> Sampling:
    """What another sequence had in the slot: nothing of it may stay."""
    if sampling.temperature:
        return Sampling()
    return Sampling(0.5, 3, 0.5, 0.5, 7, 0.5, 2.0, 1.0, 1.0, ((1, 50.0),), 9, (0,), ((1,), (2, 3)))


def test_several_rows_of_one_slot_each_have_their_own_past():
    sampling = Sampling(
        repetition_penalty=1.5, frequency_penalty=0.5, bad_words=((4, 5, 6),), min_tokens=3, stop_ids=(7,)
    )
    past = [1, 2, 4, 5, 4, 5, 9]
    sampler = Sampler(3, CPU)
    sampler.assign(2, sampling)
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    batch = rows([2] * 4, [(past[:length], 2) for length in (4, 5, 6, 7)])
    processed = sampler.process(logits.clone(), batch)
    for row, length in enumerate((4, 5, 6, 7)):
        wanted = expected(logits[row : row + 1], past[:length], 2, sampling)
        torch.testing.assert_close(processed[row : row + 1], wanted)


def test_a_bad_word_longer_than_all_that_came_is_not_half_there():
    sampler = Sampler(1, CPU)
    sampler.assign(0, Sampling(bad_words=((5, 5, 7), (5, 8))))
    processed = sampler.process(torch.zeros(1, VOCAB), rows([0], [([5], 1)]))
    assert processed.isneginf().nonzero().tolist() == [[0, 8]]


#: One parameter at a time, then all; on a vocabulary of twelve tokens.
DRAWN = {
    "temperature": Sampling(temperature=0.6),
    "top_k": Sampling(1.0, top_k=4),
    "top_p": Sampling(1.0, top_p=0.8),
    "min_p": Sampling(1.0, min_p=0.2),
    "typical_p": Sampling(1.0, typical_p=0.7),
    "repetition_penalty": Sampling(1.0, repetition_penalty=1.6),
    "presence_penalty": Sampling(1.0, presence_penalty=1.2),
    "frequency_penalty": Sampling(1.0, frequency_penalty=0.8),
    "logit_bias": Sampling(1.0, logit_bias=((3, 1.5), (5, -100.0))),
    "min_tokens": Sampling(1.0, min_tokens=9, stop_ids=(2, 7)),
    "bad_words": Sampling(1.0, bad_words=((1,), (6, 6, 8), (6, 9))),
    "everything": Sampling(1.3, 10, 0.97, 0.02, 0, 0.95, 1.2, 0.3, -0.2, ((3, 1.0),), 9, (2,), ((1,), (6, 6, 8))),
}


def test_what_is_drawn_has_the_distribution_that_each_parameter_asks_for():
    draws, vocab = 2000, 12
    past, prompt_len = [0, 3, 3, 5, 6, 6], 2
    logits = torch.randn(len(DRAWN), vocab, generator=torch.Generator().manual_seed(5)) * 1.5
    slots = list(range(len(DRAWN) * draws))
    sampler = Sampler(len(slots), CPU)
    for slot, mix in zip(slots, list(DRAWN.values()) * draws, strict=True):
        sampler.assign(slot, Sampling(**(fields(mix) | {"seed": slot + 77})))
    drawn = sampler.sample(logits.repeat(draws, 1), rows(slots, [(past, prompt_len)] * len(slots)))
    for number, (name, mix) in enumerate(DRAWN.items()):
        wanted = expected(logits[number : number + 1], past, prompt_len, mix).softmax(-1)[0] * draws
        counts = torch.bincount(drawn[number :: len(DRAWN)], minlength=vocab)
        possible = wanted > 0
        assert counts[~possible].sum() == 0, name
        chi_square = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum().item()
        assert chi_square < 35, name  # 99.98% with 11 degrees of freedom, fewer where tokens are cut


def test_greedy_text_with_everything_on_is_that_of_transformers_own_generate():
    model = tiny("llama")
    asked = {
        "repetition_penalty": ({"repetition_penalty": 1.4}, Sampling(repetition_penalty=1.4)),
        "bad words": ({"bad_words_ids": [[5], [8, 9]]}, Sampling(bad_words=((5,), (8, 9)))),
        "bias": ({"sequence_bias": [[[11], 2.5]]}, Sampling(logit_bias=((11, 2.5),))),
        "least": ({"min_new_tokens": 12, "eos_token_id": [40, 41]}, Sampling(min_tokens=12, stop_ids=(40, 41))),
    }
    prompts = [prompt for prompt, _ in workload(seed=2, count=len(asked), vocab=97)]
    plain = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0}
    wanted = {}
    for prompt, (name, (options, _)) in zip(prompts, asked.items(), strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **({"eos_token_id": []} | plain | options))
        wanted[name] = out[0, len(prompt) :].tolist()
    engine = LocalEngine(model, budget=32)
    for prompt, (name, (_, sampling)) in zip(prompts, asked.items(), strict=True):
        engine.submit(name, prompt, 24, sampling, frozenset(sampling.stop_ids))
    assert engine.finish() == wanted
