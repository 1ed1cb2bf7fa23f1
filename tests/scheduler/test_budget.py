"""How many tokens a step may compute so that it takes no longer than wanted."""

import pytest

from scheduler.budget import Budget
from scheduler.core.batch import Limits
from scheduler.simulation import run
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.cost import CostModel
from tests.scheduler.core.drive import make, sequence, step

FIXED_S, TOKEN_S = 0.02, 0.001


def learn(budget: Budget, *sizes: int) -> None:
    for tokens in sizes:
        budget.observe(tokens, FIXED_S + TOKEN_S * tokens)


def test_as_many_as_take_the_time_that_was_asked_for():
    budget = Budget(0.1)
    learn(budget, 1, 64, 200)
    assert budget.tokens() == pytest.approx(80, abs=1)


def test_a_target_below_the_fixed_time_leaves_a_token():
    budget = Budget(0.01)
    learn(budget, 1, 64)
    assert budget.tokens() == 1


def test_without_a_target_or_before_anything_is_known_there_is_no_limit():
    budget = Budget(0.1)
    assert budget.tokens() is None
    learn(budget, 8, 8)
    assert budget.tokens() is None, "steps of one size don't tell what a token takes"
    budget = Budget(None)
    learn(budget, 1, 64)
    assert budget.tokens() is None


def test_prompts_are_cut_to_it_only_while_somebody_decodes_and_never_to_nothing():
    batcher = make(budget=256, blocks=512, longest=512)
    batcher.submit(sequence("a", 100))
    plan = batcher.plan(40)
    assert batcher.draft_of(plan).tokens == 100, "nobody waits for this step"
    batcher.apply(plan.step, [7])
    batcher.submit(sequence("b", 200))
    for most, expected in ((40, 40), (3, 1 + 16)):
        plan = batcher.plan(most)
        assert batcher.draft_of(plan).tokens == expected
        batcher.apply(plan.step, [7] * plan.num_sampled)
    assert step(batcher)[0] == {"a": 1, "b": 200 - 39 - 16}


def itl_p99(target_s: float | None) -> float:
    cost = CostModel(name="", origin="", step_s=FIXED_S, row_s=0, token_s=TOKEN_S, context_s=0, attended_s=0)
    setup = run.Setup("fair", cost, Limits(16, 256, 2048), 2048, itl_target_s=target_s)
    arrivals = [Arrival(0.7 * number, "t", 700, 60, 60) for number in range(60)]
    return run.run(iter(arrivals), setup).figures.itl_s.p99


def test_in_simulation_it_holds_the_tail_of_inter_token_latency_down():
    assert itl_p99(None) > 0.2
    assert itl_p99(0.08) < 0.1
