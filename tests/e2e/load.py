"""Tenants who keep a service busy, for whoever watches."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from protocol.client import Client
from protocol.request import Message, Request


@asynccontextmanager
async def busy(url: str, *tenants: str, requests: int = 3, max_tokens: int = 48) -> AsyncIterator[None]:
    """In the block each of these tenants has so many requests under way at any time."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_keep_asking(url, name, requests, max_tokens), name=name) for name in tenants]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _keep_asking(url: str, tenant: str, requests: int, max_tokens: int) -> None:
    async with Client(url, tenant=tenant) as client, asyncio.TaskGroup() as group:
        for number in range(requests):
            group.create_task(_ask(client, f"Count to {20 + number} in words.", max_tokens), name=f"{tenant} {number}")


async def _ask(client: Client, question: str, max_tokens: int) -> None:
    request = Request(messages=[Message("user", question)], max_tokens=max_tokens, ignore_eos=True, stream=True)
    while True:
        await client.complete(request, model="smollm2")
