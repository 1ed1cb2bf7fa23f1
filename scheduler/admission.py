"""Who may still send: bounds on what is outstanding, for each tenant and for all together."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from protocol.errors import Busy

_SHORTEST_WAIT_MS, _LONGEST_WAIT_MS = 100, 60_000
#: Weight of the newest interval between two ends in their moving average.
_NEWEST = 0.1


@dataclass(frozen=True, slots=True)
class Bounds:
    """Accepted requests that haven't ended, per tenant and in all, and the prompt tokens they hold in memory."""

    per_tenant: int
    in_all: int
    prompt_tokens: int


class Admission:
    """Counts outstanding requests. ``clock`` gives seconds."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self._bounds = bounds
        self._clock = clock
        self._requests: Counter[str] = Counter()
        self._tokens = 0
        self._last_end = 0.0
        self._interval_s = 1.0

    @property
    def outstanding(self) -> int:
        return self._requests.total()

    def enter(self, tenant: str, tokens: int, *, journal_full: bool = False) -> None:
        """Take a place for a prompt of this many tokens. Raises Busy when there is none."""
        bounds = self._bounds
        if self._requests[tenant] >= bounds.per_tenant:
            detail = f"{bounds.per_tenant} requests of yours are outstanding, which is the limit"
            raise Busy("rate_limited", detail, self._wait_ms())
        if journal_full or self.outstanding >= bounds.in_all:
            raise Busy("overloaded", "too many requests are waiting", self._wait_ms())
        if self._tokens and self._tokens + tokens > bounds.prompt_tokens:
            raise Busy("overloaded", "too many prompt tokens are waiting", self._wait_ms())
        self.enter_anyway(tenant, tokens)

    def enter_anyway(self, tenant: str, tokens: int) -> None:
        """Take a place for a request that was accepted before."""
        if not self._requests:
            self._last_end = self._clock()  # having had nothing to do says nothing of the pace
        self._requests[tenant] += 1
        self._tokens += tokens

    def leave(self, tenant: str, tokens: int) -> None:
        """A request has ended."""
        self.release(tenant, tokens)
        now = self._clock()
        self._interval_s += _NEWEST * (now - self._last_end - self._interval_s)
        self._last_end = now

    def release(self, tenant: str, tokens: int) -> None:
        """A place was taken for what turned out not to need one."""
        self._requests[tenant] -= 1
        if not self._requests[tenant]:
            del self._requests[tenant]
        self._tokens -= tokens

    def _wait_ms(self) -> int:
        """One place becomes free about every mean interval between two ends."""
        return min(max(round(1000 * self._interval_s), _SHORTEST_WAIT_MS), _LONGEST_WAIT_MS)
