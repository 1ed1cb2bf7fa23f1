"""What a tenant that doesn't read costs the others: their time between chunks while it reads, and while it has stopped."""

import asyncio
import contextlib
import socket
import statistics
import time
from collections.abc import AsyncIterator
from itertools import pairwise

import click
import msgspec

from benchmarks import cli
from benchmarks.live import serving
from benchmarks.workload import WorkItem, Workload, config, mixed
from protocol import topics
from protocol.client import Client
from protocol.request import Request, encode_request
from protocol.transport import BrokerAddress, Transport
from scheduler.config import Config
from scheduler.simulation.figures import Percentiles

_DEAF = "deaf"


class SlowReaderFigures(msgspec.Struct, frozen=True):
    """Seconds between chunks as the other tenants see them; ``p99_ratio``, stopped over reading, is the rounds' median."""

    rounds: int
    reading_s: Percentiles
    stopped_s: Percentiles
    p99_ratio: float


@contextlib.asynccontextmanager
async def _reader(address: BrokerAddress, *, reads: bool) -> AsyncIterator[None]:
    """A bare MQTT connection with a small buffer that is told everything; nobody takes it in unless it ``reads``."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (address.host, address.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    filter_ = topics.out(_DEAF, "#").encode()
    subscribe = b"\0\1\0" + len(filter_).to_bytes(2) + filter_ + b"\0"
    # CONNECT with a clean start, neither keep-alive nor properties, and an identifier from the broker; then SUBSCRIBE.
    writer.write(bytes.fromhex("10 0d 0004 4d515454 05 02 0000 00 0000"))
    writer.write(bytes((0x82, len(subscribe))) + subscribe)
    await reader.readexactly(2)
    reading = asyncio.create_task(_read(reader), name="reader") if reads else None
    try:
        yield
    finally:
        if reading is not None:
            reading.cancel()
        writer.transport.abort()


async def _read(reader: asyncio.StreamReader) -> None:
    while await reader.read(65_536):
        pass


async def _gaps(client: Client, item: WorkItem, model: str) -> list[float]:
    stream = client.stream(_request(item), model=model)
    times = [time.perf_counter() async for _ in stream]
    return [later - earlier for earlier, later in pairwise(times)]


def _request(item: WorkItem) -> Request:
    return Request(
        prompt=item.prompt_token_ids, max_tokens=item.max_tokens, temperature=0.0, ignore_eos=True, stream=True
    )


async def _round(url: str, model: str, flood: Workload, others: Workload, *, reads: bool) -> list[float]:
    """Both at once; ends when the others have their answers and what is left of the flood was cancelled."""
    address = BrokerAddress.parse(url)
    name = time.monotonic_ns()
    async with (
        _reader(address, reads=reads),
        Transport(address) as deaf,
        Client(url, tenant="one") as one,
        Client(url, tenant="two") as two,
    ):
        for item in flood.requests:
            await deaf.publish(topics.request(_DEAF, model, f"{name}-{item.id}"), encode_request(_request(item)))
        asking = (_gaps((one, two)[item.id % 2], item, model) for item in others.requests)
        gaps = await asyncio.gather(*asking)
        for item in flood.requests:
            await deaf.publish(topics.cancel(_DEAF, f"{name}-{item.id}"), b"")
    return [gap for each in gaps for gap in each]


async def run(settings: Config, flood: Workload, others: Workload, rounds: int) -> SlowReaderFigures:
    """On one service; the first round, which only warms it up, doesn't count."""
    model = settings.model.alias
    reading: list[float] = []
    stopped: list[float] = []
    ratios = []
    async with serving(settings) as running:
        await _round(running.broker_url, model, flood, others, reads=True)
        for _ in range(rounds):
            while_reading = await _round(running.broker_url, model, flood, others, reads=True)
            while_stopped = await _round(running.broker_url, model, flood, others, reads=False)
            ratios.append(Percentiles.of(while_stopped).p99 / Percentiles.of(while_reading).p99)
            reading += while_reading
            stopped += while_stopped
    return SlowReaderFigures(rounds, Percentiles.of(reading), Percentiles.of(stopped), statistics.median(ratios))


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Each is run with the reader reading, then stopped.")
@click.option("--flood", default=16, show_default=True, help="Streams to the tenant that doesn't read.")
@click.option("--tokens", default=32, show_default=True, help="Tokens in each stream.")
@click.option("--vocab", default=49152, show_default=True, help="Prompts are drawn from token ids below this.")
@cli.options
def main(
    rounds: int,
    flood: int,
    tokens: int,
    vocab: int,
    model: str,
    max_running: int,
    max_batch_tokens: int,
    as_json: bool,
) -> None:
    """Eight streams of two tenants, beside a third one's."""
    output = tokens, tokens
    flooding = mixed(flood, prompt=(8, 16), output=output, seed=5, vocab=vocab)
    others = mixed(8, prompt=(8, 16), output=output, seed=6, vocab=vocab)
    settings = config(model, max_running, max_batch_tokens)
    cli.show(asyncio.run(run(settings, flooding, others, rounds)), as_json)


if __name__ == "__main__":
    main()
