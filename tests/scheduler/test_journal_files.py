"""Files a journal can't vouch for, writes that fail, and what its page tells to do."""

import asyncio
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.journal.entry import JournalError, Piece, Taken
from scheduler.journal.sqlite import SqliteJournal
from tests.scheduler.journals import DYING, ROOT, entry, finish, flip, left_by, mark, opened, run_python

# What it refuses


def text(path: Path) -> None:
    path.write_text("These are notes of mine.\n" * 1000)


def foreign(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    database.close()


def foreign_without_tables(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA application_id = 7")
    database.close()


def of_another_version(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def without_header(path: Path) -> None:
    flip(path, 0, 16)


def with_a_bad_page(path: Path) -> None:
    flip(path, path.stat().st_size // 2 // 4096 * 4096, 64)


def with_a_bad_body(path: Path) -> None:
    """Which SQLite has no means to see."""
    flip(path, path.read_bytes().index(b"the prompt of alice/7 ") - 20, 20)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (text, r"journal\.sqlite3 is damaged \(file is not a database\); docs/journal\.md says"),
        (foreign, r"journal\.sqlite3 is not a journal of tokenbus"),
        (foreign_without_tables, r"journal\.sqlite3 is not a journal of tokenbus"),
        (of_another_version, r"journal\.sqlite3 is of version 2, this is for version 1"),
        (truncated, r"journal\.sqlite3 is damaged \(.*malformed\); docs/journal\.md says"),
        (without_header, r"journal\.sqlite3 is damaged \(file is not a database\); docs/journal\.md says"),
        (with_a_bad_page, r"journal\.sqlite3 is damaged \(.*\); docs/journal\.md says"),
        (with_a_bad_body, r"journal\.sqlite3 is damaged \(.*\); docs/journal\.md says"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
async def test_a_file_it_cannot_vouch_for_is_refused_and_left_as_it_is(path, spoil: Callable[[Path], None], says):
    async with opened(path) as journal:
        ids = [f"alice/{number}" for number in range(50)]
        await journal.accept([entry(id, f"the prompt of {id} " * 50) for id in ids])
        await journal.progress([(id, number, Piece([1, 2, 3])) for id in ids for number in range(10)])
    spoil(path)
    before = path.read_bytes()
    for _ in range(2):  # the lock is let go
        with pytest.raises(JournalError, match=says):
            await left_by(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_a_folder_in_its_place_is_refused(path):
    path.mkdir()
    with pytest.raises(JournalError, match=r"journal\.sqlite3 can't be opened: unable to open"):
        await left_by(path)


async def test_a_file_in_its_folders_place_is_refused(path):
    path.parent.joinpath("file").write_text("mine")
    with pytest.raises(JournalError, match=r"can't be opened: .*(Not a directory|File exists)"):
        await left_by(path.parent / "file" / path.name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_folder_it_may_not_write_in_is_refused(path):
    path.parent.chmod(0o500)
    try:
        with pytest.raises(JournalError, match=r"can't be opened: .*Permission denied"):
            await left_by(path)
    finally:
        path.parent.chmod(0o700)


async def test_a_second_service_on_the_same_file_is_refused(path):
    says = "is in use by another process; each service needs its own"
    other = "import asyncio, sys, pathlib; from tests.scheduler.test_journal import left_by; "
    other += "asyncio.run(left_by(pathlib.Path(sys.argv[1])))"
    async with opened(path) as journal:
        with pytest.raises(JournalError, match=says):
            await left_by(path)
        assert says in run_python(other, path).stderr
        await journal.accept([entry("alice/a")])
    refused_cost_nothing = await left_by(path)
    assert [one.attempt for one in refused_cost_nothing] == [2]


async def test_a_start_that_was_killed_before_the_tables_were_there_harms_nothing(path):
    with sqlite3.connect(path, isolation_level=None) as database:
        database.executescript("BEGIN EXCLUSIVE; COMMIT;")  # the lock's first page, and no more
    database.close()
    assert path.stat().st_size > 0
    async with opened(path) as journal:
        await journal.accept([entry("alice/a")])
    assert [one.id for one in await left_by(path)] == ["alice/a"]


# When it can't go on


def fill_the_disk(journal: SqliteJournal) -> None:
    journal._database.execute("PRAGMA max_page_count = 1")


def close_the_file(journal: SqliteJournal) -> None:
    journal._database.close()


def put_a_bug_in(journal: SqliteJournal) -> None:
    def work(database: sqlite3.Connection) -> None:
        raise ZeroDivisionError("a bug")

    journal._do(work)


@pytest.mark.parametrize(
    ("strike", "says"),
    [(fill_the_disk, "is full"), (close_the_file, "closed database"), (put_a_bug_in, "a bug")],
)
async def test_after_a_failed_write_whoever_waits_or_comes_later_is_told(path, strike, says):
    async with opened(path) as journal:
        await journal.accept([entry("alice/a")])
        strike(journal)
        big = [journal.accept([entry(f"alice/{number}", "x" * 100_000)]) for number in range(3)]
        waiting = [*big, journal.find(["alice/a"]), journal.end("alice/a", b"reply")]
        await asyncio.wait(waiting)
        later = [journal.delivered("alice/a"), journal.find([])]
        assert all(write.done() for write in later)
        for write in [*waiting, *later]:
            with pytest.raises(JournalError, match=rf"journal\.sqlite3 can't be written: .*{says}"):
                await write
        assert journal.lag == 0
    (left,) = await left_by(path)
    assert (left.id, left.reply) == ("alice/a", None), "what was awaited before is there, and no part of what failed"


async def test_a_closed_journal_says_so(path):
    async with opened(path) as journal:
        pass
    with pytest.raises(JournalError, match="is closed"):
        await journal.find([])


# What docs/journal.md tells to do


BACK_UP, RESTORE, RECOVER = re.findall(
    r"^```sh\n(.*?)^```", (ROOT / "docs" / "journal.md").read_text(), flags=re.MULTILINE | re.DOTALL
)


def shell(commands: str, folder: Path) -> str:
    environment = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["sh", "-euc", commands]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


async def test_a_backup_is_a_journal_again(path):
    async with opened(path) as journal:
        await journal.accept([entry("alice/a"), entry("alice/b")])
        await journal.progress([("alice/a", 0, Piece([1, 2]))])
        await finish(journal, "alice/b")
    shell(BACK_UP, path.parent)
    left = run_python(DYING, path)  # and a -wal of another state
    assert left.returncode == -signal.SIGKILL
    shell(RESTORE, path.parent)
    async with opened(path) as journal:
        assert journal.unfinished() == [entry("alice/a", attempt=2, pieces=[Piece([1, 2])])]
        assert await journal.find(["alice/b", "alice/new"]) == [Taken(mark(), b"reply"), None]
        assert path.stat().st_mode & 0o777 == 0o600
        assert journal._database.execute("PRAGMA auto_vacuum").fetchone() == (2,), "it still gives space back"


async def test_of_a_damaged_journal_what_can_be_read_is_recovered(path):
    ids = [f"alice/{number}" for number in range(300)]
    async with opened(path) as journal:
        await journal.accept([entry(id, "Hello " * 50) for id in ids])
        await journal.progress([(id, 0, Piece([1])) for id in ids])
        await finish(journal, *ids[:100])
    for page in range(20, 30):
        flip(path, page * 4096, 64)
    with pytest.raises(JournalError, match="is damaged"):
        await left_by(path)
    damaged = path.read_bytes()
    said = shell(RECOVER, path.parent)
    async with opened(path) as journal:
        found = [taken for taken in await journal.find(ids) if taken is not None]
        assert said == f"{len(found)} requests recovered\n"
        assert 200 < len(found) < 300
        assert all(one == entry(one.id, "Hello " * 50, attempt=2) for one in journal.unfinished())
        assert len(journal.unfinished()) > 100
        assert set(found) == {Taken(mark("Hello " * 50), reply) for reply in (None, b"reply")}
    assert (path.parent / "damaged" / path.name).read_bytes() == damaged
