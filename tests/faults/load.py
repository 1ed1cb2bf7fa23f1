"""Requests of every length and temperature, some for several texts, and asking them."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable

from protocol.client import Client
from protocol.replies import Result
from protocol.request import Request


def requests(count: int, *, shortest: int = 40, longest: int = 400) -> dict[str, Request]:
    draw = random.Random(count)
    return {
        f"r{number}": Request(
            prompt=[draw.randrange(3, 90) for _ in range(draw.randint(2, 40))],
            max_tokens=draw.randint(shortest, longest),
            temperature=draw.choice((0.0, 1.0)),
            seed=number,
            ignore_eos=True,
            stream=True,
            n=3 if number % 10 == 9 else 1,
        )
        for number in range(count)
    }


def told(result: Result) -> dict[int, str]:
    """The texts of its choices."""
    return {choice.index: choice.text for choice in result.data.choices}


async def ask(
    clients: list[Client],
    asked: dict[str, Request],
    prefix: str = "",
    on_chunk: Callable[[], object] | None = None,
    every_s: float = 0.0,
) -> dict[str, Result]:
    """Ask everything, at once or one ``every_s``; the streamed pieces must come in order and make up the text."""

    async def one(client: Client, id: str, request: Request) -> Result:
        stream = client.stream(request, model="tiny", request_id=prefix + id)
        texts: defaultdict[int, str] = defaultdict(str)
        numbers = []
        async for chunk in stream:
            texts[chunk.index] += chunk.text
            numbers.append(chunk.seq)
            if on_chunk is not None:
                on_chunk()
        assert numbers == list(range(len(numbers)))
        assert texts == told(stream.result)
        return stream.result

    tasks = {}
    async with asyncio.TaskGroup() as group:
        for number, (id, request) in enumerate(asked.items()):
            tasks[id] = group.create_task(one(clients[number % len(clients)], id, request), name=id)
            if every_s:
                await asyncio.sleep(every_s)
    return {id: task.result() for id, task in tasks.items()}
