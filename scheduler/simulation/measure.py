"""When each request came, began and ended, and how full the KV blocks were: some bytes per request, none per token."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from scheduler.core import sequence
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.figures import SHARES, Percentiles
from scheduler.simulation.histogram import Histogram

Times = NDArray[np.float64]
#: Which requests, by number.
Which = NDArray[np.int64] | slice
ALL = slice(None)


class Measure:
    """Requests are numbered as they come, tenants too; a sequence's id is its request's number."""

    def __init__(self) -> None:
        self.requests = 0
        self.refused = 0
        self.steps = 0
        self.tenants: dict[str, int] = {}
        self.longest_prompt = 0
        self._tenant = np.zeros(1024, dtype=np.int32)
        self._prompt = np.zeros(1024, dtype=np.int32)
        self._arrived: Times = np.zeros(1024)
        self._first: Times = np.full(1024, np.nan)
        self._last: Times = np.full(1024, np.nan)
        self._between = Histogram()
        self._slot_seconds = 0.0
        self._stored_seconds = 0.0

    def came(self, arrival: Arrival) -> None:
        """The next request, which was taken."""
        if self.requests == len(self._tenant):
            self._grow()
        number = self.requests
        self._tenant[number] = self.tenants.setdefault(arrival.tenant, len(self.tenants))
        self._prompt[number] = arrival.prompt
        self._arrived[number] = arrival.at
        self.longest_prompt = max(self.longest_prompt, arrival.prompt)
        self.requests += 1

    def stepped(self, now: float, ids: Sequence[str]) -> None:
        """Each of these sequences got a token."""
        self.steps += 1
        numbers = np.fromiter(map(int, ids), np.int64, len(ids))
        between = now - self._last[numbers]
        self._last[numbers] = now
        if np.isnan(between).any():
            begun = np.isnan(between)
            self._first[numbers[begun]] = now
            numbers, between = numbers[~begun], between[~begun]
        self._between.add(self._tenant[numbers], between)

    def stored(self, seconds: float, running: Iterable[sequence.Sequence], block_size: int) -> None:
        """For so long, these sequences hold blocks."""
        running = list(running)
        self._slot_seconds += seconds * block_size * sum([len(each.blocks) for each in running])
        self._stored_seconds += seconds * sum([each.computed for each in running])

    @property
    def kv_waste_ratio(self) -> float:
        return 1 - self._stored_seconds / self._slot_seconds if self._slot_seconds else 0.0

    def first_and_last(self, request: int) -> tuple[float, float]:
        """Seconds from its arrival to its first and to its last token so far."""
        arrived = self._arrived[request]
        return float(self._first[request] - arrived), float(self._last[request] - arrived)

    def by_tenant(self) -> Iterator[tuple[str, int, NDArray[np.int64]]]:
        """Each tenant, its number, and which requests are its."""
        order = np.argsort(self._tenant[: self.requests], kind="stable")
        ends = np.cumsum(np.bincount(self._tenant[: self.requests], minlength=len(self.tenants)))
        for (name, number), end in zip(self.tenants.items(), ends, strict=True):
            yield name, number, order[ends[number - 1] if number else 0 : end]

    def prompt_tokens(self) -> int:
        return int(self._prompt[: self.requests].sum())

    def output_tokens(self, which: Which = ALL, row: int | None = None) -> int:
        begun = int(np.count_nonzero(~np.isnan(self._first[: self.requests][which])))
        return begun + self._between.counted(row)

    def ttft_s(self, which: Which = ALL) -> Percentiles | None:
        return _percentiles((self._first - self._arrived)[: self.requests][which])

    def e2e_s(self, which: Which = ALL) -> Percentiles | None:
        return _percentiles((self._last - self._arrived)[: self.requests][which])

    def itl_s(self, row: int | None = None) -> Percentiles | None:
        """``row``: the tenant's number."""
        values = self._between.quantiles(SHARES, row)
        return Percentiles(*values) if values else None

    def _grow(self) -> None:
        more = len(self._tenant)
        self._tenant = np.concatenate([self._tenant, np.zeros(more, dtype=np.int32)])
        self._prompt = np.concatenate([self._prompt, np.zeros(more, dtype=np.int32)])
        self._arrived = np.concatenate([self._arrived, np.zeros(more)])
        self._first = np.concatenate([self._first, np.full(more, np.nan)])
        self._last = np.concatenate([self._last, np.full(more, np.nan)])


def _percentiles(values: Times) -> Percentiles | None:
    return Percentiles.of(values) if values.size else None
