"""How many replicas hold a target: twice as many each time until they do, then by halves what lies between.

Requests are dealt to the replicas in turn, whosever they are, and never move. A replica is a batcher and a machine of its own.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from scheduler.core.policies import PolicyName
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.figures import Percentiles
from scheduler.simulation.measure import Measure
from scheduler.simulation.run import Setup, Simulation, Watch

Seconds = Annotated[float, Meta(gt=0)]


class FleetFigures(msgspec.Struct, frozen=True):
    """What so many replicas came to; each figure as in ``Figures``, over all of their requests together."""

    replicas: int
    requests: int
    refused: int
    seconds: float
    output_tokens: int
    output_tokens_per_s: float
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    e2e_s: Percentiles | None
    kv_waste_ratio: float
    preemptions: int


class Targets(msgspec.Struct, frozen=True, kw_only=True):
    """The most that the 99th percentiles may be, in seconds."""

    ttft_p99_s: Seconds
    itl_p99_s: Seconds | None = None

    def hold(self, figures: FleetFigures) -> bool:
        """Of what was never measured, nothing was late."""
        return _within(figures.ttft_s, self.ttft_p99_s) and _within(figures.itl_s, self.itl_p99_s)


class ReplicaFigures(msgspec.Struct, frozen=True):
    """``needed``: the smallest count that holds the targets, as long as more replicas are never worse; null: not even the last
    of ``tried``, which are in ascending order."""

    policy: PolicyName
    cost_model: str
    targets: Targets
    needed: int | None
    tried: list[FleetFigures]


def search(
    arrivals: Sequence[Arrival],
    setup: Setup,
    targets: Targets,
    *,
    least: int = 1,
    most: int,
    watch: Watch = lambda *_: None,
) -> ReplicaFigures:
    """From ``least`` replicas to ``most``, or to one for each request, should these be fewer. Raises Stuck."""
    most = max(min(most, len(arrivals)), least)
    tried: dict[int, FleetFigures] = {}

    def holds(count: int) -> bool:
        tried[count] = run_fleet(arrivals, setup, count, watch)
        return targets.hold(tried[count])

    too_few, count = least - 1, least
    while not (enough := holds(count)) and count < most:
        too_few, count = count, min(2 * count, most)
    while enough and count - too_few > 1:
        middle = (too_few + count) // 2
        if holds(middle):
            count = middle
        else:
            too_few = middle
    return ReplicaFigures(
        policy=setup.policy,
        cost_model=setup.cost.name,
        targets=targets,
        needed=count if enough else None,
        tried=[tried[number] for number in sorted(tried)],
    )


def run_fleet(arrivals: Sequence[Arrival], setup: Setup, replicas: int, watch: Watch = lambda *_: None) -> FleetFigures:
    """Replicas don't meet, so they are simulated one after the other, each from 0 s on. Raises Stuck."""
    measure = Measure()
    seconds, preemptions = 0.0, 0
    for first in range(replicas):
        replica = Simulation(iter(arrivals[first::replicas]), setup, measure)
        replica.finish(watch)
        seconds = max(seconds, replica.now)
        preemptions += replica.batcher.counters.preemptions
    return FleetFigures(
        replicas=replicas,
        requests=measure.requests,
        refused=measure.refused,
        seconds=seconds,
        output_tokens=measure.output_tokens(),
        output_tokens_per_s=measure.output_tokens() / (seconds or 1.0),
        ttft_s=measure.ttft_s(),
        itl_s=measure.itl_s(),
        e2e_s=measure.e2e_s(),
        kv_waste_ratio=measure.kv_waste_ratio,
        preemptions=preemptions,
    )


def _within(measured: Percentiles | None, most: float | None) -> bool:
    return measured is None or most is None or measured.p99 <= most
