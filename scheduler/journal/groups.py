"""Group commit: whatever is asked for during one commit goes into the next."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from scheduler.journal.entry import JournalError

logger = logging.getLogger(__name__)

W = TypeVar("W")


class GroupCommit(Generic[W]):
    """``commit`` does a group of works in order, all of them or none, and returns what came of each.

    Should it raise, nothing more can be promised: whoever waits, or asks later, gets JournalError.
    """

    def __init__(self, name: str, commit: Callable[[list[W]], Awaitable[list[Any]]]) -> None:
        self._name = name
        self._commit = commit
        self._pending: list[tuple[W, asyncio.Future[Any]]] = []
        self._came = asyncio.Event()
        self._error: JournalError | None = None
        self._writer = asyncio.create_task(self._write(), name="journal")

    def __len__(self) -> int:
        """Works that wait."""
        return len(self._pending)

    def do(self, work: W) -> "asyncio.Future[Any]":
        """Queue a work, after those before it."""
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._error is not None:
            done.set_exception(self._error)
        else:
            self._pending.append((work, done))
            self._came.set()
        return done

    async def close(self) -> None:
        """Do what came before, and take nothing more."""
        self._error = self._error or JournalError(f"{self._name} is closed")
        self._came.set()
        await self._writer

    async def _write(self) -> None:
        while self._error is None or self._pending:
            await self._came.wait()
            self._came.clear()
            batch, self._pending = self._pending, []
            if not batch:
                continue
            try:
                results = await self._commit([work for work, _ in batch])
            except Exception as error:  # noqa: BLE001 - whatever it is, nobody may wait for ever
                self._fail(batch, JournalError(f"{self._name} can't be written: {error}"))
                return
            for (_, done), result in zip(batch, results, strict=True):
                if not done.done():
                    done.set_result(result)

    def _fail(self, batch: list[tuple[W, asyncio.Future[Any]]], error: JournalError) -> None:
        self._error = error
        logger.error("%s", error)
        waiting, self._pending = [*batch, *self._pending], []
        for _, done in waiting:
            if not done.done():
                done.set_exception(error)
