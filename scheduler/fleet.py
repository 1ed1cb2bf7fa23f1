"""A replica among others: it shares what it did for tenants, takes over what dead ones left, and drops what it lost."""

import asyncio
import logging
from collections.abc import Callable

from scheduler.admission import Admission
from scheduler.core.fairness import FairQueue
from scheduler.journal.members import News, Usage
from scheduler.journal.postgres import PostgresJournal
from scheduler.mqtt.egress import Egress
from scheduler.recovery import Recovery
from scheduler.turns import Turns

logger = logging.getLogger(__name__)

#: How often the replicas hear of each other in the time of a lease.
_EXCHANGES = 5
#: Replicas that seem to have died are kept in mind, for one may only have been slow.
_MOST_DEAD = 100
_NONE = Usage()


class Fleet:
    """``load`` is what is told of ours; see ``Turns``. After ``retire`` nothing more is taken over."""

    def __init__(
        self,
        journal: PostgresJournal,
        turns: Turns,
        load: Callable[[], float],
        queue: FairQueue,
        admission: Admission,
        egress: Egress,
        recovery: Recovery,
    ) -> None:
        self._journal = journal
        self._turns = turns
        self._load = load
        self._queue = queue
        self._admission = admission
        self._egress = egress
        self._recovery = recovery
        self._told: dict[str, Usage] = {}
        self._live: set[int] = set()
        self._heard: dict[int, dict[str, Usage]] = {}
        self._pause_s = journal.lease_s / _EXCHANGES
        self._retired = False

    async def join(self) -> None:
        """Hear of the others; what they did before is as good as nothing, for all tenants begin here as equals."""
        news = await self._journal.exchange(self._load(), {})
        self._heard = news.usage
        self._meet(news)
        for tenant in {tenant for usage in news.usage.values() for tenant in usage}:
            self._admission.spent_elsewhere(tenant, outstanding=self._outstanding(tenant), requests=0, tokens=0)

    def retire(self) -> None:
        self._retired = True

    async def exchange_regularly(self) -> None:
        """Tell and hear, for ever. Should our lease have run out, what others took over meanwhile is dropped here."""
        lapses = 0
        while True:
            await asyncio.sleep(self._pause_s)
            await self._exchange()
            if self._journal.lapses > lapses:
                lapses = self._journal.lapses
                self._told = {}  # it may be forgotten, with us
                await self._drop_lost()

    async def take_over_regularly(self) -> None:
        """Go on with what dead replicas had accepted, until ``retire``."""
        while not self._retired:
            if entries := await self._journal.take_over():
                logger.warning("taking over what another replica left", extra={"requests": len(entries)})
                for entry in entries:
                    self._egress.drop(entry.id)  # it was ours before, and we haven't noticed that we had lost it
                await self._recovery.take_up(entries)
                for entry in entries:
                    self._egress.cancel_as_missed(entry.id)
            await asyncio.sleep(self._pause_s)

    async def _exchange(self) -> None:
        news = await self._journal.exchange(self._load(), self._changed())
        spent: dict[str, list[Usage]] = {tenant: [] for dead in self._meet(news) for tenant in self._heard[dead]}
        for replica, usage in news.usage.items():
            before = self._heard.setdefault(replica, {})
            for tenant, now in usage.items():
                spent.setdefault(tenant, []).append(_since(before.get(tenant, _NONE), now))
            before.update(usage)
        for tenant, shares in spent.items():
            self._admission.spent_elsewhere(
                tenant,
                outstanding=self._outstanding(tenant),
                requests=sum(share.requests for share in shares),
                tokens=sum(share.tokens for share in shares),
            )
        self._queue.charge_elsewhere({tenant: sum(s.service for s in shares) for tenant, shares in spent.items()})

    def _meet(self, news: News) -> set[int]:
        """Who lives; returns of whom we heard and who died meanwhile."""
        died = (self._live - news.loads.keys()) & self._heard.keys()
        self._live = set(news.loads)
        self._turns.hear(news.loads)
        for replica in sorted(self._heard.keys() - self._live - died)[:-_MOST_DEAD]:
            del self._heard[replica]
        return died

    def _changed(self) -> dict[str, Usage]:
        """What the others haven't been told yet."""
        now = {
            tenant: Usage(account.outstanding, account.requests, account.tokens, self._queue.served(tenant))
            for tenant, account in self._admission.accounts()
        }
        changed = {tenant: usage for tenant, usage in now.items() if self._told.get(tenant, _NONE) != usage}
        self._told = now
        return changed

    def _outstanding(self, tenant: str) -> int:
        return sum(self._heard.get(replica, {}).get(tenant, _NONE).outstanding for replica in self._live)

    async def _drop_lost(self) -> None:
        """What we run and no longer hold: its new owner answers."""
        running = self._egress.ids()
        lost = running - await self._journal.held()
        logger.warning("the lease had run out", extra={"requests_lost": len(lost)})
        for id in lost:
            self._egress.drop(id)


def _since(before: Usage, now: Usage) -> Usage:
    """Refunds count; service never shrinks, unless it was forgotten."""
    return Usage(
        now.outstanding,
        now.requests - before.requests,
        now.tokens - before.tokens,
        max(now.service - before.service, 0.0),
    )
