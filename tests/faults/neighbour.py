"""A tenant who does nothing special, and must not notice what others do."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

from protocol.client import Client
from protocol.request import Request

_draw = random.Random(7)
_REQUESTS = [
    Request(
        prompt=[_draw.randrange(3, 90) for _ in range(_draw.randint(2, 40))],
        max_tokens=_draw.randint(20, 60),
        temperature=0.0,
        ignore_eos=True,
        stream=True,
    )
    for _ in range(8)
]


async def answers(client: Client) -> list[str]:
    """All requests at once."""
    results = await asyncio.gather(*(client.complete(request, model="tiny") for request in _REQUESTS))
    return [result.text for result in results]


@contextlib.asynccontextmanager
async def neighbour(url: str) -> AsyncIterator[None]:
    """Asks all the while in the block, at least once; every answer must be what it was before.

    Wait for the service to settle after the block: within, nothing but chance makes it settle.
    """
    block_ended = asyncio.Event()

    async def ask_again() -> None:
        while True:
            assert await answers(client) == alone
            if block_ended.is_set():
                return

    async with Client(url, tenant="neighbour") as client:
        alone = await answers(client)
        async with asyncio.TaskGroup() as group:
            group.create_task(ask_again(), name="neighbour")
            yield
            block_ended.set()
