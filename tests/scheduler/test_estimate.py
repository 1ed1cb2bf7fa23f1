"""The estimate's arithmetic."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.estimate import Pace, Queue, Work, estimate_s

FIXED_S, TOKEN_S = 0.010, 0.001
NOTHING = Work()


def pace(fixed_s: float = FIXED_S, token_s: float = TOKEN_S) -> Pace:
    known = Pace()
    for tokens in (1, 8, 64):
        known.observe(tokens, fixed_s + tokens * token_s)
    return known


def alone(outstanding: int = 0, seats: int = 4, ahead: Work = NOTHING, share: float = 1.0) -> Queue:
    return Queue(outstanding, seats, ahead, share)


def test_a_pace_is_unknown_before_the_first_step():
    empty = Pace()
    assert not empty.known
    assert (empty.fixed_s, empty.per_token_s) == (0.0, 0.0)


def test_steps_of_different_sizes_tell_what_is_fixed_and_what_each_token_costs():
    assert (pace().fixed_s, pace().per_token_s) == (pytest.approx(FIXED_S), pytest.approx(TOKEN_S))


def test_steps_of_one_size_tell_what_such_a_step_takes():
    same = Pace()
    for _ in range(10):
        same.observe(5, 0.02)
    assert same.fixed_s + 5 * same.per_token_s == pytest.approx(0.02)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(1e-6, 60)), min_size=1, max_size=600))
def test_whatever_the_steps_no_cost_is_negative_and_the_mean_step_is_met(steps):
    seen = Pace()
    for tokens, seconds in steps:
        seen.observe(tokens, seconds)
    assert seen.known
    assert seen.per_token_s >= 0
    assert seen.fixed_s >= -1e-9
    assert math.isfinite(estimate_s(seen, alone(), Work(100, 100)))


def test_the_newest_steps_count_most():
    turned = pace()
    for tokens in random.Random(1).choices((1, 8, 64), k=3000):
        turned.observe(tokens, 2 * FIXED_S + tokens * 3 * TOKEN_S)
    assert (turned.fixed_s, turned.per_token_s) == (pytest.approx(2 * FIXED_S), pytest.approx(3 * TOKEN_S))


def test_the_price_of_a_prompt_is_not_forgotten_over_a_long_answer():
    """One prompt, then thousands of steps of one token, each of them a little off."""
    draw = random.Random(2)
    seen = Pace()
    seen.observe(200, FIXED_S + 200 * TOKEN_S)
    for _ in range(4000):
        seen.observe(1, (FIXED_S + TOKEN_S) * draw.uniform(0.8, 1.2))
    assert seen.per_token_s == pytest.approx(TOKEN_S, rel=0.1)


def test_on_an_idle_service_it_takes_the_prompt_and_a_step_for_each_further_token():
    prompt_s = FIXED_S + 100 * TOKEN_S
    assert estimate_s(pace(), alone(), Work(100, 1)) == pytest.approx(prompt_s)
    assert estimate_s(pace(), alone(), Work(100, 11)) == pytest.approx(prompt_s + 10 * (FIXED_S + TOKEN_S))


def test_while_a_seat_is_free_the_others_cost_it_their_part_of_each_step_and_no_wait():
    queue = alone(outstanding=3, ahead=Work(1000, 1000))
    expected = FIXED_S + 100 * TOKEN_S + 10 * (FIXED_S + 4 * TOKEN_S)
    assert estimate_s(pace(), queue, Work(100, 11)) == pytest.approx(expected)


def test_otherwise_all_but_the_seats_have_to_end_before():
    """Ten are outstanding on four seats: seven have to end before one of the last four leaves its seat."""
    ahead = Work(prompt=200, output=1000)
    all_s = 200 * TOKEN_S + 1000 * (FIXED_S / 4 + TOKEN_S)
    own_s = FIXED_S + 100 * TOKEN_S
    for outstanding, part in ((3, 0), (4, 1 / 4), (10, 7 / 10)):
        waited_s = estimate_s(pace(), alone(outstanding, ahead=ahead), Work(100, 1)) - own_s
        assert waited_s == pytest.approx(part * all_s)


def test_a_tenant_with_a_quarter_of_the_service_waits_four_times_as_long():
    waits = [
        estimate_s(pace(), alone(8, ahead=Work(200, 1000), share=share), Work(1, 1)) - FIXED_S - TOKEN_S
        for share in (1.0, 0.25)
    ]
    assert waits[1] == pytest.approx(4 * waits[0])
