"""Both journals keep the same promise; the one on disk keeps it through kill -9, and refuses files it can't vouch for."""

import asyncio
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from protocol.request import Request, decode_request
from scheduler.journal import sqlite
from scheduler.journal.entry import Entry, JournalError, Listener, Taken, digest
from scheduler.journal.memory import MemoryJournal
from scheduler.journal.sqlite import SqliteJournal

ROOT = Path(__file__).parents[2]


def entry(id: str, prompt: str = "Hello", **given) -> Entry:
    return Entry(
        id=id,
        model="tiny",
        request=Request(prompt=prompt, stop=["END"], stream=True),
        prompt=[1, 2, 3],
        seed=-7,
        listeners=[Listener(f"tokenbus/v1/{id}", b"\0\xff")],
        **{"accepted_at": 1_000.5, **given},
    )


def without_body(one: Entry) -> Entry:
    """What is left of it once it has ended."""
    return msgspec.structs.replace(one, model="", request=Request(), prompt=[], seed=0, records=[])


def mark(prompt: str = "Hello") -> bytes:
    return digest("tiny", entry("any/any", prompt).request)


def opened(path: Path, **given) -> SqliteJournal:
    return SqliteJournal(path, **{"retention_s": 3600, "max_bytes": 2**30, **given})


async def finish(journal, *ids: str, reply: bytes = b"reply") -> None:
    for id in ids:
        ending = journal.end(id, reply)
        await journal.delivered(id)
        await ending


async def left_by(path: Path) -> list[Entry]:
    """What whoever opens it next has to take up."""
    async with opened(path) as journal:
        return list(journal.unfinished())


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.sqlite3"


# What any journal promises


@pytest.fixture(params=["sqlite", "memory"])
async def journal(request, path):
    async with opened(path) if request.param == "sqlite" else MemoryJournal() as journal:
        yield journal


async def test_a_new_id_is_taken_and_a_known_one_tells_what_holds_it(journal):
    a, b, other = entry("alice/a"), entry("alice/b"), entry("alice/a", "something else")
    assert await journal.accept([a, other]) == [None, Taken(mark(), None)]
    assert await journal.accept([other, b, b]) == [Taken(mark(), None), None, Taken(mark(), None)]
    assert await journal.find(["alice/a"]) == [Taken(mark(), None)], "the second one changed nothing"


async def test_the_same_request_id_of_two_tenants_is_two_ids(journal):
    assert await journal.accept([entry("alice/a"), entry("bob/a", "else")]) == [None, None]
    await journal.end("alice/a", b"for alice")
    assert await journal.find(["alice/a", "bob/a"]) == [Taken(mark(), b"for alice"), Taken(mark("else"), None)]


async def test_what_has_ended_is_replayed_before_and_after_delivery(journal):
    await journal.accept([entry("alice/a")])
    await journal.end("alice/a", b"the end")
    ended = [Taken(mark(), b"the end")]
    assert await journal.accept([entry("alice/a", "whatever")]) == ended
    await journal.delivered("alice/a")
    assert await journal.accept([entry("alice/a", "whatever")]) == ended == await journal.find(["alice/a"])


async def test_find_takes_nothing(journal):
    assert await journal.find([]) == []
    assert await journal.find(["alice/a", "alice/b"]) == [None, None]
    assert await journal.accept([entry("alice/a")]) == [None]
    assert await journal.find(["alice/b", "alice/a"]) == [None, Taken(mark(), None)]


async def test_a_write_counts_from_the_moment_it_is_queued(journal):
    queued = [
        journal.accept([entry("alice/a")]),
        journal.progress([("alice/a", 0, [1])]),
        journal.find(["alice/a"]),
        journal.end("alice/a", b"reply"),
        journal.find(["alice/a"]),
    ]
    assert [await one for one in queued] == [[None], None, [Taken(mark(), None)], None, [Taken(mark(), b"reply")]]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"prompt": "x", "seed": 1}', '{ "seed":1,\n"prompt":"\\u0078" }'),
        ('{"prompt": "x"}', '{"prompt": "x", "n": 1, "stream": false, "stop": null}'),
        ('{"prompt": "x", "temperature": 1}', '{"prompt": "x", "temperature": 1.0}'),
        ('{"prompt": "x", "metadata": {"a": "1", "b": "2"}}', '{"prompt": "x", "metadata": {"b": "2", "a": "1"}}'),
    ],
)
def test_a_digest_tells_what_is_asked_not_how_it_is_written(one, other):
    assert digest("tiny", decode_request(one.encode())) == digest("tiny", decode_request(other.encode()))


def test_the_model_and_every_field_count_in_a_digest():
    bodies = [
        '{"prompt": "x"}',
        '{"prompt": "y"}',
        '{"prompt": [1]}',
        '{"messages": [{"role": "user", "content": "x"}]}',
        '{"prompt": "x", "seed": 0}',
        '{"prompt": "x", "max_tokens": 5}',
        '{"prompt": "x", "max_completion_tokens": 5}',
        '{"prompt": "x", "stop": "a"}',
        '{"prompt": "x", "stream": true}',
        '{"prompt": "x", "user": "u"}',
        '{"prompt": "x", "metadata": {"a": "b"}}',
    ]
    digests = {digest(model, decode_request(body.encode())) for body in bodies for model in ("tiny", "huge")}
    assert len(digests) == 2 * len(bodies)


# What outlives the process


DYING = """
import asyncio, os, signal, sys
from pathlib import Path
from tests.scheduler.test_journal import entry, finish, opened

async def main():
    async with opened(Path(sys.argv[1])) as journal:
        await journal.accept([entry("alice/" + name) for name in ("new", "begun", "ended", "delivered")])
        await journal.progress([("alice/begun", 0, [5, 6])])
        await finish(journal, "alice/delivered")
        await journal.end("alice/ended", b"reply")
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


async def test_what_is_awaited_survives_kill_9(path):
    died = run_python(DYING, path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert path.with_name(path.name + "-wal").stat().st_size > 0, "nobody closed it"
    async with opened(path) as journal:
        left = {one.id: (one.records, one.reply) for one in journal.unfinished()}
        assert left == {
            "alice/new": ([], None),
            "alice/begun": ([[5, 6]], None),
            "alice/ended": ([], b"reply"),
        }
        assert await journal.find(["alice/delivered"]) == [Taken(mark(), b"reply")]


async def test_an_entry_comes_back_as_it_was_with_its_pieces_in_order(path):
    pieces = [[number, 2**31 - 1] for number in range(12)]
    listeners = [Listener("tokenbus/v1/alice/out/a"), Listener("tokenbus/v1/alice/out/b", b"correlation")]
    async with opened(path) as journal:
        await journal.accept([entry("alice/a")])
        for first in (10, 0, 5):  # by number, not by time
            await journal.progress([("alice/a", n, pieces[n]) for n in range(first, min(first + 5, 12))])
        await journal.listen("alice/a", listeners)
    expected = entry("alice/a", attempt=2, records=pieces)
    expected.listeners = listeners
    assert await left_by(path) == [expected]


async def test_the_oldest_come_first_and_of_one_moment_the_first_written(path):
    async with opened(path) as journal:
        await journal.accept([entry("z/later", accepted_at=20.0), entry("y/early", accepted_at=10.0)])
        await journal.accept([entry("x/early", accepted_at=10.0)])
    assert [one.id for one in await left_by(path)] == ["y/early", "x/early", "z/later"]


async def test_every_opening_is_one_more_attempt_and_trials_count_until_one_passes(path):
    async with opened(path) as journal:
        await journal.accept([entry("alice/a"), entry("alice/b")])
    for attempt in (2, 3, 4):
        async with opened(path) as journal:
            assert [one.attempt for one in journal.unfinished()] == [attempt, attempt]
            await journal.trial("alice/a", begins=True)
            await journal.trial("alice/b", begins=True)
            await journal.trial("alice/b", begins=False)
    assert [one.trials for one in await left_by(path)] == [3, 0]


async def test_ended_but_undelivered_comes_back_with_its_reply_and_delivered_does_not(path):
    async with opened(path) as journal:
        await journal.accept([entry("alice/a"), entry("alice/b")])
        await journal.progress([("alice/a", 0, [1])])
        await journal.end("alice/a", b"the end")
        await finish(journal, "alice/b")
    assert await left_by(path) == [without_body(entry("alice/a", attempt=2, reply=b"the end"))]


async def test_the_end_takes_body_and_pieces_off_the_disk(path):
    async with opened(path) as journal:
        await journal.accept([entry("alice/a"), entry("alice/b")])
        await journal.progress([(id, n, [n]) for id in ("alice/a", "alice/b") for n in range(3)])
        await journal.end("alice/a", b"reply")
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT id, count(*) FROM progress GROUP BY id").fetchall() == [("alice/b", 3)]
        assert database.execute("SELECT id FROM requests WHERE body IS NULL").fetchall() == [("alice/a",)]
    database.close()


async def test_what_is_queued_when_it_closes_is_written(path):
    async with opened(path) as journal:
        journal.accept([entry("alice/a")])
    assert [one.id for one in await left_by(path)] == ["alice/a"]


async def test_only_its_owner_may_read_it(path):
    async with opened(path) as journal:
        await journal.accept([entry("alice/a")])
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == {path.name: 0o600, path.name + "-wal": 0o600}


# How it writes


async def test_what_comes_during_one_commit_goes_into_the_next_in_order(path):
    async with opened(path) as journal:
        seen: list[str] = []
        journal._database.set_trace_callback(seen.append)
        gate = threading.Event()
        journal._thread.submit(gate.wait)
        first = journal.accept([entry("alice/first")])
        while journal.lag:
            await asyncio.sleep(0)
        rest = [journal.accept([entry(f"alice/{n}", accepted_at=float(n))]) for n in range(100)]
        assert journal.lag == 100
        gate.set()
        await asyncio.gather(first, *rest)
        await journal.find([])
        journal._database.set_trace_callback(None)
    writes = [statement.partition(" ")[0] for statement in seen if not statement.startswith(("PRAGMA", "--"))]
    assert writes[:-2] == ["BEGIN", "INSERT", "COMMIT", "BEGIN", *["INSERT"] * 100, "COMMIT"]
    with sqlite3.connect(path) as database:
        written = [id for (id,) in database.execute("SELECT id FROM requests ORDER BY rowid")]
    database.close()
    assert written == ["alice/first", *[f"alice/{n}" for n in range(100)]]


async def test_every_commit_is_synced_to_the_disk(path):
    async with opened(path) as journal:
        settings = [journal._database.execute(f"PRAGMA {name}").fetchone() for name in ("journal_mode", "synchronous")]
    assert settings == [("wal",), (2,)], "2 is FULL"


async def test_a_write_whose_waiter_has_gone_is_written_all_the_same(path):
    async with opened(path) as journal:
        asyncio.ensure_future(journal.accept([entry("alice/a")])).cancel()
        assert await journal.find(["alice/a"]) == [Taken(mark(), None)]


# For how long it keeps results, and how many


async def prune(journal: SqliteJournal) -> None:
    """What happens every half a minute."""
    while await journal._do(journal._prune) == sqlite._PRUNE_AT_ONCE:
        pass


async def test_results_are_kept_for_the_retention_time_and_nothing_else_is_ever_dropped(path):
    now = 1_000.0
    async with opened(path, retention_s=60, clock=lambda: now) as journal:
        await journal.accept([entry(f"alice/{name}") for name in ("running", "ended", "early", "late")])
        await journal.end("alice/ended", b"reply")
        await finish(journal, "alice/early")
        now += 30
        await finish(journal, "alice/late")
        ids = ["alice/running", "alice/ended", "alice/early", "alice/late"]
        kept = []
        for moment in (1_060, 1_061, 1_090, 1_091, 1e9):
            now = moment
            await prune(journal)
            kept.append([taken is not None for taken in await journal.find(ids)])
        assert kept == [
            [True, True, True, True],
            [True, True, False, True],
            [True, True, False, True],
            [True, True, False, False],
            [True, True, False, False],
        ]
        assert await journal.accept([entry("alice/late")]) == [None], "its id is free again"


async def test_over_max_bytes_the_oldest_results_go_first(path, monkeypatch):
    monkeypatch.setattr(sqlite, "_PRUNE_AT_ONCE", 5)
    now = 0.0
    async with opened(path, max_bytes=500_000, clock=lambda: now) as journal:
        await journal.accept([entry("alice/running"), entry("alice/undelivered")])
        await journal.end("alice/undelivered", b"x" * 10_000)
        for number in range(100):
            now += 1
            await journal.accept([entry(f"alice/{number}")])
            await finish(journal, f"alice/{number}", reply=b"x" * 10_000)
            assert not journal.full
        kept = [taken is not None for taken in await journal.find([f"alice/{number}" for number in range(100)])]
        assert kept == sorted(kept), "no older one outlived a newer one"
        assert 20 < sum(kept) < 50
        assert None not in await journal.find(["alice/running", "alice/undelivered"])


async def test_results_make_room_even_when_the_clock_went_back(path):
    now = 1_000_000.0
    async with opened(path, max_bytes=200_000, clock=lambda: now) as journal:
        await journal.accept([entry("alice/a")])
        await finish(journal, "alice/a", reply=b"x" * 150_000)
        now = 0.0
        await journal.accept([entry("alice/b", "x" * 100_000)])
        assert not journal.full
        assert await journal.find(["alice/a"]) == [None]


async def test_full_means_that_open_requests_alone_fill_it(path, monkeypatch):
    monkeypatch.setattr(sqlite, "_PRUNE_AT_ONCE", 2)  # however many rounds it takes
    results = [f"alice/{number}" for number in range(40)]
    big = [entry(f"bob/{number}", "x" * 120_000) for number in range(4)]
    async with opened(path, max_bytes=500_000) as journal:
        await journal.accept([entry(id) for id in results])
        await finish(journal, *results, reply=b"x" * 10_000)
        full = []
        for one in big:
            await journal.accept([one])
            full.append(journal.full)
        assert full == [False, False, False, True]
        assert not any(await journal.find(results)), "every result went before anyone was refused"
        await journal.end(big[0].id, b"reply")
        assert not journal.full
    async with opened(path, max_bytes=300_000) as journal:
        assert journal.full, "from the start"


async def test_space_goes_back_to_the_file_system(path):
    ids = [f"alice/{number}" for number in range(200)]
    now = 0.0
    async with opened(path, retention_s=60, clock=lambda: now) as journal:
        await journal.accept([entry(id, "x" * 10_000) for id in ids])
    grown = path.stat().st_size
    assert grown > 2_000_000
    async with opened(path, retention_s=60, clock=lambda: now) as journal:
        await finish(journal, *ids)
        now = 61
        await prune(journal)
    assert path.stat().st_size < grown / 20


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


def flip(path: Path, at: int, count: int) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + count] = bytes(byte ^ 0xFF for byte in content[at : at + count])
    path.write_bytes(content)


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
        await journal.progress([(id, number, [1, 2, 3]) for id in ids for number in range(10)])
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


# Any history


class Histories(RuleBasedStateMachine):
    """Random writes, and closing or dying in between, against a dict."""

    IDS = [f"{tenant}/{name}" for tenant in ("alice", "bob") for name in "abc"]
    ids = st.sampled_from(IDS)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "0"
        self.runner = asyncio.Runner()
        self.model: dict[str, Entry] = {}
        self.delivered: set[str] = set()
        self.open()

    def open(self) -> None:
        self.journal = self.run(opened(self.path).__aenter__())

    def run(self, work):
        async def awaited():
            return await work

        return self.runner.run(awaited())

    def write(self, method: str, *arguments, **named):
        async def awaited():
            return await getattr(self.journal, method)(*arguments, **named)

        return self.runner.run(awaited())

    def running(self, id: str) -> Entry | None:
        one = self.model.get(id)
        return one if one is not None and one.reply is None else None

    @rule(batch=st.lists(st.tuples(ids, st.sampled_from(["Hello", "x" * 9000])), max_size=4))
    def accept(self, batch):
        expected = []
        for id, prompt in batch:
            known = self.model.get(id)
            expected.append(known and Taken(digest("tiny", known.request), known.reply))
            self.model.setdefault(id, entry(id, prompt, accepted_at=float(len(self.model))))
        written = [entry(id, prompt, accepted_at=self.model[id].accepted_at) for id, prompt in batch]
        assert self.write("accept", written) == expected

    @rule(id=ids, tokens=st.lists(st.integers(0, 2**31 - 1), max_size=5))
    def progress(self, id, tokens):
        if one := self.running(id):
            self.write("progress", [(id, len(one.records), tokens)])
            one.records = [*one.records, tokens]

    @rule(id=ids, listeners=st.lists(st.builds(Listener, st.text(), st.none() | st.binary()), max_size=3))
    def listen(self, id, listeners):
        if one := self.running(id):
            self.write("listen", id, listeners)
            one.listeners = listeners

    @rule(id=ids, begins=st.booleans())
    def trial(self, id, begins):
        if one := self.running(id):
            self.write("trial", id, begins=begins)
            one.trials = one.trials + 1 if begins else 0

    @rule(id=ids, reply=st.binary())
    def end(self, id, reply):
        if one := self.running(id):
            self.write("end", id, reply)
            one.reply = reply

    @rule(id=ids)
    def deliver(self, id):
        if id in self.model and self.model[id].reply is not None:
            self.write("delivered", id)
            self.delivered.add(id)

    @rule(dies=st.booleans())
    def reopen(self, dies):
        if dies:  # what a killed process leaves behind is what lies there now
            left = self.folder / str(int(self.path.name) + 1)
            for end in ("", "-wal"):
                shutil.copy(f"{self.path}{end}", f"{left}{end}")
        self.run(self.journal.__aexit__())
        if dies:
            self.path = left
        self.open()
        left_over = [one for id, one in self.model.items() if id not in self.delivered]
        for one in left_over:
            one.attempt += 1
        assert self.journal.unfinished() == [one if one.reply is None else without_body(one) for one in left_over]

    @invariant()
    def everything_is_found(self):
        found = self.write("find", self.IDS)
        known = [self.model.get(id) for id in self.IDS]
        assert found == [one and Taken(digest("tiny", one.request), one.reply) for one in known]

    def teardown(self):
        self.run(self.journal.__aexit__())
        self.runner.close()
        shutil.rmtree(self.folder)


Histories.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestHistories = Histories.TestCase


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
        await journal.progress([("alice/a", 0, [1, 2])])
        await finish(journal, "alice/b")
    shell(BACK_UP, path.parent)
    left = run_python(DYING, path)  # and a -wal of another state
    assert left.returncode == -signal.SIGKILL
    shell(RESTORE, path.parent)
    async with opened(path) as journal:
        assert journal.unfinished() == [entry("alice/a", attempt=2, records=[[1, 2]])]
        assert await journal.find(["alice/b", "alice/new"]) == [Taken(mark(), b"reply"), None]
        assert path.stat().st_mode & 0o777 == 0o600
        assert journal._database.execute("PRAGMA auto_vacuum").fetchone() == (2,), "it still gives space back"


async def test_of_a_damaged_journal_what_can_be_read_is_recovered(path):
    ids = [f"alice/{number}" for number in range(300)]
    async with opened(path) as journal:
        await journal.accept([entry(id, "Hello " * 50) for id in ids])
        await journal.progress([(id, 0, [1]) for id in ids])
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
