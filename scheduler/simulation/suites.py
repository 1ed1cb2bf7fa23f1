"""The synthetic workloads of "Fairness in Serving Large Language Models" (Sheng et al., OSDI'24, section 5.2), and a flood.

Rates, lengths and durations are those of the authors' artifact (github.com/Ying1123/VTC-artifact, fair_bench/exp_suite.py and
trace.py), as is the KV cache of 10,000 tokens on an A10G with Llama-2-7B. Steps take what ``a10g-llama-2-7b`` says, a little
less than theirs took, so what overloads their machine overloads this one too, by less. Our own choices: blocks of 16
tokens, 512 tokens in a step, 128 sequences at once, and chunked first-come-first-served where they compare with their own.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random

import msgspec

from scheduler.core.batch import Limits
from scheduler.core.policies import PolicyName
from scheduler.simulation import models
from scheduler.simulation.arrivals import Arrival, merge
from scheduler.simulation.figures import Figures, Percentiles
from scheduler.simulation.run import Outcome, Setup, Watch, run
from scheduler.simulation.synthetic import constant, phases, poisson, shifting, until

_MINUTE = 60.0
_VICTIM = "victim"
_POLICIES: tuple[PolicyName, ...] = ("fair", "chunked")


@dataclass(frozen=True, slots=True)
class Suite:
    """``arrivals``: what comes in so many seconds. With ``alone``, that tenant is also run without the others."""

    name: str
    about: str
    seconds: float
    arrivals: Callable[[Random, float], Iterator[Arrival]]
    weights: Mapping[str, float] = field(default_factory=dict)
    alone: str | None = None


class TimeToFirst(msgspec.Struct, frozen=True):
    """One tenant's time to the first token: with nobody else there, and beside all the others."""

    tenant: str
    alone: Percentiles | None
    fair: Percentiles | None
    fcfs: Percentiles | None


class SuiteFigures(msgspec.Struct, frozen=True):
    """The same arrivals under ``fair`` and under first-come-first-served; ``throughput_ratio``: output tokens/s of the first to
    those of the second."""

    name: str
    max_service_gap: float
    service_gap_bound: float
    fcfs_max_service_gap: float
    throughput_ratio: float
    ttft_s: TimeToFirst | None
    fair: Figures
    fcfs: Figures


def machine(policy: PolicyName, weights: Mapping[str, float]) -> Setup:
    return Setup(
        policy=policy,
        cost=models.load("a10g-llama-2-7b"),
        limits=Limits(max_running=128, max_batch_tokens=512, max_model_len=2048),
        num_blocks=625,
        weights=weights,
    )


def run_suite(
    suite: Suite, seed: int, seconds: float | None = None, watch: Watch = lambda *_: None
) -> tuple[SuiteFigures, list[Outcome]]:
    """``seconds``: how long requests come, instead of the suite's own time. Then all of them are run to their ends."""

    def arrivals() -> Iterator[Arrival]:
        return suite.arrivals(Random(f"{seed} {suite.name}"), seconds or suite.seconds)  # noqa: S311 - nothing secret

    outcomes = [run(arrivals(), machine(policy, suite.weights), watch) for policy in _POLICIES]
    fair, fcfs = (outcome.figures for outcome in outcomes)
    first = None
    if suite.alone is not None:
        own = (arrival for arrival in arrivals() if arrival.tenant == suite.alone)
        alone = run(own, machine("fair", suite.weights), watch).figures
        first = TimeToFirst(suite.alone, *(figures.tenants[suite.alone].ttft_s for figures in (alone, fair, fcfs)))
    return SuiteFigures(
        name=suite.name,
        max_service_gap=fair.max_service_gap,
        service_gap_bound=fair.service_gap_bound,
        fcfs_max_service_gap=fcfs.max_service_gap,
        throughput_ratio=fair.output_tokens_per_s / fcfs.output_tokens_per_s,
        ttft_s=first,
        fair=fair,
        fcfs=fcfs,
    ), outcomes


def _client(
    name: str, times: Iterator[float], seconds: float, prompt: int = 256, output: int = 256
) -> Iterator[Arrival]:
    return (Arrival(at, name, prompt, output, output) for at in until(times, seconds))


def _steady(*rates: float) -> Callable[[Random, float], Iterator[Arrival]]:
    """Clients at constant rates per second, each beginning somewhere in its first gap; 256 tokens in, 256 out."""

    def arrivals(random: Random, seconds: float) -> Iterator[Arrival]:
        return merge(
            *(
                _client(f"client-{number}", constant(rate, random.random()), seconds)
                for number, rate in enumerate(rates, start=1)
            )
        )

    return arrivals


def _on_off(first: float, second: float) -> Callable[[Random, float], Iterator[Arrival]]:
    """Client 1 sends for a minute and is silent for one, client 2 always sends."""

    def arrivals(random: Random, seconds: float) -> Iterator[Arrival]:
        phase = random.random()
        return merge(
            _client("client-1", shifting((first, 0.0), _MINUTE, lambda rate: constant(rate, phase)), seconds),
            _client("client-2", constant(second, random.random()), seconds),
        )

    return arrivals


def _short_and_long(random: Random, seconds: float) -> Iterator[Arrival]:
    return merge(
        _client("short", poisson(8, random), seconds, 64, 64),
        _client("long", poisson(1.5, Random(random.random())), seconds),  # noqa: S311
    )


def _in_and_out(random: Random, seconds: float) -> Iterator[Arrival]:
    return merge(
        _client("long-in", poisson(8, random), seconds, 512, 32),
        _client("long-out", poisson(1.5, Random(random.random())), seconds, 32, 512),  # noqa: S311
    )


def _shift(random: Random, seconds: float) -> Iterator[Arrival]:
    part, one, two = seconds / 3, random.random(), random.random()
    first = phases(
        [
            (part, shifting((0.5, 0.0), _MINUTE, lambda rate: constant(rate, one))),
            (part, constant(1.0, one)),
            (part, constant(0.5, one)),
        ]
    )
    second = phases([(part, constant(rate, two)) for rate in (2.0, 1.0, 1.5)])
    return merge(_client("client-1", first, seconds), _client("client-2", second, seconds))


def _flood(random: Random, seconds: float) -> Iterator[Arrival]:
    return merge(
        _client(_VICTIM, constant(0.1, random.random()), seconds),
        _client("flood", constant(10.0, random.random()), seconds),
    )


_SUITES = (
    Suite("overload", "two clients, both over their share, one twice as much", 6 * _MINUTE, _steady(1.5, 3)),
    Suite("overload-multi", "eight clients over their share", 6 * _MINUTE, _steady(*[0.4] * 3, *[0.6] * 5)),
    Suite(
        "weighted",
        "four clients over their share, of weights 1 to 4",
        6 * _MINUTE,
        _steady(0.8, 0.8, 1.2, 1.6),
        {f"client-{weight}": float(weight) for weight in range(1, 5)},
    ),
    Suite("on-off", "one client pauses every other minute and is within its share", 10 * _MINUTE, _on_off(0.5, 2)),
    Suite("on-off-overload", "the same, over its share while it sends", 10 * _MINUTE, _on_off(2, 3)),
    Suite("short-long", "Poisson arrivals, many short requests and fewer long ones", 10 * _MINUTE, _short_and_long),
    Suite("in-out", "Poisson arrivals, long prompts against long outputs", 10 * _MINUTE, _in_and_out),
    Suite("shift", "on and off, then equal rates, then one to three", 15 * _MINUTE, _shift),
    Suite("flood", "a hundred requests of one client for each of another", 10 * _MINUTE, _flood, alone=_VICTIM),
)

SUITES = {suite.name: suite for suite in _SUITES}
