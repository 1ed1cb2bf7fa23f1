"""Who may still send: quotas for each tenant, bounds for all together."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from protocol.errors import BadRequest, Busy
from protocol.request import Request
from scheduler.generation import context_exceeded
from scheduler.journal.entry import Entry
from scheduler.quotas import Account, Quota

_SHORTEST_WAIT_MS, _LONGEST_WAIT_MS = 100, 60_000
#: Weight of the newest interval between two ends in their moving average.
_NEWEST = 0.1
#: Accounts that are looked at for each new one: more than one, so that those to be forgotten get fewer.
_LOOKED_AT = 2


@dataclass(frozen=True, slots=True)
class Bounds:
    """Accepted requests that haven't ended, in all, and the prompt tokens they hold in memory; the choices of one of them; the
    quota of a tenant."""

    in_all: int
    prompt_tokens: int
    choices: int
    quota: Callable[[str], Quota]


class Admission:
    """Counts outstanding requests and what tenants use, in O(1) for each. ``clock`` gives seconds.

    Accounts are in memory only: after a start their buckets are full. One with nothing to remember is forgotten when others come.
    """

    def __init__(self, bounds: Bounds, clock: Callable[[], float]) -> None:
        self._bounds = bounds
        self._clock = clock
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._tokens = 0
        self._last_end = 0.0
        self._interval_s = 1.0
        self.outstanding = 0

    def rebound(self, bounds: Bounds) -> None:
        """From now on these bounds hold; what is outstanding or used up remains so."""
        self._bounds = bounds
        now = self._clock()
        self._accounts = OrderedDict(
            (tenant, account.under(bounds.quota(tenant), now)) for tenant, account in self._accounts.items()
        )

    def enter(self, entry: Entry, *, journal_full: bool = False) -> None:
        """Take a place and pay for it from the tenant's quota. Raises Busy for now, BadRequest for good."""
        bounds, now = self._bounds, self._clock()
        account, tokens = self._account(entry.tenant), len(entry.prompt)
        _check_choices(entry, bounds.choices)
        _check_context(entry, account.quota)
        account.check(tokens, now)
        if account.outstanding + account.elsewhere >= account.quota.outstanding:
            detail = f"{account.quota.outstanding} requests of yours are outstanding, which is the limit"
            raise Busy("rate_limited", detail, self._wait_ms())
        if journal_full or self.outstanding >= bounds.in_all:
            raise Busy("overloaded", "too many requests are waiting", self._wait_ms())
        if self._tokens and self._tokens + _held(entry) > bounds.prompt_tokens:
            raise Busy("overloaded", "too many prompt tokens are waiting", self._wait_ms())
        self.enter_anyway(entry)
        account.pay(tokens, now)

    def enter_anyway(self, entry: Entry) -> None:
        """Take a place for a request that was accepted, and paid for, before."""
        if not self.outstanding:
            self._last_end = self._clock()  # having had nothing to do says nothing of the pace
        self.outstanding += 1
        self._account(entry.tenant).outstanding += 1
        self._tokens += _held(entry)

    def generated(self, entry: Entry) -> None:
        """A token of a request that has a place came out."""
        self._accounts[entry.tenant].pay_tokens(1, self._clock())

    def leave(self, entry: Entry) -> None:
        """A request has ended."""
        self.release(entry)
        now = self._clock()
        self._interval_s += _NEWEST * (now - self._last_end - self._interval_s)
        self._last_end = now

    def release(self, entry: Entry) -> None:
        """A place was taken for what can't run."""
        self.outstanding -= 1
        self._accounts[entry.tenant].outstanding -= 1
        self._tokens -= _held(entry)

    def undo(self, entry: Entry) -> None:
        """A place was taken, and paid for, by ``enter`` for what turned out not to need one."""
        self.release(entry)
        self._accounts[entry.tenant].refund(len(entry.prompt))

    def accounts(self) -> Iterator[tuple[str, Account]]:
        """Of the tenants that are kept in mind."""
        return iter(self._accounts.items())

    def spent_elsewhere(self, tenant: str, *, outstanding: int, requests: int, tokens: int) -> None:
        """What a tenant has outstanding in other replicas, and what it paid there since this was last said."""
        account = self._account(tenant)
        account.elsewhere = outstanding
        account.spent_elsewhere(requests, tokens, self._clock())

    def _account(self, tenant: str) -> Account:
        account = self._accounts.get(tenant)
        if account is None:
            self._forget_some()
            account = self._accounts[tenant] = Account(self._bounds.quota(tenant))
        return account

    def _forget_some(self) -> None:
        now = self._clock()
        for _ in range(min(_LOOKED_AT, len(self._accounts))):
            tenant = next(iter(self._accounts))
            if self._accounts[tenant].is_as_new(now):
                del self._accounts[tenant]
            else:
                self._accounts.move_to_end(tenant)

    def _wait_ms(self) -> int:
        """One place becomes free about every mean interval between two ends."""
        return min(max(round(1000 * self._interval_s), _SHORTEST_WAIT_MS), _LONGEST_WAIT_MS)


def _held(entry: Entry) -> int:
    """Prompt tokens in memory: each choice has its own."""
    return entry.request.num_choices * len(entry.prompt)


def _check_choices(entry: Entry, most: int) -> None:
    """Raises BadRequest for a request for more choices than the service generates for one."""
    request = entry.request
    if isinstance(request, Request) and request.num_choices > most:
        raise BadRequest("n" if request.best_of is None else "best_of", f"must be at most {most} here")


def _check_context(entry: Entry, quota: Quota) -> None:
    """Raises BadRequest for a request with more context than its tenant may have."""
    most, request = quota.max_context, entry.request
    if most is not None and len(entry.prompt) + (request.output_limit or 0) > most:
        raise context_exceeded(request, entry.prompt, f"your limit of {most} tokens")
