"""Drafts change when tokens come, never which: the same greedy tokens, the same draws, the model's own distribution."""

import numpy as np
import pytest
import torch

from protocol.plan import Sampling, Verdict
from tests.workers.configs import worker_config
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import generate, save, tiny
from workers.__main__ import start
from workers.drafts import judge, look_up
from workers.model import ModelRefused
from workers.ranks import Ranks


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draft(by: str, kind: str, **overrides):
    """N-gram look-up, or a model that agrees with this one now and then."""
    if by == "ngram":
        return by
    model, generator = tiny(kind, **overrides), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * parameter.std()
        parameter.data += 0.05 * noise.nan_to_num()
    return model


@pytest.mark.parametrize(
    ("drafts", "sampled", "tokens"),
    [
        ([], [5], [5]),
        ([5, 6], [5, 6, 7], [5, 6, 7]),
        ([5, 6], [5, 8, 7], [5, 8]),
        ([5, 6], [8, 6, 7], [8]),
    ],
)
def test_drafts_are_accepted_up_to_the_first_that_was_not_drawn(drafts, sampled, tokens):
    verdict = judge(sampled, drafts)
    assert verdict == Verdict(len(drafts), tokens)
    assert verdict.accepted == len(tokens) - 1


@pytest.mark.parametrize(
    ("text", "most", "found"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 4, 5, 1, 2], 9, [3, 4, 5, 1, 2]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 2, [4, 9]),  # the last time
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1, [3]),  # the longer ending
        ([1, 2, 1, 2, 1, 2], 4, [1, 2]),  # too short every time: the first, which is the longest
        ([1, 2, 3, 4], 3, []),
        ([2, 2], 3, []),
        ([1], 3, []),
        ([1, 2, 1, 2], 0, []),
    ],
)
def test_look_up_finds_what_followed_the_same_ending(text, most, found):
    assert look_up(np.array(text, dtype=np.int32), most).tolist() == found


@pytest.mark.parametrize("by", ["ngram", "model"])
@pytest.mark.parametrize(("kind", "attention"), [("llama", "cpu"), ("gpt_oss", "reference")])
def test_greedy_tokens_are_those_of_generate_in_fewer_steps(kind, attention, by):
    """Among preemptions, with the next step planned before the drafts are judged."""
    model = tiny(kind)
    requests = [(prompt, length + 24) for prompt, length in workload(5, 6, 97, longest_prompt=24)]
    expected = {str(index): generate(model, prompt, length) for index, (prompt, length) in enumerate(requests)}
    engine = LocalEngine(
        model,
        attention=attention,
        running=5,
        budget=40,
        blocks=18,
        longest=100,
        prefix_cache=True,
        draft=draft(by, kind),
    )
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
    assert engine.finish(ahead=2) == expected
    counters = engine.batcher.counters
    assert counters.preemptions > 0
    accepted = sum(accepted for accepted, _ in engine.accepted)
    assert accepted > 0
    assert counters.rejected_tokens == sum(drafted for _, drafted in engine.accepted) - accepted > 0


@pytest.mark.parametrize("by", ["ngram", "model"])
def test_a_seed_gives_the_same_tokens_with_drafts(by):
    flat = {"initializer_range": 0.1}
    model = tiny("llama", **flat)
    mixes = [Sampling(0.4), Sampling(1.0, 3), Sampling(0.8, 0, 0.3), Sampling(0.7, 0, 1.0, 0.3), Sampling()]
    runs = []
    for way in (None, draft(by, "llama", **flat)):
        engine = LocalEngine(model, running=5, budget=40, draft=way)
        for index, mix in enumerate(mixes):
            sampling = Sampling(mix.temperature, mix.top_k, mix.top_p, mix.min_p, seed=50 + index)
            engine.submit(str(index), [*range(3, 12), *range(3, 9)], 60, sampling)
        runs.append(engine.finish(ahead=2))
    assert runs[0] == runs[1]
    assert sum(accepted for accepted, _ in engine.accepted) > 0


def test_what_is_drawn_with_drafts_has_the_distribution_of_the_model():
    """Three tokens after the same prompt, over many seeds, against their exact joint distribution."""
    vocab, draws = 6, 3000
    flat = {"vocab_size": vocab, "initializer_range": 0.08}
    prompt = [3, 4, 5, 3, 4, 5, 3, 4]
    engine = LocalEngine(
        tiny("llama", **flat),
        running=64,
        budget=600,
        blocks=200,
        longest=16,
        prefix_cache=True,
        draft="ngram",
        cheap=600,
    )
    for seed in range(draws):
        engine.submit(str(seed), prompt, 4, Sampling(0.9, seed=seed))
    outputs = engine.finish()
    counts = torch.zeros(vocab, vocab, vocab)
    for output in outputs.values():
        counts[tuple(output[:3])] += 1
    expected = draws * joint(tiny("llama", **flat), prompt, 0.9)
    # Rare triples count as one: the approximation wants five or so in each.
    rare = expected < 6
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    cells = len(wanted)
    chi_square = float(((seen - wanted) ** 2 / wanted).sum())
    assert cells > 20
    assert chi_square < cells - 1 + 3.1 * (2 * (cells - 1)) ** 0.5  # 99.9% of chi-square, about
    accepted = sum(accepted for accepted, _ in engine.accepted)
    assert draws / 20 < accepted < sum(drafted for _, drafted in engine.accepted) - draws / 20


@torch.inference_mode()
def joint(model, prompt: list[int], temperature: float) -> torch.Tensor:
    """Exact probabilities ``[V, V, V]`` of the three tokens after a prompt."""
    vocab = model.config.vocab_size
    pairs = torch.cartesian_prod(torch.arange(vocab), torch.arange(vocab))
    logits = model(torch.cat([torch.tensor(prompt).expand(len(pairs), -1), pairs], dim=1)).logits[:, len(prompt) - 1 :]
    first, second, third = (logits.double() / temperature).softmax(-1).unflatten(0, (vocab, vocab)).unbind(2)
    return (first[0, 0][:, None, None] * second[:, 0][:, :, None] * third).float()


def test_a_model_that_drafts_for_itself_is_always_right():
    """Its KV must then be that of the model, whoever was preempted and whatever was found in the prefix cache."""
    beginning = list(range(5, 30))
    engine = LocalEngine(
        tiny("llama"), running=4, budget=24, blocks=20, longest=100, prefix_cache=True, draft=tiny("llama"), max_draft=4
    )
    for index in range(8):
        engine.submit(str(index), [*beginning, 40 + index], 30)
    engine.finish(ahead=2)
    assert engine.batcher.counters.preemptions > 0
    assert engine.batcher.counters.cached_tokens > 0
    assert engine.batcher.counters.rejected_tokens == 0
    assert sum(accepted for accepted, _ in engine.accepted) > 100


def test_a_stop_token_among_accepted_drafts_ends_the_text():
    model = tiny("llama")
    text = generate(model, [5, 6, 7], 40)
    stop = next(token for token in text[12:] if text.index(token) >= 12)
    plain, drafting = LocalEngine(model), LocalEngine(model, draft=tiny("llama"), max_draft=7)
    for engine in (plain, drafting):
        engine.submit("a", [5, 6, 7], 40, stop=frozenset({stop}))
    assert plain.finish() == drafting.finish(ahead=2) == {"a": text[: text.index(stop) + 1]}
    assert drafting.batcher.counters.late_tokens > 0


def test_a_draft_model_of_another_vocabulary_is_refused(tmp_path):
    model = save(tiny("llama"), tmp_path / "model")
    other = save(tiny("llama", vocab_size=50), tmp_path / "draft")
    config = worker_config(model, speculation=str(other))
    with pytest.raises(ModelRefused, match="has 50 tokens and the model 97"):
        start(config, Ranks(1))
