"""How far apart the service of two tenants gets while both of them have something waiting."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

#: So many tenants are watched, the first to come: each moment costs their number squared.
MOST_TENANTS = 32
#: The gap over time is noted so often.
_NOTE_EVERY_S = 1.0

Matrix = NDArray[np.float64]


class ServiceGap:
    """The largest difference in service per weight that two tenants got, over all intervals in which both had something waiting.

    Over such an interval, from t1 to t2, the difference of their totals moves from D(t1) to D(t2); the largest move within a
    stretch of waiting is its highest D less its lowest, so each pair keeps these two, and forgets them when either waits no more.
    """

    def __init__(self) -> None:
        self.tenants: list[str] = []
        self.widest = 0.0
        #: (seconds, how far apart the furthest pair has got since both of them wait)
        self.history: list[tuple[float, float]] = []
        self._waiting = np.zeros(0, dtype=bool)
        self._both = np.zeros((0, 0), dtype=bool)
        self._highest: Matrix = np.zeros((0, 0))
        self._first: Matrix = np.zeros((0, 0))

    def watch(self, tenant: str) -> None:
        """Another tenant has come."""
        if len(self.tenants) < MOST_TENANTS:
            self.tenants.append(tenant)
            self._waiting = np.pad(self._waiting, (0, 1))
            self._both, self._highest, self._first = (
                np.pad(matrix, (0, 1)) for matrix in (self._both, self._highest, self._first)
            )

    def observe(self, now: float, served: Callable[[str], float], waits: Callable[[str], bool]) -> None:
        """Look at everybody. To be called whenever somebody was served, began to wait or stopped waiting."""
        waiting = np.array([waits(tenant) for tenant in self.tenants], dtype=bool)
        if np.count_nonzero(waiting) < 2:
            self._waiting = waiting
            self._both[:] = False
            if self._is_due(now):
                self.history.append((now, 0.0))
            return
        totals = np.array([served(tenant) for tenant in self.tenants])
        apart = totals[:, None] - totals
        if not np.array_equal(waiting, self._waiting):
            self._begin(waiting, apart)
        np.maximum(self._highest, apart, out=self._highest)
        # The lowest of (p, q) is the highest of (q, p), its sign changed.
        self.widest = max(self.widest, float(((apart + self._highest.T) * self._both).max()))
        if self._is_due(now):
            self.history.append((now, float((np.abs(apart - self._first) * self._both).max())))

    def _begin(self, waiting: NDArray[np.bool_], apart: Matrix) -> None:
        """Others wait than before: a pair of which both wait now, and didn't, starts afresh."""
        both = waiting[:, None] & waiting
        still = both & self._both
        self._highest = np.where(still, self._highest, apart)
        self._first = np.where(still, self._first, apart)
        self._waiting, self._both = waiting, both

    def _is_due(self, now: float) -> bool:
        return not self.history or now >= self.history[-1][0] + _NOTE_EVERY_S
