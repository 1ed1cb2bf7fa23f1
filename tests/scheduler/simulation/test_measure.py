"""Gaps and durations, against the plain way to compute them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.simulation.gap import MOST_TENANTS, ServiceGap
from scheduler.simulation.histogram import RESOLUTION, Histogram

#: At each moment, for each of three tenants: what it is served more, and whether it has something waiting.
MOMENTS = st.lists(
    st.builds(
        lambda served, waiting: list(zip(served, waiting, strict=True)),
        st.lists(st.integers(0, 9), min_size=3, max_size=3),
        st.sampled_from([(True, True, False), (True, True, True), (False, True, True), (False, True, False)]),
    ),
    max_size=12,
)


def plain_gap(moments: list[list[tuple[float, bool]]]) -> float:
    """All pairs of tenants, all pairs of moments between which both waited throughout."""
    widest = 0.0
    for one in range(3):
        for other in range(3):
            for start in range(len(moments)):
                for end in range(start, len(moments)):
                    stretch = moments[start : end + 1]
                    if all(moment[one][1] and moment[other][1] for moment in stretch):
                        gained = [stretch[-1][tenant][0] - stretch[0][tenant][0] for tenant in (one, other)]
                        widest = max(widest, gained[0] - gained[1])
    return widest


@settings(max_examples=500)
@given(MOMENTS, st.integers(1, 3))
def test_the_service_gap_is_the_largest_over_all_intervals(moments, known_from_the_start):
    totals, history = [0, 0, 0], []
    gap = ServiceGap()
    for tenant in range(known_from_the_start):
        gap.watch(str(tenant))
    for now, moment in enumerate(moments):
        while len(gap.tenants) < 3 and moment[len(gap.tenants)][1]:
            gap.watch(str(len(gap.tenants)))  # a tenant comes with its first request
        here = len(gap.tenants)
        totals = [total + more for total, (more, _) in zip(totals, moment, strict=True)]
        waits = [waiting and tenant < here for tenant, (_, waiting) in enumerate(moment)]
        history.append(list(zip(totals, waits, strict=True)))
        gap.observe(now, lambda name: totals[int(name)], lambda name: waits[int(name)])  # noqa: B023
    assert gap.widest == plain_gap(history)


def test_the_first_of_very_many_tenants_are_watched():
    gap = ServiceGap()
    for number in range(MOST_TENANTS + 10):
        gap.watch(f"t{number}")
    assert gap.tenants == [f"t{number}" for number in range(MOST_TENANTS)]


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(1e-5, 1e4)), min_size=1, max_size=50))
def test_quantiles_are_right_within_the_resolution(counted):
    histogram = Histogram()
    for row, seconds in counted:
        histogram.add(np.array([row], dtype=np.int32), np.array([seconds]))
    for row in (None, *range(7)):
        values = sorted(seconds for at, seconds in counted if row in (None, at))
        assert histogram.counted(row) == len(values)
        read = histogram.quantiles((0.5, 1.0), row)
        if not values:
            assert read == []
            continue
        exact = [values[math.ceil(len(values) / 2) - 1], values[-1]]
        assert read == pytest.approx(exact, rel=0.51 * RESOLUTION)
