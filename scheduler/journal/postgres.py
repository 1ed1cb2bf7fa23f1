"""The journal that replicas share: PostgreSQL. Each request has one owner, and only what its owner writes of it counts."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, Self

import msgspec
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from scheduler.journal import members
from scheduler.journal.entry import Entry, JournalError, Listener, Piece, Taken, digest
from scheduler.journal.groups import GroupCommit
from scheduler.journal.members import News, Statement, Usage
from scheduler.journal.row import body_of, encode, encode_piece, load

_VERSION = "tokenbus journal, version 1"
_LOCK = 0x746B6275  # "tkbu": whoever holds it looks whether the tables are there

_SCHEMA = f"""
CREATE SCHEMA tokenbus;
COMMENT ON SCHEMA tokenbus IS '{_VERSION}';
CREATE TYPE tokenbus.state AS ENUM ('running', 'ended', 'delivered');
CREATE TABLE tokenbus.requests (
    id text COLLATE "C" PRIMARY KEY,
    number bigint GENERATED ALWAYS AS IDENTITY,
    owner bigint NOT NULL,
    state tokenbus.state NOT NULL,
    digest bytea NOT NULL,
    accepted_at float8 NOT NULL,
    ended_at float8,
    attempt int NOT NULL,
    trials int NOT NULL DEFAULT 0,
    listeners bytea NOT NULL,
    body bytea,
    reply bytea
);
CREATE INDEX by_owner ON tokenbus.requests (owner) WHERE state <> 'delivered';
CREATE INDEX by_end ON tokenbus.requests (ended_at) WHERE state = 'delivered';
CREATE TABLE tokenbus.progress (id text COLLATE "C", number int, tokens bytea NOT NULL, PRIMARY KEY (id, number));
{members.SCHEMA}
"""

# Sorted by id, as everyone's, so that two that want the same ids seldom wait for each other.
_ACCEPT = """
INSERT INTO tokenbus.requests (id, owner, state, digest, accepted_at, attempt, listeners, body)
SELECT id, %s, 'running', digest, accepted_at, attempt, listeners, body
FROM unnest(%s::text[], %s::bytea[], %s::float8[], %s::int[], %s::bytea[], %s::bytea[])
    AS new (id, digest, accepted_at, attempt, listeners, body)
ON CONFLICT (id) DO NOTHING RETURNING id
"""
# For a dead owner's results the one that has lived longest answers; what it left running is going to be taken over.
_FIND = """
SELECT id, digest, reply, owner = %s OR (
    reply IS NOT NULL AND owner NOT IN (SELECT number FROM tokenbus.live)
    AND %s = (SELECT min(number) FROM tokenbus.live)
) FROM tokenbus.requests WHERE id = ANY(%s)
"""
# Locked until the commit: who takes the request over then finds these pieces.
_PROGRESS = """
WITH ours AS (SELECT id FROM tokenbus.requests WHERE id = ANY(%s) AND owner = %s AND state = 'running' FOR SHARE)
INSERT INTO tokenbus.progress
SELECT piece.* FROM unnest(%s::text[], %s::int[], %s::bytea[]) AS piece (id, number, tokens) JOIN ours USING (id)
RETURNING id
"""
_END = """
WITH ended AS (
    UPDATE tokenbus.requests SET state = 'ended', reply = %s, ended_at = %s, body = NULL
    WHERE id = %s AND owner = %s RETURNING id
), gone AS (DELETE FROM tokenbus.progress USING ended WHERE progress.id = ended.id)
SELECT id FROM ended
"""
_LISTEN = "UPDATE tokenbus.requests SET listeners = %s WHERE id = %s AND owner = %s"
_DELIVERED = "UPDATE tokenbus.requests SET state = 'delivered' WHERE id = %s AND owner = %s"
_TRIAL = "UPDATE tokenbus.requests SET trials = CASE WHEN %s THEN trials + 1 ELSE 0 END WHERE id = %s AND owner = %s"
_HELD = "SELECT id FROM tokenbus.requests WHERE owner = %s AND state = 'running'"
# Each of those that live takes its part; rows that another one is taking are left to it.
_TAKE_OVER = """
WITH orphans AS (
    SELECT id FROM tokenbus.requests
    WHERE state <> 'delivered' AND owner NOT IN (SELECT number FROM tokenbus.live) AND owner <> %(us)s
    ORDER BY accepted_at, number
    LIMIT (
        SELECT ceil(count(*) / (SELECT greatest(count(*), 1.0) FROM tokenbus.live))::bigint FROM tokenbus.requests
        WHERE state <> 'delivered' AND owner NOT IN (SELECT number FROM tokenbus.live)
    )
    FOR UPDATE SKIP LOCKED
), taken AS (
    UPDATE tokenbus.requests SET owner = %(us)s, attempt = attempt + 1 FROM orphans WHERE requests.id = orphans.id
    RETURNING requests.*
)
SELECT id, accepted_at, attempt, trials, listeners, body, reply FROM taken ORDER BY accepted_at, number
"""
# A statement of its own: one that ran together with the taking wouldn't see what the old owner wrote last.
_PIECES = "SELECT id, tokens FROM tokenbus.progress WHERE id = ANY(%s) ORDER BY id, number"
_PRUNE = """
DELETE FROM tokenbus.requests WHERE id IN (
    SELECT id FROM tokenbus.requests WHERE state = 'delivered' AND ended_at < %s
    ORDER BY ended_at LIMIT %s FOR UPDATE SKIP LOCKED
) RETURNING id
"""

_COUNT = "SELECT count(*) FROM tokenbus.requests"

_PRUNE_EVERY_S = 30.0
_PRUNE_AT_ONCE = 1000
_CONNECT_S = 10
#: Times that a lease is renewed before it would run out.
_RENEWALS = 5

#: Its time was over just when it was asked for: who asks once more has it run again.
_FORGOTTEN = Taken(b"", None, ours=False)

_Rows = list[tuple[Any, ...]]


class _Work(NamedTuple):
    """Statements, and what their rows mean together."""

    statements: list[Statement]
    read: Callable[[list[_Rows]], Any]


class PostgresJournal:
    """See ``Journal``; use as ``async with PostgresJournal(url, ...) as journal``, in any number of replicas.

    ``url`` is libpq's, as are the environment and the files it reads; it is logged, so it must hold no password. Each process
    has a ``number`` of its own, which its rows carry as their owner, and keeps a lease of ``lease_s``; ``lapses`` counts how
    often it ran out all the same. ``unfinished`` is what earlier processes of the same ``replica`` left, and a part of what
    others did. Results are kept for ``retention_s`` after delivery. Entering raises JournalError for a database that can't
    be used.
    """

    durable = True
    full = False

    number: int

    def __init__(
        self,
        url: str,
        *,
        replica: str,
        password: str | None = None,
        lease_s: float,
        retention_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.lease_s = lease_s
        self.lapses = 0
        self._url = url
        self._name = f"the journal {url}"
        self._password = password
        self._replica = replica
        self._retention_s = retention_s
        self._clock = clock
        self._load = 0.0
        self._renewed_at = 0.0
        self._heard_any = False
        self._rows = 0
        self._unfinished: list[Entry] = []

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except (psycopg.Error, msgspec.MsgspecError) as error:
            raise JournalError(f"{self._name} can't be used: {error}") from None
        self._tasks = {
            asyncio.create_task(self._renew_regularly(), name="lease"),
            asyncio.create_task(self._prune_regularly(), name="journal pruning"),
        }
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._run(members.LEAVE, self.number).add_done_callback(_forget)  # what is left is for the others, at once
        await self._groups.close()
        await self._connection.close()

    @property
    def lag(self) -> int:
        return len(self._groups)

    @property
    def rows(self) -> int:
        """Of all replicas when this one last looked, and what it wrote or dropped since."""
        return self._rows

    def unfinished(self) -> Sequence[Entry]:
        return self._unfinished

    def accept(self, entries: Sequence[Entry]) -> Awaitable[list[Taken | None]]:
        rows = sorted(
            (e.id, digest(e.model, e.request), e.accepted_at, e.attempt, encode(e.listeners), body_of(e))
            for e in {entry.id: entry for entry in reversed(entries)}.values()
        )
        ids = [entry.id for entry in entries]
        columns = [list(column) for column in zip(*rows, strict=True)] or [[]] * 6

        def read(answers: list[_Rows]) -> list[Taken | None]:
            new = {id for (id,) in answers[0]}
            self._rows += len(new)
            found = _by_id(answers[1])
            results: list[Taken | None] = []
            for id in ids:
                results.append(None if id in new else found.get(id, _FORGOTTEN))
                new.discard(id)
            return results

        return self._do([(_ACCEPT, (self.number, *columns)), self._finding(ids)], read)

    def find(self, ids: Sequence[str]) -> Awaitable[list[Taken | None]]:
        def read(answers: list[_Rows]) -> list[Taken | None]:
            found = _by_id(answers[0])
            return [found.get(id) for id in ids]

        return self._do([self._finding(ids)], read)

    def progress(self, pieces: Iterable[tuple[str, int, Piece]]) -> Awaitable[Collection[str]]:
        new = list(pieces)
        ids = [id for id, _, _ in new]
        columns = (ids, [number for _, number, _ in new], [encode_piece(piece) for _, _, piece in new])

        def read(answers: list[_Rows]) -> set[str]:
            return set(ids) - {id for (id,) in answers[0]}

        return self._do([(_PROGRESS, (ids, self.number, *columns))], read)

    def listen(self, id: str, listeners: Sequence[Listener]) -> Awaitable[None]:
        return self._run(_LISTEN, encode(listeners), id, self.number)

    def end(self, id: str, reply: bytes) -> Awaitable[bool]:
        return self._do([(_END, (reply, self._clock(), id, self.number))], lambda answers: bool(answers[0]))

    def delivered(self, id: str) -> Awaitable[None]:
        return self._run(_DELIVERED, id, self.number)

    def trial(self, id: str, *, begins: bool) -> Awaitable[None]:
        return self._run(_TRIAL, begins, id, self.number)

    def exchange(self, load: float, usage: dict[str, Usage]) -> Awaitable[News]:
        """Tell the others one's load and what changed; returns what they told, at first all of it."""
        first, self._heard_any, self._load = not self._heard_any, True, load
        statements = members.exchange(self.number, self.lease_s, usage, first=first)

        def read(answers: list[_Rows]) -> News:
            self._note_renewal()
            return members.heard(answers)

        return self._do([*self._renewal(), *statements], read)

    def held(self) -> Awaitable[set[str]]:
        """The ids of what runs and is ours."""
        return self._do([(_HELD, (self.number,))], lambda answers: {id for (id,) in answers[0]})

    async def take_over(self) -> list[Entry]:
        """Make our part of what dead replicas left ours, the oldest first; each counts one more attempt."""
        rows = await self._do([(_TAKE_OVER, {"us": self.number})], lambda answers: answers[0])
        if not rows:
            return []
        pieces: dict[str, list[bytes]] = {row[0]: [] for row in rows}
        for id, tokens in await self._do([(_PIECES, (list(pieces),))], lambda answers: answers[0]):
            pieces[id].append(tokens)
        return [load(row, pieces[row[0]]) for row in rows]

    @property
    def _lease_ms(self) -> int:
        return round(1000 * self.lease_s)

    def _conninfo(self) -> str:
        """What the URL says goes before what we would."""
        ours: dict[str, Any] = {
            "connect_timeout": _CONNECT_S,
            "tcp_user_timeout": self._lease_ms,
            "application_name": self._replica,
            "password": self._password,
        }
        return make_conninfo(**{**ours, **conninfo_to_dict(self._url)})

    async def _open(self) -> None:
        connection = await psycopg.AsyncConnection.connect(self._conninfo(), autocommit=True)
        self._connection = connection
        try:
            await self._prepare(connection)
            self._groups: GroupCommit[_Work] = GroupCommit(self._name, self._commit)
            self._renewed_at = time.monotonic()
            await self._renew()
            await self._run(members.SUCCEED, self._replica, self.number)
            self._unfinished = await self.take_over()
            await self._count()
        except BaseException:
            await connection.close()
            raise

    async def _prepare(self, connection: psycopg.AsyncConnection[tuple[Any, ...]]) -> None:
        # Should our machine vanish during a transaction, its locks must not keep our rows from those who take over.
        limit = (str(self._lease_ms),)
        await connection.execute("SELECT set_config('idle_in_transaction_session_timeout', %s, false)", limit)
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            found = await connection.execute(
                "SELECT obj_description(oid, 'pg_namespace') FROM pg_namespace WHERE nspname = 'tokenbus'"
            )
            row = await found.fetchone()
            if row is None:
                await connection.execute(_SCHEMA)
            elif row[0] != _VERSION:
                raise JournalError(f"{self._name} says {row[0]!r}, this is for {_VERSION!r}")
            joined = await connection.execute(members.JOIN, (self._replica, self.lease_s))
            ((self.number,),) = await joined.fetchall()

    def _renewal(self) -> list[Statement]:
        return members.renew(self.number, self._replica, self.lease_s, self._load)

    def _renew(self) -> Awaitable[None]:
        return self._do(self._renewal(), lambda _: self._note_renewal())

    def _note_renewal(self) -> None:
        before, self._renewed_at = self._renewed_at, time.monotonic()
        if self._renewed_at - before > self.lease_s:
            self.lapses += 1

    async def _renew_regularly(self) -> None:
        with contextlib.suppress(JournalError):  # whoever writes next hears of it
            while True:
                await asyncio.sleep(self.lease_s / _RENEWALS)
                await self._renew()

    def _finding(self, ids: Sequence[str]) -> Statement:
        return _FIND, (self.number, self.number, list(ids))

    def _run(self, statement: str, *values: object) -> "asyncio.Future[None]":
        return self._do([(statement, values)], lambda _: None)

    def _do(self, statements: list[Statement], read: Callable[[list[_Rows]], Any]) -> "asyncio.Future[Any]":
        return self._groups.do(_Work(statements, read))

    async def _commit(self, batch: list[_Work]) -> list[Any]:
        """Of two replicas that wait for each other's rows the database lets one begin anew."""
        while True:
            with contextlib.suppress(psycopg.errors.DeadlockDetected):
                return await self._transact(batch)

    async def _transact(self, batch: list[_Work]) -> list[Any]:
        """One transaction, sent as a whole before anything is read."""
        connection = self._connection
        async with connection.pipeline() as pipeline, connection.transaction():
            sent = [[await connection.execute(*statement) for statement in work.statements] for work in batch]
            await pipeline.sync()
            answers = [[await _rows(cursor) for cursor in cursors] for cursors in sent]
        return [work.read(rows) for work, rows in zip(batch, answers, strict=True)]

    async def _prune_regularly(self) -> None:
        with contextlib.suppress(JournalError):  # whoever writes next hears of it
            while True:
                await asyncio.sleep(_PRUNE_EVERY_S)
                while await self._prune_some() == _PRUNE_AT_ONCE:
                    pass  # in pieces, so that other writes come in between
                await self._count()

    async def _count(self) -> None:
        self._rows = await self._do([(_COUNT, ())], lambda answers: int(answers[0][0][0]))

    def _prune_some(self) -> Awaitable[int]:
        """Drop results whose time is over; returns how many."""
        before = self._clock() - self._retention_s

        def read(answers: list[_Rows]) -> int:
            self._rows -= len(answers[0])
            return len(answers[0])

        return self._do([(_PRUNE, (before, _PRUNE_AT_ONCE))], read)


def _by_id(rows: _Rows) -> dict[str, Taken]:
    return {id: Taken(mark, reply, ours) for id, mark, reply, ours in rows}


async def _rows(cursor: psycopg.AsyncCursor[tuple[Any, ...]]) -> _Rows:
    return [] if cursor.description is None else await cursor.fetchall()


def _forget(done: "asyncio.Future[None]") -> None:
    """Of a journal that failed everybody has heard."""
    if not done.cancelled():
        done.exception()
