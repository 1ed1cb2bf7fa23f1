"""Journals for tests, and what is done to them."""

import subprocess
import sys
from pathlib import Path

import msgspec

from protocol.request import Request
from scheduler.journal.entry import Entry, Listener, digest
from scheduler.journal.postgres import PostgresJournal
from scheduler.journal.sqlite import SqliteJournal

ROOT = Path(__file__).parents[2]

#: A file, or the URL of a database.
Place = Path | str


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
    return msgspec.structs.replace(one, model="", request=Request(), prompt=[], seed=0, expires_at=None, pieces=[])


def mark(prompt: str = "Hello") -> bytes:
    return digest("tiny", entry("any/any", prompt).request)


def opened(place: Place, **given) -> SqliteJournal | PostgresJournal:
    if isinstance(place, Path):
        return SqliteJournal(place, **{"retention_s": 3600, "max_bytes": 2**30, **given})
    return PostgresJournal(place, **{"replica": "main", "lease_s": 60.0, "retention_s": 3600, **given})


async def finish(journal, *ids: str, reply: bytes = b"reply") -> None:
    for id in ids:
        ending = journal.end(id, reply)
        await journal.delivered(id)
        await ending


async def die(journal: PostgresJournal) -> None:
    """Leave it as a process that is killed does: without a farewell."""
    for task in journal._tasks:
        task.cancel()
    await journal._connection.close()
    await journal.__aexit__()


async def left_by(place: Place) -> list[Entry]:
    """What whoever opens it next has to take up."""
    async with opened(place) as journal:
        return list(journal.unfinished())


DYING = """
import asyncio, os, signal, sys
from pathlib import Path
from scheduler.journal.entry import Piece
from tests.scheduler.journals import entry, finish, opened

async def main():
    place = sys.argv[1]
    async with opened(place if "://" in place else Path(place)) as journal:
        await journal.accept([entry("alice/" + name) for name in ("new", "begun", "ended", "delivered")])
        await journal.progress([("alice/begun", 0, Piece([5, 6]))])
        await finish(journal, "alice/delivered")
        await journal.end("alice/ended", b"reply")
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def flip(path: Path, at: int, count: int) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + count] = bytes(byte ^ 0xFF for byte in content[at : at + count])
    path.write_bytes(content)
