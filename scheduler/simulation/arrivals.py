"""What comes when: one request of one tenant, and what can be done to a stream of them; lazily, in time order."""

import heapq
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from random import Random
from typing import NamedTuple


class Arrival(NamedTuple):
    """``at`` in seconds since the beginning; ``prompt`` and ``output`` in tokens.

    It asked for up to ``max_tokens`` and says stop after ``output`` of them.
    """

    at: float
    tenant: str
    prompt: int
    output: int
    max_tokens: int


#: One request that nobody's tenant is yet: when, prompt tokens, output tokens.
Demand = tuple[float, int, int]


def assign(demands: Iterable[Demand], tenant: Callable[[], str], max_tokens: int | None = None) -> Iterator[Arrival]:
    """Give each request a tenant. ``max_tokens``: what all of them declare, should their output be shorter."""
    for at, prompt, output in demands:
        yield Arrival(at, tenant(), prompt, output, max(output, max_tokens or output))


def round_robin(count: int) -> Callable[[], str]:
    """``count`` tenants, one after the other."""
    turn = -1

    def draw() -> str:
        nonlocal turn
        turn = (turn + 1) % count
        return names[turn]

    names = _names(count)
    return draw


def zipf(count: int, exponent: float, random: Random) -> Callable[[], str]:
    """``count`` tenants, the k-th of them drawn in proportion to ``k ** -exponent``."""
    totals = list(accumulate(rank**-exponent for rank in range(1, count + 1)))
    names = _names(count)

    def draw() -> str:
        return names[bisect(totals, random.random() * totals[-1], 0, count - 1)]

    return draw


def merge(*streams: Iterator[Arrival]) -> Iterator[Arrival]:
    """All of them, in time order; at the same time in the order given."""
    return heapq.merge(*streams, key=lambda arrival: arrival.at)


def _names(count: int) -> list[str]:
    width = len(str(count - 1))
    return [f"t{number:0{width}}" for number in range(count)]
