"""Embeddings are transformers' own hidden states, and scores its log probabilities, whatever the batch does meanwhile."""

import random
from functools import cache

import numpy as np
import pytest
import torch

from protocol.plan import Sampling
from protocol.prefill import EmbeddingRequest
from scheduler.journal.entry import Entry
from scheduler.prefill import EmbeddingPrefill
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import SERVED, generate, tiny

MEAN, LAST = Sampling(pooling="mean"), Sampling(pooling="last")
TIGHT = {"running": 3, "budget": 9, "blocks": 16, "longest": 96, "prefix_cache": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


reference = cache(tiny)


@torch.inference_mode()
def hidden_states(kind: str, tokens: list[int]) -> torch.Tensor:
    """``[T, H]``, as AutoModel gives them."""
    ids = torch.tensor([tokens])
    return reference(kind).base_model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


@torch.inference_mode()
def logprobs(kind: str, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    return reference(kind)(ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)


def embedding(engine: LocalEngine, id: str, prompt: list[int], pooling: str, *, normalize: bool) -> np.ndarray:
    """What a tenant would get of what the engine told."""
    request = EmbeddingRequest(input=prompt, pooling=pooling, normalize=normalize)
    entry = Entry(id=id, model="m", request=request, prompt=prompt, seed=0, accepted_at=0.0, listeners=[])
    prefill = EmbeddingPrefill(entry=entry, accepted_at=0.0, lengths={id: len(prompt)})
    for start, part in engine.pooled[id]:
        prefill.pool(id, start, part)
    (vector,) = prefill.result(0.0).embeddings
    return np.array(vector)


def expect(engine: LocalEngine, kind: str, id: str, prompt: list[int]) -> None:
    states = hidden_states(kind, prompt).double().numpy()
    pooling = id.rstrip("0123456789")
    expected = states.mean(axis=0) if pooling == "mean" else states[-1]
    scale = np.abs(expected).max()
    assert embedding(engine, id, prompt, pooling, normalize=False) == pytest.approx(expected, abs=1e-5 * scale)
    vector = embedding(engine, id, prompt, pooling, normalize=True)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-6)
    assert vector == pytest.approx(expected / np.linalg.norm(expected), abs=1e-5)


@pytest.mark.parametrize("kind", sorted(SERVED))
def test_of_every_family_among_generations_in_chunks_with_preemptions_and_a_prefix_cache(kind):
    requests = workload(seed=5, count=10, vocab=97, longest_prompt=30, longest_output=12)
    beginning = requests[0][0][:17]
    prompts = [beginning + prompt for prompt, _ in requests]
    model = tiny(kind)
    expected = {f"text{n}": generate(model, prompts[n], length) for n, (_, length) in enumerate(requests) if n % 2 == 0}
    arrivals = random.Random(7)
    engine = LocalEngine(model, **TIGHT)
    for number, (_, length) in enumerate(requests):
        engine.submit(f"mean{number}", prompts[number], 0, MEAN)
        engine.submit(f"last{number}", prompts[number], 0, LAST)
        engine.submit(f"score{number}", prompts[number], 0, Sampling(prompt_logprobs=1, score_from=9))
        for _ in range(arrivals.randint(1, 4)):
            engine.step()
        if number % 2 == 0:  # whoever is being prefilled gives way
            engine.submit(f"text{number}", prompts[number], length, priority=1)
    outputs = engine.finish(ahead=2)
    assert {id: output for id, output in outputs.items() if output} == expected
    assert engine.batcher.counters.preemptions > 0
    assert engine.batcher.counters.cached_tokens > 0
    starts = [[start for start, _ in engine.pooled[f"mean{number}"]] for number in range(10)]
    assert max(map(len, starts)) > 4, "in several chunks"
    assert max(each.count(0) for each in starts) == 2, "one of them twice"
    for number, prompt in enumerate(prompts):
        expect(engine, kind, f"mean{number}", prompt)
        expect(engine, kind, f"last{number}", prompt)
        scored = engine.prompts[f"score{number}"]
        assert sorted(scored) == list(range(9, len(prompt)))
        by_model = logprobs(kind, prompt)
        for position, each in scored.items():
            assert each.token == prompt[position]
            assert each.logprob == pytest.approx(by_model[position - 1, each.token].item(), abs=1e-4)
    assert sorted(engine.completed) == sorted(f"{what}{n}" for what in ("mean", "last", "score") for n in range(10))


@pytest.mark.parametrize("lost", [False, True], ids=["a step failed", "the worker died"])
def test_after_a_failure_nothing_is_counted_twice_or_left_out(lost):
    """With a step in flight and another planned ahead, in the middle of every prompt."""
    prompts = [prompt for prompt, _ in workload(seed=3, count=6, vocab=97, longest_prompt=60)]
    engine = LocalEngine(tiny("llama"), running=6, budget=20)
    for number, prompt in enumerate(prompts):
        engine.submit(f"mean{number}", prompt, 0, MEAN)
        engine.submit(f"last{number}", prompt, 0, LAST)
    failures = 0
    while len(engine.batcher):
        result, ahead = engine.run_next(), engine.run_next()
        if failures < 4 and result is not None and ahead is not None:
            engine.apply(result)
            engine.batcher.fail(lost=lost)
            failures += 1
            continue
        for each in (result, ahead):
            if each is not None:
                engine.apply(each)
    assert failures == 4
    for number, prompt in enumerate(prompts):
        expect(engine, "llama", f"mean{number}", prompt)
        expect(engine, "llama", f"last{number}", prompt)


def test_the_numbers_are_the_same_to_the_bit_however_the_batch_is_made_up():
    """Where logits are: all layers of this model are ours."""
    requests = workload(seed=9, count=6, vocab=97, longest_prompt=80)
    asked = {"mean": MEAN, "last": LAST, "score": Sampling(prompt_logprobs=2)}
    told = []
    for together, limits in ((False, {"budget": 128}), (True, {"budget": 128}), (True, TIGHT), (True, {"budget": 9})):
        engine = LocalEngine(tiny("llama"), **limits)
        for number, (prompt, length) in enumerate(requests):
            if together:
                engine.submit(f"text{number}", prompt, min(length, 12))
            for what, sampling in asked.items():
                engine.submit(f"{what}{number}", prompt, 0, sampling)
                if not together:
                    engine.finish()
        engine.finish(ahead=2)
        vectors = [
            embedding(engine, f"{what}{number}", prompt, what, normalize=True).tolist()
            for number, (prompt, _) in enumerate(requests)
            for what in ("mean", "last")
        ]
        told.append((vectors, engine.prompts))
    assert all(each == told[0] for each in told)


def test_scores_take_memory_for_a_few_places_only():
    """However long the chunk: it is the vocabulary that makes logits large."""
    engine = LocalEngine(tiny("llama"), budget=128)
    draw = random.Random(1)
    prompt = [draw.randrange(3, 97) for _ in range(120)]
    shapes: list[tuple[int, ...]] = []
    head = engine.runner._module.lm_head
    head.register_forward_hook(lambda _module, inputs, _output: shapes.append(tuple(inputs[0].shape[:-1])))
    engine.submit("score", prompt, 0, Sampling(prompt_logprobs=0))
    engine.finish()
    assert len(engine.prompts["score"]) == 119
    assert shapes == [(1, 0), (1, 64), (1, 55)]


def test_the_head_of_a_model_that_caps_its_logits_is_its_own():
    """Gemma's scores can't come of its last layer alone."""
    engine = LocalEngine(tiny("gemma2", final_logit_softcapping=1.5), budget=64)
    prompt = [5, 6, 7, 8, 9, 10]
    engine.submit("score", prompt, 0, Sampling(prompt_logprobs=0))
    engine.finish()
    with torch.inference_mode():
        expected = tiny("gemma2", final_logit_softcapping=1.5)(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for position, each in engine.prompts["score"].items():
        assert each.logprob == pytest.approx(expected[position - 1, each.token].item(), abs=1e-4)
