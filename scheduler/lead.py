"""When to plan the next step while one runs: as late as may be without keeping the worker waiting.

Until then an arrival can still join that step, and whoever ends or is cancelled isn't computed in it in vain. What being late
costs is known, for the worker says how long it has waited: it may wait for a hundredth of its time. What it waits beyond that is
added to the lead, what it waits less is taken off (docs/decisions/0007-planning-ahead.md).
"""

from scheduler.estimate import Pace

#: The share of its time that the worker may wait for plans.
_WAITING = 0.01
#: By so much an event loop's timer may be late: epoll counts in milliseconds, and is asked for whole ones.
_TIMER_S = 0.001


class Lead:
    """How long before a step's expected end the next one is planned: between nothing and a whole step."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._lead_s = 0.0

    def delay_s(self, tokens: int) -> float:
        """How long after a step of so many tokens has begun the next one is to be planned; may be below 0."""
        return self._pace.fixed_s + tokens * self._pace.per_token_s - self._lead_s - _TIMER_S

    def observe(self, tokens: int, seconds: float, waited_s: float) -> None:
        """A step of so many tokens took so long, and the worker had waited for it so long while there was work."""
        self._pace.observe(tokens, seconds)
        self._lead_s = min(max(self._lead_s + waited_s - _WAITING * seconds, 0.0), seconds)
