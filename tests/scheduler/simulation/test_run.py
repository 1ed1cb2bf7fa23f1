"""The loop: nothing is lost, nothing comes too early, and the same again is the same."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core import policies
from scheduler.core.batch import Limits
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.cost import CostModel
from scheduler.simulation.measure import Measure
from scheduler.simulation.run import Setup, Simulation, run

COST = CostModel(name="", origin="", step_s=1.0, row_s=0.5, token_s=0.25, context_s=0.125, attended_s=0.0625)
ARRIVALS = st.lists(
    st.builds(
        lambda at, tenant, prompt, output, more: Arrival(at, tenant, prompt, output, output + more),
        *(st.floats(0, 60), st.sampled_from("abc"), st.integers(1, 20), st.integers(1, 12), st.integers(0, 6)),
    ),
    max_size=12,
).map(sorted)


def setup(policy: policies.PolicyName = "fair", **changes) -> Setup:
    usual = {"cost": COST, "limits": Limits(3, 6, 64), "num_blocks": 12, "block_size": 4, "weights": {"b": 2.0}}
    return Setup(policy=policy, **(usual | changes))


def test_one_request_takes_what_its_steps_cost():
    figures = run(iter([Arrival(5.0, "a", 8, 3, 3)]), setup()).figures
    # A step costs 1 + 0.5 for its row, and per token, position read and pair attended as above.
    prompt = [1.5 + 6 * 0.25 + 6 * 0.125 + 21 * 0.0625, 1.5 + 2 * 0.25 + 8 * 0.125 + 15 * 0.0625]
    decodes = [1.5 + 0.25 + length * (0.125 + 0.0625) for length in (9, 10)]
    assert figures.ttft_s.p50 == sum(prompt)
    assert figures.e2e_s.p99 == pytest.approx(sum(prompt) + sum(decodes))
    assert figures.seconds == pytest.approx(5 + sum(prompt) + sum(decodes)), "the clock jumps over the time before"
    assert (figures.itl_s.p50, figures.itl_s.p99) == pytest.approx(tuple(decodes), rel=0.005)
    # Two blocks of 4 slots hold 6, then 8 tokens; a third one 9, then 10.
    seconds, stored, slots = [*prompt, *decodes], [6, 8, 9, 10], [8, 8, 12, 12]
    used = sum(map(float.__mul__, seconds, map(float, stored))) / sum(map(float.__mul__, seconds, map(float, slots)))
    assert figures.kv_waste_ratio == pytest.approx(1 - used)


@settings(deadline=None, max_examples=60)
@given(ARRIVALS, st.sampled_from(policies.NAMES), st.integers(0, 9))
def test_every_token_comes_and_is_paid_for_once(arrivals, policy, prefix):
    """For all policies, pools that preempt, and outputs that stop before their limit."""
    figures = run(iter(arrivals), setup(policy, prefix_tokens=prefix)).figures
    assert figures.requests == len(arrivals)
    assert figures.output_tokens == sum(arrival.output for arrival in arrivals)
    assert figures.prompt_tokens == sum(arrival.prompt for arrival in arrivals)
    assert set(figures.tenants) == {arrival.tenant for arrival in arrivals}
    for name, tenant in figures.tenants.items():
        own = [arrival for arrival in arrivals if arrival.tenant == name]
        assert (tenant.requests, tenant.output_tokens) == (len(own), sum(arrival.output for arrival in own))
        paid = sum(arrival.prompt + 2 * arrival.output for arrival in own) / (2 if name == "b" else 1)
        assert tenant.service <= paid if prefix else tenant.service == paid


@settings(deadline=None, max_examples=60)
@given(ARRIVALS, st.sampled_from(policies.NAMES))
def test_nothing_comes_before_it_can_have_been_computed(arrivals, policy):
    simulation = Simulation(iter(arrivals), setup(policy), Measure())
    while simulation.advance():
        pass
    for number, arrival in enumerate(arrivals):
        waited, took = simulation.measure.first_and_last(number)
        assert waited >= arrival.prompt * COST.token_s
        assert took >= waited + (arrival.output - 1) * COST.step_s


def test_what_can_never_fit_is_refused_and_the_rest_goes_on():
    arrivals = [Arrival(0.0, "a", 60, 1, 1), Arrival(1.0, "a", 8, 2, 60), Arrival(2.0, "a", 8, 2, 2)]
    figures = run(iter(arrivals), setup()).figures
    assert (figures.requests, figures.refused, figures.output_tokens) == (1, 2, 2)


def test_nothing_at_all_is_a_run_too():
    figures = run(iter(()), setup()).figures
    assert (figures.seconds, figures.requests, figures.ttft_s, figures.kv_waste_ratio) == (0, 0, None, 0)


def test_a_common_prefix_is_computed_once():
    arrivals = [Arrival(100.0 * number, "a", 17, 1, 1) for number in range(4)]
    alone, shared = (run(iter(arrivals), setup(prefix_tokens=tokens)).figures for tokens in (0, 16))
    assert shared.ttft_s.p50 < alone.ttft_s.p50 / 2
    assert shared.tenants["a"].service == alone.tenants["a"].service - 3 * 16
