"""Draws: the generator against its published vectors, tokens independent of company."""

import msgspec
import pytest
import torch

from protocol.plan import Sampling
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import tiny
from tests.workers.rows import rows
from workers.sampler import Sampler, philox4x32, uniform

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers for philox4x32-10
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    result = philox4x32([torch.tensor([word]) for word in counter], [torch.tensor([word]) for word in key])
    assert " ".join(f"{word.item():08x}" for word in result) == words


def test_uniforms_are_uniform_and_use_all_of_the_seed():
    positions = torch.arange(20_000)
    drawn = uniform(torch.full_like(positions, 12345), positions)
    assert drawn.dtype == torch.float64
    counts = torch.histc(drawn.float(), bins=20, min=0, max=1)
    chi_square = ((counts - 1000) ** 2 / 1000).sum().item()
    assert chi_square < 43.8  # 99.9% of chi-square with 19 degrees of freedom
    one = torch.zeros(1, dtype=torch.int64)
    seeds = [0, 1, 1 << 32, (1 << 63) - 1, -1]
    assert len({uniform(torch.tensor([seed]), one).item() for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("temperature", [1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy_not_nan(temperature):
    sampler = Sampler(1, CPU)
    sampler.assign(0, Sampling(temperature=temperature))
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sampler.sample(logits, rows([0], [([1, 2], 1)])).tolist() == [1]


def test_a_plain_greedy_batch_costs_one_argmax(monkeypatch):
    sampler = Sampler(3, CPU)
    sampler.assign(2, Sampling(temperature=1.0, min_p=0.1, repetition_penalty=1.5))
    sampler.assign(0, Sampling(repetition_penalty=1.5))
    sampler.assign(0, Sampling())
    monkeypatch.setattr(Sampler, "process", None)
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 2.0]])
    assert sampler.sample(logits, rows([0, 1], [([1, 2], 1), ([2], 1)])).tolist() == [1, 0]


def test_a_slot_that_was_sampled_is_greedy_for_its_next_sequence():
    sampler = Sampler(1, CPU)
    sampler.assign(0, Sampling(temperature=2.0, seed=1))
    sampler.assign(0, Sampling())
    logits = torch.tensor([[1.0, 1.1, 1.0]])
    assert {sampler.sample(logits, rows([0], [([0] * length, 1)])).item() for length in range(1, 50)} == {1}


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_of_32_and_after_preemption():
    model = tiny("llama")
    requests = workload(seed=9, count=32, vocab=97, longest_prompt=24, longest_output=32)
    mixes = [
        Sampling(0.8),
        Sampling(1.0, top_k=20),
        Sampling(1.3, top_p=0.9),
        Sampling(0.7, min_p=0.05),
        Sampling(1.2, typical_p=0.8, repetition_penalty=1.2),
        Sampling(0.9, presence_penalty=0.6, frequency_penalty=0.4),
        Sampling(1.0, logit_bias=((5, 4.0), (6, 4.0)), bad_words=((5, 6), (6, 5))),
        Sampling(repetition_penalty=1.1, frequency_penalty=0.5),
    ]

    def sampling(index: int) -> Sampling:
        return msgspec.structs.replace(mixes[index % len(mixes)], seed=1000 + index)

    def run(engine: LocalEngine, indices) -> dict[str, list[int]]:
        for index in indices:
            engine.submit(str(index), *requests[index], sampling(index))
        return engine.finish()

    alone = {}
    for index in range(32):
        alone |= run(LocalEngine(model), [index])
    together = LocalEngine(model, running=32, budget=128, blocks=400)
    assert run(together, range(32)) == alone
    assert max(len(output) for output in alone.values()) > 20
    crowded = LocalEngine(model, running=8, budget=16, blocks=14, longest=100)
    assert run(crowded, range(32)) == alone
    assert crowded.batcher.counters.preemptions > 0
