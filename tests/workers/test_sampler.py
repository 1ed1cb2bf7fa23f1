"""Draws: the generator against its published vectors, filters against transformers' processors, tokens independent of company."""

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from protocol.plan import Sampling
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import tiny
from workers.sampler import Sampler, filter_min_p, filter_top_k_top_p, philox4x32, uniform

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


@pytest.mark.parametrize(("k", "p"), [(5, 1.0), (0, 0.7), (7, 0.8), (0, 0.01), (1, 1.0), (500, 0.99)])
def test_top_k_and_top_p_as_transformers(k, p):
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(3)) * 3
    expected = logits
    if k:
        expected = TopKLogitsWarper(min(k, 50))(None, expected)
    if p < 1:
        expected = TopPLogitsWarper(p)(None, expected)
    ours = filter_top_k_top_p(logits, torch.full((16,), k), torch.full((16,), p))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("p", [0.0, 0.02, 0.5, 1.0])
def test_min_p_as_transformers(p):
    logits = torch.randn(16, 50, generator=torch.Generator().manual_seed(4)) * 3
    torch.testing.assert_close(filter_min_p(logits, torch.full((16,), p)), MinPLogitsWarper(p)(None, logits))


def test_every_row_uses_its_own_mix_and_draws_its_own_distribution():
    mixes = [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5, top_k=4),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=0.9, min_p=0.2),
        Sampling(temperature=1.2, top_k=6, top_p=0.9, min_p=0.05),
        Sampling(),
    ]
    draws = 4000
    logits = torch.randn(len(mixes), 12, generator=torch.Generator().manual_seed(5)) * 1.5
    sampler = Sampler(len(mixes), CPU)
    for slot, mix in enumerate(mixes):
        sampler.assign(slot, Sampling(mix.temperature, mix.top_k, mix.top_p, mix.min_p, seed=slot + 77))
    slots = list(range(len(mixes)))
    drawn = torch.stack(
        [sampler.sample(logits, slots, torch.full((len(mixes),), position)) for position in range(draws)]
    )
    for slot, mix in enumerate(mixes):
        if not mix.temperature:
            assert set(drawn[:, slot].tolist()) == {logits[slot].argmax().item()}
            continue
        row = logits[slot : slot + 1] / mix.temperature
        if mix.top_k:
            row = TopKLogitsWarper(mix.top_k)(None, row)
        if mix.top_p < 1:
            row = TopPLogitsWarper(mix.top_p)(None, row)
        if mix.min_p:
            row = MinPLogitsWarper(mix.min_p)(None, row)
        expected = row.softmax(-1)[0] * draws
        counts = torch.bincount(drawn[:, slot], minlength=12)
        possible = expected > 0
        assert counts[~possible].sum() == 0
        chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
        assert chi_square < 35  # 99.98% with 11 degrees of freedom, fewer here


def test_a_tiny_temperature_is_greedy_not_nan():
    sampler = Sampler(1, CPU)
    sampler.assign(0, Sampling(temperature=1e-30))
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert sampler.sample(logits, [0], torch.tensor([9])).tolist() == [1]


def test_a_slot_that_was_sampled_is_greedy_for_its_next_sequence():
    sampler = Sampler(1, CPU)
    sampler.assign(0, Sampling(temperature=2.0, seed=1))
    sampler.assign(0, Sampling())
    logits = torch.tensor([[1.0, 1.1, 1.0]])
    assert {sampler.sample(logits, [0], torch.tensor([position])).item() for position in range(50)} == {1}


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_of_32_and_after_preemption():
    model = tiny("llama")
    requests = workload(seed=9, count=32, vocab=97, longest_prompt=24, longest_output=32)
    mixes = [Sampling(0.8, 0, 1.0, 0.0), Sampling(1.0, 20), Sampling(1.3, 0, 0.9), Sampling(0.7, 0, 1.0, 0.05)]

    def sampling(index: int) -> Sampling:
        mix = mixes[index % len(mixes)]
        return Sampling(mix.temperature, mix.top_k, mix.top_p, mix.min_p, seed=1000 + index)

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
