"""Requests dealt to replicas, and the smallest number of them that holds a target."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.measure import Measure
from scheduler.simulation.replicas import Targets, run_fleet, search
from scheduler.simulation.run import Simulation
from tests.scheduler.simulation.test_run import ARRIVALS, setup

#: All there at once: whoever shares a replica waits for the others' prompts.
CROWD = [Arrival(0.0, "a", 4 + number % 5, 3, 3) for number in range(23)]
LOOSE = 1e6


def simulated(arrivals: list[Arrival]) -> tuple[Measure, float]:
    simulation = Simulation(iter(arrivals), setup(), Measure())
    while simulation.advance():
        pass
    return simulation.measure, simulation.now


@settings(deadline=None, max_examples=60)
@given(ARRIVALS.filter(bool), st.integers(1, 4))
def test_each_replica_is_a_machine_of_its_own_and_percentiles_are_of_all_together(arrivals, count):
    fleet = run_fleet(arrivals, setup(), count)
    alone = [simulated(arrivals[first::count]) for first in range(count)]
    times = [measure.first_and_last(number) for measure, _ in alone for number in range(measure.requests)]
    firsts, lasts = zip(*times, strict=True)
    assert (fleet.ttft_s.p50, fleet.ttft_s.p99) == pytest.approx(tuple(np.quantile(firsts, (0.5, 0.99))))
    assert fleet.e2e_s.p95 == pytest.approx(np.quantile(lasts, 0.95))
    assert fleet.seconds == max(now for _, now in alone)
    assert (fleet.requests, fleet.output_tokens) == (len(arrivals), sum(arrival.output for arrival in arrivals))


@pytest.mark.parametrize("ttft_p99_s", [3, 5, 10, 20, 40, 100])
def test_the_smallest_count_is_found_without_trying_all(ttft_p99_s):
    targets = Targets(ttft_p99_s=ttft_p99_s)
    fleets = [run_fleet(CROWD, setup(), count) for count in range(1, len(CROWD) + 1)]
    figures = search(CROWD, setup(), targets, most=1000)
    assert figures.needed == next((fleet.replicas for fleet in fleets if targets.hold(fleet)), None)
    assert figures.tried == [fleets[fleet.replicas - 1] for fleet in figures.tried]
    assert len(figures.tried) <= 9


def test_no_more_replicas_are_tried_than_there_are_requests_or_were_allowed():
    impossible = Targets(ttft_p99_s=1e-3)
    for most, last in ((1000, len(CROWD)), (7, 7)):
        figures = search(CROWD, setup(), impossible, most=most)
        assert figures.needed is None
        assert [fleet.replicas for fleet in figures.tried] == sorted({1, 2, 4, *((8, 16) if last > 8 else ()), last})


@settings(deadline=None, max_examples=30)
@given(ARRIVALS)
def test_a_replica_for_each_request_is_always_enough_for_what_is_possible(arrivals):
    alone = run_fleet(arrivals, setup(), max(len(arrivals), 1))
    targets = Targets(ttft_p99_s=alone.ttft_s.p99 if alone.ttft_s else LOOSE)
    figures = search(arrivals, setup(), targets, most=1000)
    assert 1 <= figures.needed <= max(len(arrivals), 1)


def test_the_time_between_tokens_is_a_target_too():
    slowest = run_fleet(CROWD, setup(), 1).itl_s.p99
    needed = [
        search(CROWD, setup(), Targets(ttft_p99_s=LOOSE, itl_p99_s=itl), most=1000).needed
        for itl in (None, slowest, slowest / 2)
    ]
    assert needed[:2] == [1, 1]
    assert needed[2] > 1


def test_fewer_than_the_least_are_not_tried():
    targets = Targets(ttft_p99_s=20)
    needed = search(CROWD, setup(), targets, most=1000).needed
    figures = search(CROWD, setup(), targets, least=needed - 1, most=1000)
    assert figures.needed == needed
    assert figures.tried[0].replicas == needed - 1
