"""A console without a service behind it, and a client of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import ClientSession, CookieJar
from prometheus_client import CollectorRegistry

from protocol.transport import BrokerAddress
from scheduler.config import Config
from scheduler.console.server import Console, console_for
from scheduler.http import HttpServer
from tests.scheduler.console.reports import Bench

PASSWORD = "correct horse battery"


@asynccontextmanager
async def serving(
    config: Config, bench: Bench | None, broker: BrokerAddress | None = None
) -> AsyncIterator[ClientSession]:
    """A client of the console; without a bench the service isn't there yet."""
    console = console_for(config, lambda: {"worker": True})
    assert isinstance(console, Console)
    if bench is not None:
        console.open(bench.activity, broker)
    http = HttpServer("127.0.0.1", 0, registry=CollectorRegistry(), live=dict, ready=dict, console=console)
    async with http as server, ClientSession(f"{server.url}/", cookie_jar=CookieJar(unsafe=True)) as client:
        yield client
