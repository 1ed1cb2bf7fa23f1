"""Greedy tokens are those of transformers' own generate, whatever shares the batch, however it is cut, whoever is preempted."""

import random

import pytest
import torch

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
