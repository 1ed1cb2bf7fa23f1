"""The journal on disk: SQLite in WAL mode, synchronous=FULL; whatever came during one commit goes into the next one."""

import asyncio
import contextlib
import math
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from scheduler.journal.entry import Entry, JournalError, Listener, Piece, Taken, digest
from scheduler.journal.groups import GroupCommit
from scheduler.journal.row import body_of, encode, encode_piece, load

_APPLICATION_ID = 0x746B6275  # "tkbu", as PRAGMA application_id
_VERSION = 1
_RUNNING, _ENDED, _DELIVERED = 0, 1, 2

# In one transaction, so that a file is a journal or still empty. Only VACUUM changes auto_vacuum once there is a first page,
# and taking the lock has written that.
_SCHEMA = f"""
PRAGMA auto_vacuum = INCREMENTAL;
VACUUM;
BEGIN;
CREATE TABLE requests (
    id TEXT PRIMARY KEY,
    state INTEGER NOT NULL,
    digest BLOB NOT NULL,
    accepted_at REAL NOT NULL,
    ended_at REAL,
    attempt INTEGER NOT NULL,
    trials INTEGER NOT NULL DEFAULT 0,
    listeners BLOB NOT NULL,
    body BLOB,
    reply BLOB
) STRICT;
CREATE INDEX by_end ON requests (state, ended_at);
CREATE TABLE progress (id TEXT, number INTEGER, tokens BLOB NOT NULL, PRIMARY KEY (id, number)) STRICT, WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
COMMIT;
"""

_PRUNE_EVERY_S = 30.0
_PRUNE_AT_ONCE = 1000
_PAGES_BACK_AT_ONCE = 1000
_NEARLY_FULL = 0.9

T = TypeVar("T")
_Work = Callable[[sqlite3.Connection], Any]


class SqliteJournal:
    """See ``Journal``; use as ``async with SqliteJournal(path, ...) as journal``. One process at a time.

    Results are kept for ``retention_s`` after delivery, less when the file would grow over ``max_bytes``. Entering raises
    JournalError for a file that isn't sound, is of another version, or is in use.
    """

    durable = True

    def __init__(
        self, path: Path, *, retention_s: float, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = path
        self._retention_s = retention_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._used_bytes = 0
        self._rows = 0
        self._unfinished: list[Entry] = []

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        try:
            await self._loop.run_in_executor(self._thread, self._open)
        except BaseException:
            self._thread.shutdown()
            raise
        self._groups: GroupCommit[_Work] = GroupCommit(f"the journal {self._path}", self._commit_in_thread)
        self._pruner = asyncio.create_task(self._prune_regularly(), name="journal pruning")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pruner.cancel()
        await self._groups.close()
        await asyncio.wait({self._pruner})
        await self._loop.run_in_executor(self._thread, self._database.close)
        self._thread.shutdown()

    @property
    def full(self) -> bool:
        return self._used_bytes >= self._max_bytes

    @property
    def lag(self) -> int:
        return len(self._groups)

    @property
    def rows(self) -> int:
        return self._rows

    def unfinished(self) -> Sequence[Entry]:
        return self._unfinished

    def accept(self, entries: Sequence[Entry]) -> Awaitable[list[Taken | None]]:
        def work(database: sqlite3.Connection) -> list[Taken | None]:
            taken = [_insert(database, entry) for entry in entries]
            self._rows += taken.count(None)
            return taken

        return self._do(work)

    def find(self, ids: Sequence[str]) -> Awaitable[list[Taken | None]]:
        return self._do(lambda database: [_find(database, id) for id in ids])

    def progress(self, pieces: Iterable[tuple[str, int, Piece]]) -> Awaitable[Collection[str]]:
        rows = [(id, number, encode_piece(piece)) for id, number, piece in pieces]

        def work(database: sqlite3.Connection) -> Collection[str]:
            _run_many(database, "INSERT INTO progress VALUES (?, ?, ?)", rows)
            return ()

        return self._do(work)

    def listen(self, id: str, listeners: Sequence[Listener]) -> Awaitable[None]:
        return self._run("UPDATE requests SET listeners = ? WHERE id = ?", encode(listeners), id)

    def end(self, id: str, reply: bytes) -> Awaitable[bool]:
        now = self._clock()
        end = "UPDATE requests SET state = ?, reply = ?, ended_at = ?, body = NULL WHERE id = ?"

        def work(database: sqlite3.Connection) -> bool:
            database.execute(end, (_ENDED, reply, now, id))
            database.execute("DELETE FROM progress WHERE id = ?", (id,))
            return True

        return self._do(work)

    def delivered(self, id: str) -> Awaitable[None]:
        return self._run("UPDATE requests SET state = ? WHERE id = ?", _DELIVERED, id)

    def trial(self, id: str, *, begins: bool) -> Awaitable[None]:
        return self._run("UPDATE requests SET trials = iif(?, trials + 1, 0) WHERE id = ?", begins, id)

    def _run(self, statement: str, *values: object) -> Awaitable[None]:
        return self._do(lambda database: _run_many(database, statement, [values]))

    def _do(self, work: Callable[[sqlite3.Connection], T]) -> "asyncio.Future[T]":
        return self._groups.do(work)

    async def _prune_regularly(self) -> None:
        with contextlib.suppress(JournalError):  # whoever writes next hears of it
            while True:
                await asyncio.sleep(_PRUNE_EVERY_S)
                while await self._prune_some() >= _PRUNE_AT_ONCE:
                    pass  # in pieces, so that other writes come in between

    def _prune_some(self) -> Awaitable[int]:
        return self._do(self._prune)

    async def _commit_in_thread(self, batch: list[_Work]) -> list[Any]:
        return await self._loop.run_in_executor(self._thread, self._commit, batch)

    def _commit(self, batch: list[_Work]) -> list[Any]:
        """In the journal's thread, as everything below."""
        results = _in_one_transaction(self._database, batch)
        self._used_bytes = _used_bytes(self._database)
        with contextlib.suppress(sqlite3.OperationalError):
            while self.full and _in_one_transaction(self._database, [self._prune])[0]:
                pass
        return results

    def _prune(self, database: sqlite3.Connection) -> int:
        """Drop results whose time is over; when space is short, the oldest of the others too. Returns how many."""
        before = self._clock() - self._retention_s
        oldest = "SELECT id FROM requests WHERE state = ? AND ended_at < ? ORDER BY ended_at LIMIT ?"
        drop = f"DELETE FROM requests WHERE id IN ({oldest})"  # noqa: S608 (our own text)
        dropped = database.execute(drop, (_DELIVERED, before, _PRUNE_AT_ONCE)).rowcount
        if _used_bytes(database) > _NEARLY_FULL * self._max_bytes:
            dropped += database.execute(drop, (_DELIVERED, math.inf, _PRUNE_AT_ONCE)).rowcount
        self._rows -= dropped
        for _ in range(min(_pragma(database, "freelist_count"), _PAGES_BACK_AT_ONCE)):
            database.execute("PRAGMA incremental_vacuum(1)")  # Python steps it once, and each step gives one page back
        self._used_bytes = _used_bytes(database)
        return dropped

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if not self._path.exists():
                self._path.touch(mode=0o600)  # it holds every tenant's prompts
            self._database = sqlite3.connect(self._path, isolation_level=None, timeout=0, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise JournalError(f"the journal {self._path} can't be opened: {error}") from None
        try:
            self._prepare(self._database)
        except (JournalError, sqlite3.Error, msgspec.MsgspecError, UnicodeDecodeError) as error:
            self._database.close()
            raise _explained(self._path, error) from None

    def _prepare(self, database: sqlite3.Connection) -> None:
        """Nothing is written to a file before it has proven to be ours and sound."""
        # Exclusive: a second service on the same file would answer the same requests.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("BEGIN EXCLUSIVE")
        database.execute("COMMIT")
        application, version = (_pragma(database, name) for name in ("application_id", "user_version"))
        tables = database.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if (tables, application, version) == (0, 0, 0):
            database.executescript(_SCHEMA)
        elif application != _APPLICATION_ID:
            raise JournalError(f"{self._path} is not a journal of tokenbus")
        elif version != _VERSION:
            raise JournalError(f"the journal {self._path} is of version {version}, this is for version {_VERSION}")
        trouble = database.execute("PRAGMA quick_check").fetchone()[0]
        if trouble != "ok":
            raise JournalError(_unsound(self._path, trouble))
        self._rows = database.execute("SELECT count(*) FROM requests").fetchone()[0]
        unfinished = database.execute(_UNFINISHED, (_DELIVERED,)).fetchall()
        self._unfinished = [_load(database, row) for row in unfinished]
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.execute("PRAGMA journal_size_limit = 67108864")
        database.execute("UPDATE requests SET attempt = attempt + 1 WHERE state < ?", (_DELIVERED,))
        self._used_bytes = _used_bytes(database)


_UNFINISHED = """
SELECT id, accepted_at, attempt + 1, trials, listeners, body, reply FROM requests WHERE state < ? ORDER BY accepted_at, rowid
"""


def _in_one_transaction(database: sqlite3.Connection, works: Iterable[_Work]) -> list[Any]:
    database.execute("BEGIN IMMEDIATE")
    try:
        results = [work(database) for work in works]
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # a full disk, for one, has ended it already
            database.execute("ROLLBACK")
        raise
    return results


def _insert(database: sqlite3.Connection, entry: Entry) -> Taken | None:
    mark = digest(entry.model, entry.request)
    inserted = database.execute(
        "INSERT INTO requests (id, state, digest, accepted_at, attempt, listeners, body) VALUES (?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (id) DO NOTHING",
        (entry.id, _RUNNING, mark, entry.accepted_at, entry.attempt, encode(entry.listeners), body_of(entry)),
    )
    if inserted.rowcount:
        return None
    return _find(database, entry.id)


def _find(database: sqlite3.Connection, id: str) -> Taken | None:
    row = database.execute("SELECT digest, reply FROM requests WHERE id = ?", (id,)).fetchone()
    return None if row is None else Taken(*row)


def _load(database: sqlite3.Connection, row: tuple[Any, ...]) -> Entry:
    pieces = database.execute("SELECT tokens FROM progress WHERE id = ? ORDER BY number", row[:1])
    return load(row, [piece for (piece,) in pieces])


def _run_many(database: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    database.executemany(statement, rows)


def _pragma(database: sqlite3.Connection, name: str) -> int:
    return int(database.execute(f"PRAGMA {name}").fetchone()[0])


def _used_bytes(database: sqlite3.Connection) -> int:
    return (_pragma(database, "page_count") - _pragma(database, "freelist_count")) * _pragma(database, "page_size")


def _explained(path: Path, error: Exception) -> Exception:
    """What an error while opening means for whoever starts the service."""
    if isinstance(error, JournalError):
        return error
    if not isinstance(error, sqlite3.OperationalError):
        return JournalError(_unsound(path, str(error)))
    if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
        return JournalError(f"the journal {path} is in use by another process; each service needs its own")
    return JournalError(f"the journal {path} can't be used: {error}")


def _unsound(path: Path, trouble: str) -> str:
    return f"the journal {path} is damaged ({trouble}); docs/journal.md says how to recover what it holds"
