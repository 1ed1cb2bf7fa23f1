"""When which request is to end."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from sortedcontainers import SortedList


class Deadlines:
    """Deadlines in Unix seconds, as ``clock`` gives them; adding and dropping one cost O(log n). One task may wait."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._due: SortedList = SortedList()  # (at, id)
        self._added = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def add(self, id: str, at: float) -> None:
        self._due.add((at, id))
        self._added.set()

    def drop(self, id: str, at: float) -> None:
        """It ended by itself; does nothing when its deadline has passed."""
        self._due.discard((at, id))

    async def passed(self) -> str:
        """Wait for the next deadline to pass; whose it was."""
        while True:
            self._added.clear()
            left_s = self._due[0][0] - self._clock() if self._due else None
            if left_s is not None and left_s <= 0:
                _, id = self._due.pop(0)
                return str(id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._added.wait()
