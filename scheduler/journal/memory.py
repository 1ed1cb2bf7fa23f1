"""No journal: what was accepted lives as long as the process does."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Collection, Iterable, Sequence
from typing import Self, TypeVar

from scheduler.journal.entry import Entry, Listener, Piece, Taken, digest

#: Results that are kept for those who ask again.
_MOST_RESULTS = 10_000

T = TypeVar("T")


class MemoryJournal:
    """See ``Journal``: a repeated id joins or replays here too, but nothing outlives the process."""

    durable = False
    full = False
    lag = 0

    def __init__(self) -> None:
        self._running: dict[str, bytes] = {}
        self._ended: OrderedDict[str, Taken] = OrderedDict()

    @property
    def rows(self) -> int:
        return len(self._running) + len(self._ended)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def unfinished(self) -> Sequence[Entry]:
        return ()

    def accept(self, entries: Sequence[Entry]) -> Awaitable[list[Taken | None]]:
        return _done([self._accept(entry) for entry in entries])

    def find(self, ids: Sequence[str]) -> Awaitable[list[Taken | None]]:
        return _done([self._find(id) for id in ids])

    def progress(self, pieces: Iterable[tuple[str, int, Piece]]) -> Awaitable[Collection[str]]:  # noqa: ARG002
        return _done(())

    def listen(self, id: str, listeners: Sequence[Listener]) -> Awaitable[None]:  # noqa: ARG002
        return _done(None)

    def end(self, id: str, reply: bytes) -> Awaitable[bool]:
        self._ended[id] = Taken(self._running.pop(id), reply)
        if len(self._ended) > _MOST_RESULTS:
            self._ended.popitem(last=False)
        return _done(True)

    def delivered(self, id: str) -> Awaitable[None]:  # noqa: ARG002
        return _done(None)

    def trial(self, id: str, *, begins: bool) -> Awaitable[None]:  # noqa: ARG002
        return _done(None)

    def _accept(self, entry: Entry) -> Taken | None:
        taken = self._find(entry.id)
        if taken is None:
            self._running[entry.id] = digest(entry.model, entry.request)
        return taken

    def _find(self, id: str) -> Taken | None:
        if id in self._running:
            return Taken(self._running[id], None)
        return self._ended.get(id)


def _done(result: T) -> "asyncio.Future[T]":
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(result)
    return future
