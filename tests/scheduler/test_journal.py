"""All journals keep the same promise; those that are durable keep it through kill -9."""

import asyncio
import signal
import sqlite3
import threading
from pathlib import Path

import msgspec
import pytest

from protocol.plan import Scored
from protocol.request import decode_request
from scheduler.journal import sqlite
from scheduler.journal.entry import Listener, Piece, Taken, digest
from scheduler.journal.memory import MemoryJournal
from scheduler.journal.postgres import PostgresJournal
from scheduler.journal.sqlite import SqliteJournal
from tests.scheduler.journals import DYING, entry, finish, left_by, mark, opened, run_python, without_body

# What any journal promises


@pytest.fixture(params=["path", "database", "memory"])
async def journal(request):
    in_memory = request.param == "memory"
    async with MemoryJournal() if in_memory else opened(request.getfixturevalue(request.param)) as journal:
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


async def test_rows_count_each_request_once_until_it_is_dropped(journal):
    assert journal.rows == 0
    await journal.accept([entry("alice/a"), entry("alice/b"), entry("alice/a")])
    await finish(journal, "alice/a")
    await journal.accept([entry("alice/a"), entry("alice/c")])
    assert journal.rows == 3


async def test_find_takes_nothing(journal):
    assert await journal.find([]) == []
    assert await journal.find(["alice/a", "alice/b"]) == [None, None]
    assert await journal.accept([entry("alice/a")]) == [None]
    assert await journal.find(["alice/b", "alice/a"]) == [None, Taken(mark(), None)]


async def test_a_write_counts_from_the_moment_it_is_queued(journal):
    queued = [
        journal.accept([entry("alice/a")]),
        journal.progress([("alice/a", 0, Piece([1]))]),
        journal.find(["alice/a"]),
        journal.end("alice/a", b"reply"),
        journal.find(["alice/a"]),
    ]
    accepted, lost, running, ended, found = [await one for one in queued]
    assert (accepted, running, found) == ([None], [Taken(mark(), None)], [Taken(mark(), b"reply")])
    assert ended
    assert not lost


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('{"prompt": "x", "seed": 1}', '{ "seed":1,\n"prompt":"\\u0078" }'),
        ('{"prompt": "x"}', '{"prompt": "x", "n": 1, "stream": false, "stop": null}'),
        ('{"prompt": "x", "temperature": 1}', '{"prompt": "x", "temperature": 1.0}'),
        ('{"prompt": "x", "logit_bias": {"5": 1, "6": 2}}', '{"prompt": "x", "logit_bias": {"6": 2.0, "5": 1.0}}'),
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
        '{"prompt": "x", "priority": 1}',
        '{"prompt": "x", "deadline_ms": 5}',
        '{"prompt": "x", "refuse_late": true}',
        '{"prompt": "x", "typical_p": 0.5}',
        '{"prompt": "x", "repetition_penalty": 1.5}',
        '{"prompt": "x", "presence_penalty": 0.5}',
        '{"prompt": "x", "frequency_penalty": 0.5}',
        '{"prompt": "x", "logit_bias": {"5": 1, "6": 2}}',
        '{"prompt": "x", "bad_words": ["a"]}',
        '{"prompt": "x", "min_tokens": 5}',
        '{"prompt": "x", "logprobs": 0}',
        '{"prompt": "x", "prompt_logprobs": 0}',
        '{"prompt": "x", "include_stop_str_in_output": true}',
    ]
    digests = {digest(model, decode_request(body.encode())) for body in bodies for model in ("tiny", "huge")}
    assert len(digests) == 2 * len(bodies)


def test_a_field_that_came_later_leaves_the_digest_of_who_does_not_use_it():
    asked = decode_request(b'{"prompt": "x", "priority": 0, "deadline_ms": null, "refuse_late": false}')
    assert digest("tiny", asked).hex() == "9f310330762cc527f70c6062282dec2d241dd4c649ddb7c178780bde33872ade"


# What outlives the process


async def test_what_is_awaited_survives_kill_9(place):
    died = run_python(DYING, place)
    assert died.returncode == -signal.SIGKILL, died.stderr
    if isinstance(place, Path):
        assert place.with_name(place.name + "-wal").stat().st_size > 0, "nobody closed it"
    async with opened(place) as journal:
        left = {one.id: (one.pieces, one.reply) for one in journal.unfinished()}
        assert left == {
            "alice/new": ([], None),
            "alice/begun": ([Piece([5, 6])], None),
            "alice/ended": ([], b"reply"),
        }
        assert await journal.find(["alice/delivered"]) == [Taken(mark(), b"reply")]


async def test_a_row_of_the_first_release_is_of_a_request_that_never_expires(path):
    old = entry("alice/old")
    async with opened(path) as journal:
        await journal.accept([old])
    body = msgspec.msgpack.encode([old.model, old.request, old.prompt, old.seed])
    with sqlite3.connect(path) as database:
        database.execute("UPDATE requests SET body = ?", (body,))
    database.close()
    assert await left_by(path) == [entry("alice/old", attempt=2)]


async def test_an_entry_comes_back_as_it_was_with_its_pieces_in_order(place):
    pieces = [
        Piece([number, 2**31 - 1, Scored(number, -0.5, 3, [(7, -0.25)] * (number % 3))], number // 4, finish)
        for number, finish in enumerate([None, "stop", "length"] * 4)
    ]
    listeners = [Listener("tokenbus/v1/alice/out/a"), Listener("tokenbus/v1/alice/out/b", b"correlation")]
    async with opened(place) as journal:
        await journal.accept([entry("alice/a", expires_at=2_000.25)])
        for first in (10, 0, 5):  # by number, not by time
            await journal.progress([("alice/a", n, pieces[n]) for n in range(first, min(first + 5, 12))])
        await journal.listen("alice/a", listeners)
    expected = entry("alice/a", expires_at=2_000.25, attempt=2, pieces=pieces)
    expected.listeners = listeners
    assert await left_by(place) == [expected]


async def test_the_oldest_come_first_and_of_one_moment_the_first_written(place):
    async with opened(place) as journal:
        await journal.accept([entry("z/later", accepted_at=20.0), entry("y/early", accepted_at=10.0)])
        await journal.accept([entry("x/early", accepted_at=10.0)])
    assert [one.id for one in await left_by(place)] == ["y/early", "x/early", "z/later"]


async def test_every_opening_is_one_more_attempt_and_trials_count_until_one_passes(place):
    async with opened(place) as journal:
        await journal.accept([entry("alice/a"), entry("alice/b")])
    for attempt in (2, 3, 4):
        async with opened(place) as journal:
            assert [one.attempt for one in journal.unfinished()] == [attempt, attempt]
            await journal.trial("alice/a", begins=True)
            await journal.trial("alice/b", begins=True)
            await journal.trial("alice/b", begins=False)
    assert [one.trials for one in await left_by(place)] == [3, 0]


async def test_ended_but_undelivered_comes_back_with_its_reply_and_delivered_does_not(place):
    async with opened(place) as journal:
        await journal.accept([entry("alice/a"), entry("alice/b")])
        await journal.progress([("alice/a", 0, Piece([1]))])
        await journal.end("alice/a", b"the end")
        await finish(journal, "alice/b")
    assert await left_by(place) == [without_body(entry("alice/a", attempt=2, reply=b"the end"))]


async def test_the_end_takes_body_and_pieces_off_the_disk(path):
    async with opened(path) as journal:
        await journal.accept([entry("alice/a"), entry("alice/b")])
        await journal.progress([(id, n, Piece([n])) for id in ("alice/a", "alice/b") for n in range(3)])
        await journal.end("alice/a", b"reply")
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT id, count(*) FROM progress GROUP BY id").fetchall() == [("alice/b", 3)]
        assert database.execute("SELECT id FROM requests WHERE body IS NULL").fetchall() == [("alice/a",)]
    database.close()


async def test_what_is_queued_when_it_closes_is_written(place):
    async with opened(place) as journal:
        journal.accept([entry("alice/a")])
    assert [one.id for one in await left_by(place)] == ["alice/a"]


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


async def test_a_write_whose_waiter_has_gone_is_written_all_the_same(place):
    async with opened(place) as journal:
        asyncio.ensure_future(journal.accept([entry("alice/a")])).cancel()
        assert await journal.find(["alice/a"]) == [Taken(mark(), None)]


# For how long it keeps results, and how many


async def prune(journal: SqliteJournal | PostgresJournal) -> None:
    """What happens every half a minute."""
    while await journal._prune_some() == sqlite._PRUNE_AT_ONCE:
        pass


async def test_results_are_kept_for_the_retention_time_and_nothing_else_is_ever_dropped(place):
    now = 1_000.0
    async with opened(place, retention_s=60, clock=lambda: now) as journal:
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
        assert journal.rows == 3
    async with opened(place) as journal:
        assert journal.rows == 3


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
        assert journal.rows == sum(kept) + 2


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
