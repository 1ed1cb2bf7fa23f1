"""Greedy tokens are those of transformers' own generate, whatever shares the batch, however it is cut, whoever is preempted."""

import random

import pytest
import torch

from scheduler.core import policies
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import SERVED, generate, tiny


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("attention", ["reference", "cpu"])
@pytest.mark.parametrize("kind", sorted(SERVED))
def test_random_arrivals_chunks_and_preemptions(kind, attention):
    requests = workload(seed=5, count=10, vocab=97, longest_prompt=24, longest_output=48)
    model = tiny(kind)
    expected = {str(index): generate(model, prompt, length) for index, (prompt, length) in enumerate(requests)}
    arrivals = random.Random(7)
    # 14 blocks of 8 hold fewer than two of the longest sequences: preemption is certain.
    engine = LocalEngine(model, attention=attention, running=6, budget=13, blocks=14, longest=100)
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
        for _ in range(arrivals.randint(0, 6)):
            engine.step()
    assert engine.finish() == expected
    assert engine.batcher.counters.preemptions > 0


@pytest.mark.parametrize("budget", [4, 7, 64])
def test_any_chunk_size(budget):
    requests = workload(seed=6, count=6, vocab=97)
    model = tiny("llama")
    expected = {str(index): generate(model, prompt, length) for index, (prompt, length) in enumerate(requests)}
    engine = LocalEngine(model, running=4, budget=budget)
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
    assert engine.finish() == expected


@pytest.mark.parametrize("policy", policies.NAMES)
def test_under_every_policy(policy):
    requests = workload(seed=8, count=8, vocab=97)
    model = tiny("llama")
    expected = {str(index): generate(model, prompt, length) for index, (prompt, length) in enumerate(requests)}
    engine = LocalEngine(model, running=4, budget=16, blocks=20, policy=policy)
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
    assert engine.finish() == expected


def test_with_the_prefix_cache():
    """Prompts that begin alike, one after the other, among preemptions."""
    model = tiny("llama")
    beginnings = [prompt for prompt, _ in workload(seed=9, count=2, vocab=97, longest_prompt=60)]
    requests = [(beginnings[index % 2] + prompt, 30) for index, (prompt, _) in enumerate(workload(10, 12, 97))]
    expected = {str(index): generate(model, prompt, length) for index, (prompt, length) in enumerate(requests)}
    engine = LocalEngine(model, running=4, budget=16, blocks=32, longest=160, prefix_cache=True)
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
    assert engine.finish() == expected
    assert engine.batcher.counters.cached_tokens > 100
    assert engine.batcher.counters.preemptions > 0
