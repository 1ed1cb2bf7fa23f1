"""The fairness paper's workloads, cut short: our policy keeps the bound where first-come-first-served has none."""

import pytest

from scheduler.simulation.suites import SUITES, run_suite


@pytest.mark.parametrize("name", SUITES)
def test_the_bound_holds_and_fairness_costs_no_throughput(name):
    figures, _ = run_suite(SUITES[name], seed=1, seconds=40)
    assert figures.max_service_gap <= figures.service_gap_bound
    assert figures.fair.requests == figures.fcfs.requests > 0
    assert figures.throughput_ratio > 0.95


@pytest.mark.parametrize("name", ["overload", "weighted", "in-out"])
def test_under_overload_first_come_first_served_drifts_apart_and_we_do_not(name):
    short, long = (run_suite(SUITES[name], seed=1, seconds=seconds)[0] for seconds in (30, 90))
    assert long.fcfs_max_service_gap > 2 * short.fcfs_max_service_gap
    assert long.fcfs_max_service_gap > 4 * long.max_service_gap


def test_weights_are_the_shares_of_a_machine_that_everybody_wants():
    figures, outcomes = run_suite(SUITES["weighted"], seed=1, seconds=90)
    served = [figures.fair.tenants[f"client-{weight}"].ttft_s.p50 for weight in (1, 4)]
    assert served[0] > 2 * served[1]
    assert {outcome.figures.policy for outcome in outcomes} == {"fair", "chunked"}


def test_a_flood_does_not_keep_its_victim_waiting():
    first = run_suite(SUITES["flood"], seed=1, seconds=60)[0].ttft_s
    assert first.alone.p99 < first.fair.p99 < first.fcfs.p99 / 10
