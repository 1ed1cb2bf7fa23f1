"""How many a second, over the last few seconds."""

from collections import deque


class Rate:
    """``window_s``: how far back it looks. Times are in seconds and never go back; O(1) amortised."""

    def __init__(self, window_s: float = 5.0) -> None:
        self._window_s = window_s
        self._counts: deque[tuple[float, int]] = deque()
        self._sum = 0

    def add(self, count: int, at: float) -> None:
        self._counts.append((at, count))
        self._sum += count
        self._forget(at)

    def per_s(self, now: float) -> float:
        self._forget(now)
        return self._sum / self._window_s

    def _forget(self, now: float) -> None:
        while self._counts and self._counts[0][0] <= now - self._window_s:
            self._sum -= self._counts.popleft()[1]
