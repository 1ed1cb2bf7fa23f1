"""What replicas tell each other counts in each one's quotas and turns, once, and what the dead had outstanding no longer."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import SimpleNamespace

import psycopg
import pytest

from protocol.errors import Busy
from scheduler.admission import Admission, Bounds
from scheduler.core.fairness import FairQueue
from scheduler.core.sequence import Sequence
from scheduler.fleet import Fleet
from scheduler.journal.postgres import PostgresJournal
from scheduler.quotas import Quota
from scheduler.turns import Turns
from tests.scheduler.journals import entry, opened

QUOTA = Quota(outstanding=3, requests_per_s=4.0, tokens_per_min=60)


@dataclass
class Replica:
    """A fleet's member with all that it shares; nothing runs, so there is no egress to speak of."""

    journal: PostgresJournal

    def __post_init__(self) -> None:
        self.now = 0.0
        self.dropped: list[str] = []
        self.running: set[str] = set()
        self.queue = FairQueue()
        self.admission = Admission(Bounds(100, 10_000, 16, lambda _: QUOTA), lambda: self.now)
        self.turns = Turns(self.journal.number, lambda: 0.0, lambda _: 0.0)
        egress = SimpleNamespace(ids=lambda: set(self.running), drop=self.dropped.append)
        self.fleet = Fleet(self.journal, self.turns, lambda: 0.0, self.queue, self.admission, egress, None)

    def serve(self, id: str, tokens: int) -> None:
        """One more request is outstanding, and so many tokens of it came out."""
        self.admission.enter(entry(id))
        sequence = Sequence(id, [1, 2, 3], max_tokens=100, tenant=id.partition("/")[0])
        self.queue.push(sequence)
        self.queue.admit(sequence)
        for _ in range(tokens):
            self.admission.generated(entry(id))
        self.queue.charge_output({sequence.tenant: tokens})


@contextlib.asynccontextmanager
async def fleet(url: str, count: int = 2) -> AsyncIterator[list[Replica]]:
    async with contextlib.AsyncExitStack() as stack:
        members = [Replica(await stack.enter_async_context(opened(url, replica=f"r{n}"))) for n in range(count)]
        for member in members:
            await member.fleet.join()
        yield members


async def tell(*members: Replica) -> None:
    for member in members:
        await member.fleet._exchange()


async def test_service_elsewhere_counts_once_however_often_it_is_told(database):
    async with fleet(database, 3) as (a, b, c):
        a.serve("alice/1", 10)
        c.serve("alice/2", 5)
        await tell(a, b, c, a, b, c)
        assert b.queue.counter("alice") == 3 + 2 * 10 + 3 + 2 * 5
        assert a.queue.counter("alice") == c.queue.counter("alice") == b.queue.counter("alice")
        assert (a.queue.served("alice"), b.queue.served("alice")) == (23.0, 0.0), "its own remains its own"


async def test_a_newcomer_begins_with_everyone_as_equals_and_counts_from_then_on(database):
    async with fleet(database, 1) as (a,):
        a.serve("alice/1", 10)
        a.serve("bob/1", 0)
        await tell(a)
        async with opened(database, replica="new") as journal:
            new = Replica(journal)
            await new.fleet.join()
            assert new.queue.counter("alice") == 0.0
            await tell(new, a, new)
            assert new.queue.counter("alice") == 0.0
            a.serve("alice/2", 1)
            await tell(a, new)
            assert new.queue.counter("alice") == 5.0
            new.admission.enter(entry("alice/3"))
            with pytest.raises(Busy, match="3 requests of yours are outstanding"):
                new.admission.enter(entry("alice/9"))


async def test_quotas_hold_over_all(database):
    async with fleet(database) as (a, b):
        a.serve("alice/1", 50)
        await tell(a, b)
        b.serve("alice/2", 7)  # 53 of 60 tokens were used, its prompt has 3: that puts it into debt
        with pytest.raises(Busy, match="60 tokens per minute"):
            b.admission.enter(entry("alice/3"))
        await tell(b, a)
        with pytest.raises(Busy, match="60 tokens per minute"):
            a.admission.enter(entry("alice/3"))
        a.now = b.now = 7.0
        a.admission.enter(entry("alice/3"))


async def test_a_place_that_was_given_back_is_given_back_elsewhere(database):
    async with fleet(database) as (a, b):
        for number in range(3):
            a.admission.enter(entry(f"alice/{number}"))
        await tell(a, b)
        with pytest.raises(Busy, match="outstanding"):
            b.admission.enter(entry("alice/x"))
        for number in range(3):
            a.admission.undo(entry(f"alice/{number}"))
        await tell(a, b)
        for number in range(3):
            b.admission.enter(entry(f"alice/{number}"))


async def test_what_a_dead_replica_had_outstanding_is_outstanding_no_longer(database):
    async with fleet(database) as (a, b):
        for number in range(3):
            a.admission.enter(entry(f"alice/{number}"))
        await tell(a, b)
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE tokenbus.replicas SET expires_at = now() WHERE name = 'r0'")
        assert not b.turns.speaks
        await tell(b)
        assert b.turns.speaks
        b.admission.enter(entry("alice/x"))
        # It was only slow, and tells everything again, of which nothing counts twice.
        served = b.queue.counter("alice")
        a.journal._renewed_at -= 2 * a.journal.lease_s
        a.fleet._told = {}
        await tell(a, b)
        assert b.queue.counter("alice") == served
        b.now = 10.0
        with pytest.raises(Busy, match="outstanding"):
            b.admission.enter(entry("alice/y"))


async def test_what_was_lost_is_dropped_and_what_is_still_ours_goes_on(database):
    async with fleet(database) as (a, b):
        await a.journal.accept([entry("alice/kept"), entry("alice/lost")])
        a.running = {"alice/kept", "alice/lost", "alice/ended meanwhile"}
        with psycopg.connect(database) as connection:
            connection.execute("UPDATE tokenbus.requests SET owner = %s WHERE id = 'alice/lost'", (b.journal.number,))
        await a.fleet._drop_lost()
        assert sorted(a.dropped) == ["alice/ended meanwhile", "alice/lost"], "dropping what has ended does nothing"
