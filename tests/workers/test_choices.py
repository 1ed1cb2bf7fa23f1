"""Several texts from one prompt are those of as many requests with these seeds, though the prompt is computed once."""

import pytest
import torch

from protocol.plan import Sampling
from scheduler.journal.entry import sequence_id
from scheduler.sampling import seed_of
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import SERVED, tiny
from tests.workers.test_speculation import draft
from workers.sampler import uniform

CHOICES = 8


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def together(model, prompts: list[list[int]], length: int, **keywords) -> tuple[dict[str, list[int]], LocalEngine]:
    engine = LocalEngine(model, longest=160, **keywords)
    for number, prompt in enumerate(prompts):
        engine.submit(str(number), prompt, length, Sampling(1.0, seed=number), choices=CHOICES)
    return engine.finish(ahead=2), engine


def alone(model, prompts: list[list[int]], length: int, **keywords) -> dict[str, list[int]]:
    """A request with a derived seed for each choice."""
    engine = LocalEngine(model, longest=160, **keywords)
    for number, prompt in enumerate(prompts):
        for index in range(CHOICES):
            engine.submit(sequence_id(str(number), index), prompt, length, Sampling(1.0, seed=seed_of(number, index)))
    return engine.finish()


#: Of full blocks of 8 and a rest, of full blocks alone, of less than one.
PROMPTS = [workload(seed, 1, 97, 1)[0][0] * length for seed, length in ((1, 29), (2, 32), (3, 5), (4, 1))]


@pytest.mark.parametrize("attention", ["reference", "cpu"])
@pytest.mark.parametrize("kind", sorted(SERVED))
def test_eight_different_texts_of_one_prompt(kind, attention):
    model = tiny(kind)
    texts, engine = together(model, PROMPTS[:1], 12, attention=attention)
    assert texts == alone(model, PROMPTS[:1], 12, attention=attention)
    assert len({tuple(text) for text in texts.values()}) == CHOICES
    assert engine.batcher.counters.forked_tokens == 7 * (len(PROMPTS[0]) - 1)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prefix_cache": True},
        {"running": 3, "budget": 7},
        {"blocks": 20, "running": 20, "budget": 30},
        {"draft": "ngram", "running": 20, "budget": 60},
        {"draft": "model", "running": 20, "budget": 60},
    ],
    ids=lambda given: ", ".join(f"{name} {value}" for name, value in given.items()) or "plain",
)
def test_in_any_company_and_however_small_the_engine_is(given):
    model = tiny("llama")
    if given.get("draft") == "model":
        given = {**given, "draft": draft("model", "llama")}
    texts, engine = together(model, PROMPTS, 16, **given)
    assert texts == alone(model, PROMPTS, 16)
    assert engine.batcher.counters.forked_tokens > 0
    assert "blocks" not in given or engine.batcher.counters.preemptions > 0
    assert "draft" not in given or engine.accepted


def test_draws_of_choices_are_as_independent_as_those_of_requests():
    """Chi-square of pairs, from two choices of one request at one position, in 8 x 8 bins."""
    seeds = range(4000)
    position = torch.full((len(seeds),), 7)
    draws = [uniform(torch.tensor([seed_of(seed, index) for seed in seeds]), position) for index in (0, 1, 2)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        bins = (draws[one] * 8).long() * 8 + (draws[other] * 8).long()
        expected = len(seeds) / 64
        distance = ((torch.bincount(bins, minlength=64) - expected) ** 2 / expected).sum()
        assert distance < 103.4, "over it with a chance of one in a thousand"
