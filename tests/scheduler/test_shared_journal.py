"""Replicas on one database: each request has one owner, and only what its owner writes of it counts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import psycopg
import pytest

from scheduler.journal.entry import JournalError, Listener, Piece, Taken
from scheduler.journal.members import News, Usage
from scheduler.journal.postgres import PostgresJournal
from tests.scheduler.journals import die, entry, finish, mark, opened, without_body


@contextlib.asynccontextmanager
async def replicas(url: str, *names: str) -> AsyncIterator[list[PostgresJournal]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(opened(url, replica=name)) for name in names]


def expire(url: str, journal: PostgresJournal) -> None:
    """Its lease runs out now: it was too slow to renew it."""
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE tokenbus.replicas SET expires_at = now() WHERE number = %s", (journal.number,))


def ids(entries) -> list[str]:
    return [one.id for one in entries]


# Who owns it


async def test_of_two_that_want_a_request_one_gets_it_and_the_other_is_told_that_it_is_not_its(database):
    async with replicas(database, "a", "b") as (a, b):
        assert await a.accept([entry("alice/1")]) == [None]
        assert await b.accept([entry("alice/1"), entry("alice/2")]) == [Taken(mark(), None, ours=False), None]
        assert await a.find(["alice/1", "alice/2"]) == [Taken(mark(), None), Taken(mark(), None, ours=False)]


async def test_many_at_once_in_any_order_have_one_owner_each(database):
    async with replicas(database, "a", "b", "c") as journals:
        names = [f"alice/{number}" for number in range(200)]
        orders = [names, names[::-1], names[100:] + names[:100]]
        answers = await asyncio.gather(
            *(
                journal.accept([entry(id) for id in order[first : first + 20]])
                for first in range(0, 200, 20)
                for journal, order in zip(journals, orders, strict=True)
            )
        )
        assert [taken for batch in answers for taken in batch].count(None) == 200
        held = [await journal.held() for journal in journals]
        assert sum(map(len, held)) == len(set.union(*held)) == 200


# Taking over


async def test_what_a_dead_replica_left_is_taken_over_when_its_lease_has_run_out_and_goes_on_where_it_was(database):
    async with replicas(database, "a", "b") as (a, b):
        await a.accept([entry(f"alice/{name}") for name in ("1-running", "2-ended", "delivered")])
        await a.progress([("alice/1-running", number, Piece([number, 7])) for number in range(3)])
        await a.end("alice/2-ended", b"the end")
        await finish(a, "alice/delivered")
        await die(a)
        assert await b.take_over() == [], "it may only be slow"
        expire(database, a)
        assert await b.take_over() == [
            entry("alice/1-running", attempt=2, pieces=[Piece([0, 7]), Piece([1, 7]), Piece([2, 7])]),
            without_body(entry("alice/2-ended", attempt=2, reply=b"the end")),
        ]
        assert await b.take_over() == []
        assert await b.find(["alice/1-running"]) == [Taken(mark(), None)]


async def test_who_leaves_in_order_leaves_at_once(database):
    async with replicas(database, "b") as (b,):
        async with opened(database, replica="a") as a:
            await a.accept([entry("alice/1")])
        assert ids(await b.take_over()) == ["alice/1"]


async def test_a_restarted_replica_takes_up_what_it_had_without_waiting_for_its_lease(database):
    async with opened(database, replica="a") as a:
        await a.accept([entry("alice/1")])
        await die(a)
        async with opened(database, replica="a") as again:
            assert ids(again.unfinished()) == ["alice/1"]
            assert again.number > a.number


async def test_those_who_live_share_what_is_left(database):
    async with replicas(database, "a", "b", "c") as (a, b, c):
        names = [f"alice/{number}" for number in range(10)]
        await a.accept([entry(id, accepted_at=float(number)) for number, id in enumerate(names)])
        expire(database, a)
        assert ids(await b.take_over()) == names[:5]
        assert len(await c.take_over()) == 3
        assert len(await b.take_over()) + len(await c.take_over()) == 2
        assert await b.take_over() == await c.take_over() == []


async def test_two_that_take_over_at_once_take_nothing_twice(database):
    async with replicas(database, "a", "b", "c") as (a, b, c):
        await a.accept([entry(f"alice/{number}") for number in range(100)])
        expire(database, a)
        taken = []
        while len(taken) < 100:
            for part in await asyncio.gather(b.take_over(), c.take_over()):
                taken += ids(part)
        assert len(set(taken)) == 100


# What is written by one that has lost it


async def test_one_that_was_only_slow_can_write_nothing_more(database):
    async with replicas(database, "a", "b") as (a, b):
        await a.accept([entry("alice/lost"), entry("alice/kept", "else")])
        await a.progress([("alice/lost", 0, Piece([1]))])
        with psycopg.connect(database) as connection:
            connection.execute(
                "UPDATE tokenbus.requests SET owner = %s WHERE id = 'alice/lost'", (b.number,)
            )  # as b does when the lease has run out
        assert await a.progress([("alice/lost", 1, Piece([2])), ("alice/kept", 0, Piece([3]))]) == {"alice/lost"}
        assert await a.end("alice/lost", b"a's end") is False
        await a.listen("alice/lost", [Listener("tokenbus/v1/alice/out/else")])
        await a.trial("alice/lost", begins=True)
        await a.delivered("alice/lost")
        assert await a.held() == {"alice/kept"}
        assert await b.progress([("alice/lost", 1, Piece([9]))]) == set()
        expire(database, b)
        assert await a.take_over() == [entry("alice/lost", attempt=2, pieces=[Piece([1]), Piece([9])])]


async def test_a_piece_that_is_being_written_is_not_left_behind(database):
    async with replicas(database, "a", "b") as (a, b):
        await a.accept([entry("alice/1")])
        async with await psycopg.AsyncConnection.connect(database) as writing:
            await writing.execute("SELECT id FROM tokenbus.requests FOR SHARE")
            await writing.execute("INSERT INTO tokenbus.progress VALUES ('alice/1', 0, %s)", (b"\x91\x05",))
            expire(database, a)
            assert await b.take_over() == [], "its owner is writing"
            await writing.commit()
            assert await b.take_over() == [entry("alice/1", attempt=2, pieces=[Piece([5])])]


async def test_a_lease_that_ran_out_unnoticed_is_renewed_and_counted_and_nothing_is_lost(database):
    async with replicas(database, "a", "b") as (a, b):
        await a.accept([entry("alice/1")])
        a._renewed_at -= 2 * a.lease_s
        expire(database, a)
        await b.exchange(0.0, {})
        with psycopg.connect(database) as connection:
            assert connection.execute("SELECT number FROM tokenbus.replicas").fetchall() == [(b.number,)], "buried"
        await a.exchange(0.0, {})
        assert a.lapses == 1
        await a.exchange(0.0, {})
        assert a.lapses == 1
        assert await b.take_over() == []
        assert await a.take_over() == [], "its own is no orphan"
        assert await a.end("alice/1", b"reply")


# Who answers for what has ended


async def test_its_owner_replays_a_result_and_for_a_dead_owner_who_has_lived_longest(database):
    async with replicas(database, "a", "b", "c") as (a, b, c):
        await a.accept([entry("alice/1"), entry("alice/running")])
        await finish(a, "alice/1")

        async def answering(id: str) -> list[PostgresJournal]:
            return [one for one in (a, b, c) for taken in await one.find([id]) if taken.ours]

        assert await answering("alice/1") == [a]
        expire(database, a)
        assert await answering("alice/1") == [a, b], "a doesn't know"
        assert await answering("alice/running") == [a], "it is going to be taken over, not replayed"


# What they tell each other


async def test_they_hear_of_each_others_load_and_of_what_changed(database):
    async with replicas(database, "a", "b") as (a, b):
        assert await a.exchange(1.5, {"alice": Usage(2, 3, 40, 80.5)}) == News({b.number: 0.0}, {})
        heard = await b.exchange(0.25, {})
        assert heard == News({a.number: 1.5}, {a.number: {"alice": Usage(2, 3, 40, 80.5)}})
        await a.exchange(0.5, {"alice": Usage(0, 3, 50, 100.5), "bob": Usage(1, 1, 4, 4.0)})
        assert (await b.exchange(0.25, {})).usage[a.number]["alice"] == Usage(0, 3, 50, 100.5)
        async with opened(database, replica="c") as c:
            news = await c.exchange(0.0, {})
            assert news.loads == {a.number: 0.5, b.number: 0.25}
            assert set(news.usage[a.number]) == {"alice", "bob"}, "at first everything"
        expire(database, a)
        assert await b.exchange(0.0, {}) == News({}, {}), "who is dead is no longer heard of"


# What it can't use


async def test_a_database_of_another_version_is_refused(database):
    with psycopg.connect(database) as connection:
        connection.execute("CREATE SCHEMA tokenbus")
        connection.execute("COMMENT ON SCHEMA tokenbus IS 'tokenbus journal, version 9'")
    with pytest.raises(JournalError, match="says 'tokenbus journal, version 9', this is for"):
        await opened(database).__aenter__()


async def test_where_there_is_no_database_the_message_names_it_and_no_password():
    url = "postgresql://svc@localhost:1/journal"
    with pytest.raises(JournalError, match="the journal postgresql://svc@localhost:1/journal can't be used") as caught:
        await opened(url, password="hunter2").__aenter__()
    assert "hunter2" not in str(caught.value)


async def test_when_the_database_goes_away_whoever_waits_is_told(database):
    async with opened(database) as journal:
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'main'")
        with pytest.raises(JournalError, match="can't be written"):
            await journal.accept([entry("alice/1")])
        with pytest.raises(JournalError, match="can't be written"):
            await journal.find(["alice/1"])
