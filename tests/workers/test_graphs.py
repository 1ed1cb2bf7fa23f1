"""Decodes replayed from graphs: which steps are, with which inputs, and that the tokens are those of transformers' generate."""

import copy
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from protocol.plan import Admission, Row, Sampling, StepPlan, Verification
from tests.workers.adapters import adapt
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import SERVED, generate, tiny
from workers import attention, runner, tensor_parallel
from workers.attention.reference import ReferenceAttention
from workers.grammar import Grammars
from workers.graphs import DecodeGraphs, Recorded, decode_inputs, decodes_alone, ladder
from workers.kv_cache import KVCache
from workers.model import adopt
from workers.runner import Runner
from workers.slots import Slots

CPU = torch.device("cpu")
SAMPLING = Sampling(temperature=0.9, top_k=20, seed=5)


def test_the_ladder_ends_at_the_most_and_no_batch_is_filled_up_by_more_than_half():
    assert ladder(1) == [1]
    assert ladder(20) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    for most in range(1, 300):
        sizes = ladder(most)
        assert sizes[-1] == most
        assert all(larger <= 2 * size and 2 * larger <= 3 * size + 1 for size, larger in pairwise(sizes[1:]))


@pytest.mark.parametrize(
    ("plan", "alone"),
    [
        (StepPlan(0, [], [0, 1], []), True),
        (StepPlan(0, [], [0], [Row(1, 16, 1, [3], sample=True)]), True),
        (StepPlan(0, [], [0], [Row(1, 16, 2, [3], sample=True)]), False),
        (StepPlan(0, [], [0], [Row(1, 16, 1, [3], sample=False)]), False),
        (StepPlan(0, [], [0], [], [Verification(1, 2, [])]), False),
    ],
)
def test_steps_in_which_each_slot_computes_one_token_and_samples(plan, alone):
    assert decodes_alone(plan) is alone


def test_what_follows_on_the_device_from_slots_and_positions_is_what_the_host_would_send():
    slots = Slots(3, 4, 8, CPU)
    draw = random.Random(1)
    slots.tables[slots.spare] = 99
    for slot in range(3):
        slots.admit(Admission(slot, [draw.randrange(50) for _ in range(20)], Sampling(), 20))
    slots.extend([Row(slot, 0, 0, blocks, sample=False) for slot, blocks in enumerate([[5, 2, 7], [4, 9], [1, 8, 3]])])
    plan = StepPlan(
        0, [], [], [Row(0, 19, 1, [], sample=True), Row(2, 8, 1, [], sample=True), Row(1, 3, 1, [], sample=True)]
    )
    sent = slots.inputs(plan)
    rows = torch.tensor([[0, 2, 1, slots.spare], [19, 8, 3, 0]])
    followed = decode_inputs(slots, rows, torch.arange(5, dtype=torch.int32))
    assert followed.drawn is sent.drawn is None
    for name in ("ids", "slots", "positions"):
        assert torch.equal(getattr(followed, name)[:3], getattr(sent, name))
    for name in ("context_len", "cache_slots"):
        assert torch.equal(getattr(followed.batch, name)[:3], getattr(sent.batch, name))
    used = sent.batch.block_table.shape[1]
    for row, context in enumerate(sent.batch.context_len.tolist()):
        blocks = -(-context // 8)
        assert torch.equal(followed.batch.block_table[row, :blocks], sent.batch.block_table[row, :blocks])
    assert used <= 4
    # Who fills up writes into nobody's block.
    assert followed.batch.cache_slots[3] == 99 * 8
    assert np.array_equal(sent.batch.query_start, followed.batch.query_start[:4])


def test_what_a_backend_does_on_the_host_cannot_be_captured():
    with pytest.raises(RuntimeError, match=r"attention backend 'reference' can't be captured"):
        LocalEngine(tiny("llama"), attention="reference", graphs=True)


def test_steps_with_drafts_or_shared_by_ranks_are_not_captured():
    with pytest.raises(RuntimeError, match="drafted"):
        LocalEngine(tiny("llama"), draft="ngram", graphs=True)
    model = adopt(tiny("llama"), Path())
    backend = ReferenceAttention(model.layers, 4, 8, model.dtype, CPU)
    grammars = Grammars(Path(), model.vocab_size, model.eos_ids)
    shared = Runner(
        model.module,
        backend,
        hidden=model.hidden,
        grammars=grammars,
        max_running=2,
        max_model_len=16,
        agree=tensor_parallel.agree,
    )
    with pytest.raises(RuntimeError, match="several ranks"):
        shared.capture()


class Repeated(DecodeGraphs):
    """Computes anew what a graph would replay, so that all but the capture runs where there is no GPU."""

    def _record(self, rows, query_start):
        inputs, logits = self.compute(rows, query_start)

        def replay():
            for kept, anew in zip((inputs.ids, logits), self._again(rows, query_start), strict=True):
                kept.copy_(anew)

        return Recorded(replay, rows, inputs, logits)

    def _again(self, rows, query_start):
        inputs, logits = self.compute(rows, query_start)
        REPLAYED.append(len(rows[0]))
        return inputs.ids, logits


REPLAYED: list[int] = []


class Spacious(ReferenceAttention):
    capturable = True

    def allocate(self):
        self.cache = KVCache(self.layers, self.num_blocks + 1, self.block_size, self.dtype, self.device)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_who_fills_up_a_batch_changes_nothing(kind, monkeypatch):
    monkeypatch.setattr(runner, "DecodeGraphs", Repeated)
    monkeypatch.setitem(attention.BACKENDS, "reference", Spacious)
    REPLAYED.clear()
    check(tiny(kind), attention="reference", running=5, graphs=True)
    check(tiny(kind), attention="reference", running=9, blocks=60, graphs=True)
    assert {4, 8} <= set(REPLAYED)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_beside_answers_that_fork_adapters_embeddings_and_scores(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "DecodeGraphs", Repeated)
    monkeypatch.setitem(attention.BACKENDS, "reference", Spacious)
    base = tiny("llama")
    adapt(base, tmp_path, 3, r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    prompts = [prompt * 3 for prompt, _ in workload(seed=8, count=5, vocab=97, longest_prompt=12)]

    def run(graphs: bool) -> LocalEngine:
        options = {"attention": "reference", "adapters": {"own": tmp_path}, "graphs": graphs}
        engine = LocalEngine(copy.deepcopy(base), **options)
        engine.submit("own", prompts[0], 9, adapter="own")
        engine.finish()
        assert not REPLAYED
        engine.submit("forked", prompts[1], 20, Sampling(1.0, seed=4, logprobs=1), choices=3)
        engine.submit("mean", prompts[2], 0, Sampling(pooling="mean"))
        engine.submit("scored", prompts[3], 0, Sampling(prompt_logprobs=1))
        engine.submit("both", prompts[4], 5, Sampling(prompt_logprobs=0), adapter="own")
        engine.finish(ahead=2)
        return engine

    REPLAYED.clear()
    expected = run(graphs=False)
    engine = run(graphs=True)
    assert REPLAYED
    assert (engine.outputs, engine.pooled) == (expected.outputs, expected.pooled)
    for told, before in ((engine.scored, expected.scored), (engine.prompts, expected.prompts)):
        assert logprobs(told) == pytest.approx(logprobs(before), abs=1e-4)


def logprobs(told: dict) -> list[float]:
    """Of lists of scores, or of scores by position."""
    parts = (part.values() if isinstance(part, dict) else part for _, part in sorted(told.items()))
    return [each.logprob for part in parts for each in part]


def test_what_may_not_depend_on_the_batch_is_not_captured(monkeypatch):
    monkeypatch.setitem(attention.BACKENDS, "reference", Spacious)
    with pytest.raises(RuntimeError, match="can't be captured"):
        LocalEngine(tiny("llama"), attention="reference", batch_invariant=True, graphs=True)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("kind", sorted(SERVED))
def test_random_arrivals_chunks_and_preemptions(kind, graphs):
    # 14 blocks of 8 hold fewer than two of the longest sequences: preemption is certain.
    engine = check(tiny(kind), device="cuda", running=6, blocks=14, graphs=graphs)
    assert engine.batcher.counters.preemptions > 0


def check(model, device="cpu", **options) -> LocalEngine:
    """Random arrivals and chunks, two steps ahead: the tokens are those of transformers' generate on the CPU."""
    requests = workload(seed=5, count=10, vocab=97, longest_prompt=24, longest_output=48)
    expected = {str(index): generate(model, prompt, length) for index, (prompt, length) in enumerate(requests)}
    arrivals = random.Random(7)
    engine = LocalEngine(model.to(device), budget=13, longest=100, **options)
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
        for _ in range(arrivals.randint(0, 6)):
            engine.step()
    assert engine.finish(ahead=2) == expected
    return engine


@pytest.mark.gpu
def test_sampled_tokens_are_those_of_the_cpu():
    requests = workload(seed=6, count=5, vocab=97)
    outputs = []
    for device in ("cpu", "cuda"):
        model = tiny("qwen3").to(device)
        engine = LocalEngine(model, running=5, graphs=device == "cuda")
        for index, (prompt, length) in enumerate(requests):
            engine.submit(str(index), prompt, length, SAMPLING if index % 2 else Sampling(repetition_penalty=1.3))
        outputs.append(engine.finish())
    assert outputs[0] == outputs[1]
