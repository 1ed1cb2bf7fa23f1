"""Made-up demand: when requests come, and how long they are. What is random is drawn from the generator given."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import count, cycle, takewhile
from random import Random

from scheduler.simulation.arrivals import Demand

#: Draws one length in tokens, at least 1.
Lengths = Callable[[], int]


def constant(rate: float, phase: float = 0.0) -> Iterator[float]:
    """Times ``1/rate`` seconds apart, the first after ``phase`` of such a gap; none at rate 0."""
    return ((number + phase) / rate for number in count()) if rate else iter(())


def poisson(rate: float, random: Random) -> Iterator[float]:
    """A Poisson process of ``rate`` per second; nothing at rate 0."""
    at = 0.0
    while rate:
        at += random.expovariate(rate)
        yield at


def until(times: Iterable[float], end: float) -> Iterator[float]:
    """Those before ``end`` seconds."""
    return takewhile(lambda at: at < end, times)


def phases(parts: Iterable[tuple[float, Iterable[float]]]) -> Iterator[float]:
    """One pattern after the other, each for so many seconds and as if it began at 0 s."""
    start = 0.0
    for seconds, times in parts:
        for at in until(times, seconds):
            yield start + at
        start += seconds


def shifting(rates: Iterable[float], period: float, pattern: Callable[[float], Iterable[float]]) -> Iterator[float]:
    """Each rate for ``period`` seconds, again and again; a rate of 0 makes that on and off. ``pattern``: the times of a rate."""
    return phases((period, pattern(rate)) for rate in cycle(rates))


def demands(times: Iterable[float], prompt: Lengths, output: Lengths) -> Iterator[Demand]:
    return ((at, prompt(), output()) for at in times)


def lengths(text: str, random: Random) -> Lengths:
    """``256``; ``16-512``: uniform; ``geometric:64``: of that mean; ``lognormal:128:0.8``: with the sigma of its logarithm.

    Raises ValueError.
    """
    kind, _, rest = text.partition(":")
    try:
        match kind:
            case "geometric":
                return _geometric(_positive(rest), random)
            case "lognormal":
                mean, _, sigma = rest.partition(":")
                return _lognormal(_positive(mean), _positive(sigma), random)
            case _:
                low, _, high = kind.partition("-")
                return _uniform(int(low), int(high or low), random)
    except ValueError:
        raise ValueError(
            f"{text!r} must look like 256, 16-512, geometric:64 or lognormal:128:0.8, and be at least 1"
        ) from None


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError
    return value


def _uniform(low: int, high: int, random: Random) -> Lengths:
    if not 1 <= low <= high:
        raise ValueError
    return (lambda: low) if low == high else (lambda: random.randint(low, high))


def _geometric(mean: float, random: Random) -> Lengths:
    if mean <= 1:
        raise ValueError
    scale = 1 / math.log1p(-1 / mean)
    return lambda: 1 + int(math.log(1 - random.random()) * scale)


def _lognormal(mean: float, sigma: float, random: Random) -> Lengths:
    middle = math.log(mean) - sigma * sigma / 2
    return lambda: max(1, round(random.lognormvariate(middle, sigma)))
