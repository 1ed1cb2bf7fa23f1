"""A token bucket: so much at once, so much per second, and a debt is paid before anything else.

The libraries don't fit (looked at: limits 5.8, aiolimiter 1.3, pyrate-limiter 4.5, token-bucket 0.4). Quotas need the time until
a bucket lets something in, told without taking anything; a clock that is passed in; taking more than there is, for what is paid
afterwards; and giving back. limits counts windows, aiolimiter waits on the event loop's clock, token-bucket says yes or no,
pyrate-limiter knows no debt and never lets in what is over the burst.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class TokenBucket:
    """Holds up to ``burst`` units, at first that many, and gains ``rate`` a second; times are in seconds and never go back.

    ``used`` is what was missing from a full one ``at`` the last time something was taken. Kept is this, and not the time at which
    the bucket will be full again, so that a burst of whole units sums without rounding.
    """

    rate: float
    burst: float
    used: float = 0.0
    at: float = 0.0

    def ready_at(self, amount: float) -> float:
        """From when on it holds this much, or is full where this is more than it can hold."""
        excess = self.used + min(amount, self.burst) - self.burst
        return self.at + max(excess, 0) / self.rate

    def full_at(self) -> float:
        return self.ready_at(self.burst)

    def missing(self, now: float) -> float:
        """What it takes to fill it; more than the burst while it is in debt."""
        return max(self.used - self.rate * (now - self.at), 0)

    def take(self, amount: float, now: float) -> None:
        """Take this much, whether it is there or not."""
        self.used = self.missing(now) + amount
        self.at = now

    def give_back(self, amount: float) -> None:
        """Undo a take of this much."""
        self.used = max(self.used - amount, 0)
