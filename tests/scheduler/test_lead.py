"""When the next step is planned, for workers of different speed: what they wait, and how early that is."""

import random

import pytest

from scheduler.lead import Lead

_STEPS = 2000


def run(step_s: float, late_s: float, jitter: float, lead: Lead) -> tuple[float, float]:
    """Steps of about ``step_s``; a plan that isn't there in time costs ``late_s``.

    The share of its time that the worker waited, and that which was left of a step when the next one was planned, in the second
    half of the steps.
    """
    draw = random.Random(1)
    waited_s = busy_s = early_s = 0.0
    for number in range(_STEPS):
        seconds = step_s * draw.uniform(1 - jitter, 1 + jitter)
        ahead_s = seconds - max(lead.delay_s(8), 0.0)
        waits_s = late_s if ahead_s < late_s else 0.0
        lead.observe(8, seconds, waits_s)
        if number >= _STEPS // 2:
            waited_s += waits_s
            busy_s += seconds
            early_s += max(ahead_s, 0.0)
    return waited_s / busy_s, early_s / busy_s


@pytest.mark.parametrize(("step_s", "late_s", "jitter"), [(0.01, 0.002, 0.0), (0.01, 0.002, 0.2), (0.05, 0.005, 0.1)])
def test_the_worker_waits_for_a_hundredth_of_its_time(step_s, late_s, jitter):
    waited, early = run(step_s, late_s, jitter, Lead())
    assert waited < 0.015
    assert early < 1.5 * (late_s / step_s + jitter)


def test_while_a_late_plan_costs_less_than_that_none_is_made_before_a_step_is_due_to_end():
    _, early = run(0.15, 0.0015, 0.05, Lead())
    assert early < 0.02
    lead = Lead()
    run(0.15, 0.0014, 0.0, lead)
    assert lead.delay_s(8) == pytest.approx(0.149)


def test_steps_shorter_than_planning_are_sent_at_once():
    lead = Lead()
    run(0.001, 0.0012, 0.0, lead)
    assert lead.delay_s(8) <= 0


def test_a_step_with_more_tokens_is_expected_to_take_longer():
    lead = Lead()
    for tokens in (1, 100, 1, 100):
        lead.observe(tokens, 0.01 + 0.001 * tokens, 0.0)
    assert lead.delay_s(50) == pytest.approx(0.059)


def test_short_steps_after_long_ones_have_a_lead_no_longer_than_themselves():
    lead = Lead()
    for _ in range(50):
        lead.observe(8, 1.0, 0.5)
    lead.observe(8, 0.01, 0.0)
    assert lead.delay_s(8) > 0
