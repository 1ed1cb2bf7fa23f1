"""Counts of durations in buckets that grow by 1%, one row per tenant: memory doesn't grow with what is counted."""

import math

import numpy as np
from numpy.typing import NDArray

#: Ratio of two neighbouring bounds: what is read back is off by half of a percent at most.
RESOLUTION = 0.01
_SHORTEST_S = 1e-6
#: Enough for 23,000 s; what is longer counts as that.
_BUCKETS = 2400
_SCALE = 1 / math.log1p(RESOLUTION)


class Histogram:
    def __init__(self) -> None:
        self._counts = np.zeros((1, _BUCKETS), dtype=np.uint32)

    def add(self, rows: NDArray[np.int32], seconds: NDArray[np.float64]) -> None:
        """Count each duration in its row."""
        while rows.size and rows.max() >= len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        buckets = (np.log(np.maximum(seconds / _SHORTEST_S, 1)) * _SCALE).astype(np.int64)
        np.add.at(self._counts, (rows, np.minimum(buckets, _BUCKETS - 1)), 1)

    def counted(self, row: int | None = None) -> int:
        """How many durations a row, or all of them, hold."""
        return int(self._of(row).sum())

    def quantiles(self, shares: tuple[float, ...], row: int | None = None) -> list[float]:
        """The durations that so many of a row, or of all, don't exceed. Empty when none was counted."""
        totals = np.cumsum(self._of(row))
        if not totals[-1]:
            return []
        ranks = [max(math.ceil(share * int(totals[-1])), 1) for share in shares]
        return [_SHORTEST_S * (1 + RESOLUTION) ** (int(bucket) + 0.5) for bucket in np.searchsorted(totals, ranks)]

    def _of(self, row: int | None) -> NDArray[np.uint64]:
        rows = self._counts if row is None else self._counts[row : row + 1]
        totals: NDArray[np.uint64] = rows.sum(axis=0, dtype=np.uint64)
        return totals
