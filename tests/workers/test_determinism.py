"""A request has the same tokens, and the same numbers behind them to the last bit, alone and in whatever circumstances.

`tokenbus bench determinism` does the same with the whole service and the demo model.
"""

from itertools import groupby

import msgspec
import pytest
import torch

from protocol.plan import Sampling
from scheduler.journal.entry import request_of, sequence_id
from scheduler.sampling import seed_of
from tests.workers.engine import LocalEngine
from tests.workers.models import tiny

#: Wide enough for torch's products to depend on the number of rows.
WIDE = {"hidden_size": 256, "intermediate_size": 320}
WAYS = {
    "default": {},
    "plain": {"weights": "plain", "batch_invariant": True},
    "reference": {"attention": "reference", "batch_invariant": True},
}
SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.3, min_tokens=3, stop_ids=(2,)),
    Sampling(1.0, seed=3),
    Sampling(0.8, top_k=20, top_p=0.9, min_p=0.02, seed=4),
    Sampling(1.2, typical_p=0.8, presence_penalty=0.5, seed=5),
    # Of three tokens only, so that it repeats itself and look-up finds something.
    Sampling(0.7, frequency_penalty=0.1, logit_bias=((7, 50.0), (8, 50.0), (9, 50.0)), seed=6),
]
#: How many texts of each prompt.
CHOICES = [1, 1, 1, 3, 1, 1]
LENGTH = 40


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts() -> list[list[int]]:
    """Two after two begin alike."""
    draw = torch.Generator().manual_seed(1)
    beginnings = [torch.randint(3, 97, (18,), generator=draw).tolist() for _ in range(3)]
    return [
        [*beginnings[number // 2], *torch.randint(3, 97, (4 + 5 * number,), generator=draw).tolist()]
        for number in range(len(SAMPLINGS))
    ]


class Run:
    """What came of all requests: tokens, and with ``scores`` their log probabilities."""

    def __init__(self, way: dict, *, scores: bool = True, **sizes):
        self.engine = LocalEngine(tiny("llama", **WIDE), **{"longest": 128, **way, **sizes})
        self._scores = scores

    def submit(self, number: int) -> None:
        sampling = msgspec.structs.replace(SAMPLINGS[number], logprobs=0 if self._scores else None)
        self.engine.submit(str(number), prompts()[number], LENGTH, sampling, choices=CHOICES[number])

    def all_at_once(self, steps: int | None = None) -> "Run":
        for number in range(len(SAMPLINGS)):
            self.submit(number)
        if steps is None:
            self.engine.finish(ahead=2)
        else:
            for _ in range(steps):
                self.engine.step()
        return self

    def told(self) -> dict[str, list]:
        return {id: [tokens, self.engine.scored.get(id)] for id, tokens in self.engine.outputs.items()}


@pytest.fixture(scope="module", params=WAYS)
def way(request) -> dict:
    return WAYS[request.param]


@pytest.fixture(scope="module")
def alone(way) -> dict[str, list]:
    run = Run(way)
    for number in range(len(SAMPLINGS)):
        run.submit(number)
        run.engine.finish()
    assert all(len(tokens) == LENGTH == len(scored) for tokens, scored in run.told().values())
    return run.told()


@pytest.mark.parametrize("budget", [7, 64])
def test_in_a_batch_however_prompts_are_cut(way, alone, budget):
    assert Run(way, running=6, budget=budget).all_at_once().told() == alone


def test_a_text_is_what_its_seed_gives_it_by_itself(way, alone):
    run, number = Run(way), CHOICES.index(3)
    sampling = msgspec.structs.replace(SAMPLINGS[number], seed=seed_of(SAMPLINGS[number].seed, 2), logprobs=0)
    run.engine.submit("itself", prompts()[number], LENGTH, sampling)
    run.engine.finish()
    assert run.told()["itself"] == alone[sequence_id(str(number), 2)]


def test_preempted(way, alone):
    run = Run(way, running=6, blocks=18).all_at_once()
    assert run.told() == alone
    assert run.engine.batcher.counters.preemptions > 0


def test_with_the_prefix_cache(way, alone):
    run = Run(way, prefix_cache=True).all_at_once()
    assert run.told() == alone
    assert run.engine.batcher.counters.cached_tokens > 0


def test_killed_and_resumed_by_another_worker(way, alone):
    run, other = Run(way, budget=64).all_at_once(steps=9), Run(way, budget=64)
    assert all(0 < len(tokens) < LENGTH for tokens in run.engine.outputs.values())
    run.engine.batcher.restart()
    run.engine.runner = other.engine.runner
    run.engine.finish(ahead=2)
    assert run.told() == alone


def test_killed_and_resumed_by_another_service(way, alone):
    run, other = Run(way, budget=64).all_at_once(steps=9), Run(way, budget=64)
    for sequence in run.engine.batcher._sequences.values():
        other.engine.outputs[sequence.id] = sequence.output
        other.engine.scored[sequence.id] = run.engine.scored[sequence.id]
    for _, sequences in groupby(run.engine.batcher._sequences.values(), lambda sequence: request_of(sequence.id)[0]):
        other.engine.batcher.submit(*(sequence.again() for sequence in sequences))
    other.engine.finish(ahead=2)
    assert other.told() == alone


@pytest.mark.parametrize("by", ["ngram", "model"])
def test_with_speculation(way, alone, by):
    draft = by if by == "ngram" else tiny("llama", **WIDE)
    run = Run(way, scores=False, draft=draft).all_at_once()
    assert run.engine.outputs == {id: tokens for id, (tokens, _) in alone.items()}
    assert sum(accepted for accepted, _ in run.engine.accepted) > 0


def test_where_it_is_not_asked_for_torch_s_own_layers_differ_in_the_last_bits():
    """Else the tests above would show nothing."""
    plain = {"weights": "plain"}
    run = Run(plain)
    for number in range(len(SAMPLINGS)):
        run.submit(number)
        run.engine.finish()
    assert Run(plain, running=6, budget=64).all_at_once().told() != run.told()
