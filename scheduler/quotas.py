"""What one tenant may ask for, and how much of that it has used."""

import math
from dataclasses import dataclass

from protocol.errors import Busy
from scheduler.bucket import TokenBucket


@dataclass(frozen=True, slots=True)
class Quota:
    """The limits of a tenant; None: no limit.

    ``outstanding``: accepted requests that haven't ended. ``tokens_per_min``: tokens of prompts and answers. ``max_context``:
    tokens of one request's prompt together with those it asks for.
    """

    outstanding: int
    requests_per_s: float | None = None
    tokens_per_min: int | None = None
    max_context: int | None = None


class Account:
    """What a tenant has outstanding, here and ``elsewhere``, what it has paid in all, and its buckets. They are full at first.

    A request is let in while its bucket holds one, and the bucket of tokens the prompt's (or is full, for a longer prompt). Then
    both are paid. Each generated token is paid when it comes, though it may put the bucket into debt, which keeps the next
    request out until it is made up for: in the long run a tenant gets its rate, whatever it asks for.
    """

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.outstanding = 0
        self.elsewhere = 0
        self.requests = 0
        self.tokens = 0
        rate, tokens = quota.requests_per_s, quota.tokens_per_min
        self._requests = None if rate is None else TokenBucket(rate, max(rate, 1.0))
        self._tokens = None if tokens is None else TokenBucket(tokens / 60, tokens)

    def under(self, quota: Quota, now: float) -> "Account":
        """The same account under another quota: what is used up remains so."""
        account = Account(quota)
        account.outstanding, account.elsewhere = self.outstanding, self.elsewhere
        account.requests, account.tokens = self.requests, self.tokens
        for old, new in ((self._requests, account._requests), (self._tokens, account._tokens)):
            if old is not None and new is not None:
                new.take(old.missing(now), now)
        return account

    def check(self, prompt_tokens: int, now: float) -> None:
        """Raises Busy while a bucket doesn't let a request of so many tokens in, with the time until both do."""
        waits: list[tuple[float, str]] = []
        if self._requests is not None:
            limit = f"{self.quota.requests_per_s:g} requests per second"
            waits.append((self._requests.ready_at(1), limit))
        if self._tokens is not None:
            limit = f"{self.quota.tokens_per_min} tokens per minute, prompts and answers together"
            waits.append((self._tokens.ready_at(prompt_tokens), limit))
        ready_at, limit = max(waits, default=(now, ""))
        if now < ready_at:
            raise Busy("rate_limited", f"your limit is {limit}", math.ceil(1000 * (ready_at - now)))

    def pay(self, prompt_tokens: int, now: float) -> None:
        """For a request that is let in."""
        self.requests += 1
        if self._requests is not None:
            self._requests.take(1, now)
        self.pay_tokens(prompt_tokens, now)

    def pay_tokens(self, count: int, now: float) -> None:
        self.tokens += count
        if self._tokens is not None:
            self._tokens.take(count, now)

    def refund(self, prompt_tokens: int) -> None:
        """Undo a ``pay``."""
        self.requests -= 1
        self.tokens -= prompt_tokens
        if self._requests is not None:
            self._requests.give_back(1)
        if self._tokens is not None:
            self._tokens.give_back(prompt_tokens)

    def spent_elsewhere(self, requests: int, tokens: int, now: float) -> None:
        """So much was paid in other places that share the quota; less than nothing where it was refunded."""
        for bucket, amount in ((self._requests, requests), (self._tokens, tokens)):
            if bucket is not None and amount > 0:
                bucket.take(amount, now)
            elif bucket is not None:
                bucket.give_back(-amount)

    def is_as_new(self, now: float) -> bool:
        """Whether forgetting it changes nothing."""
        buckets = (self._requests, self._tokens)
        idle = not self.outstanding and not self.elsewhere
        return idle and all(bucket is None or bucket.full_at() <= now for bucket in buckets)
