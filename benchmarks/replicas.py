"""Two replicas with a shared journal against one with the same: their workers sleep, so that cores are no limit.

As many requests as four full batches are kept outstanding; a replica's own counter says how many tokens came out meanwhile.
``python -m benchmarks.replicas serve …`` is ``tokenbus serve …`` with a worker that sleeps.
"""

import asyncio
import contextlib
import itertools
import os
import re
import socket
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import psycopg

from benchmarks import cli
from benchmarks.database import cluster
from benchmarks.process import serving
from protocol.client import Client
from protocol.request import Request
from scheduler import cli as service_cli
from scheduler import worker
from scheduler.mqtt.broker import EmbeddedBroker

_MODEL = "sleeping"
_TENANTS = 4
_BATCHES_OUTSTANDING = 4
_GENERATED = re.compile(r'tokenbus_tokens_total\{kind="generated",tenant=.*} ')
_KNOWN = re.compile(r"tokenbus_replicas ")
_UP_S = 120.0


class ReplicaFigures(msgspec.Struct, frozen=True):
    """Medians over the rounds. ``shares``: of the tokens, each replica's in the last round."""

    rounds: int
    seconds: float
    max_running: int
    step_ms: float
    one_tokens_per_s: float
    two_tokens_per_s: float
    ratio: float
    shares: list[float]


class Load(msgspec.Struct, frozen=True):
    """What is asked of the replicas, and for how long."""

    model: str
    max_running: int
    output_tokens: int
    warm_s: float
    seconds: float


async def _ask(client: Client, load: Load, number: int) -> None:
    """One request after the other, of varying lengths, so that they don't all end in the same step."""
    for round_ in itertools.count():
        length = load.output_tokens // 2 + (7 * number + 13 * round_) % load.output_tokens
        request = Request(prompt=[5, 6, 7, 8], max_tokens=length, temperature=0.0, ignore_eos=True)
        await client.complete(request, model=_MODEL)


def _read(port: int, series: re.Pattern[str]) -> float:
    """The sum of a replica's series; 0 while there are none."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return 0.0
    return sum(float(line.rpartition(" ")[2]) for line in lines if series.match(line))


async def _all(ports: Sequence[int], series: re.Pattern[str]) -> list[float]:
    return [await asyncio.to_thread(_read, port, series) for port in ports]


async def _until_acquainted(ports: Sequence[int]) -> None:
    async with asyncio.timeout(_UP_S):
        while min(await _all(ports, _KNOWN)) < len(ports):  # noqa: ASYNC110 - other processes' affair
            await asyncio.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def _rates(load: Load, database: str, count: int) -> list[float]:
    """Output tokens/s of each of so many replicas, on a journal without rows."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute("DROP SCHEMA IF EXISTS tokenbus CASCADE")
    ports = [_free_port() for _ in range(count)]
    async with contextlib.AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = await stack.enter_async_context(EmbeddedBroker(data_dir=folder / "broker"))
        for number, port in enumerate(ports):
            (own := folder / str(number)).mkdir()
            settings: dict[str, object] = {
                "model.alias": _MODEL,
                "model.path": load.model,
                "engine.max_running": load.max_running,
                "journal.url": database,
                "service.replica": f"r{number}",
                "metrics.port": port,
            }
            await stack.enter_async_context(serving(own, broker.url, settings, module="benchmarks.replicas"))
        await _until_acquainted(ports)
        clients = [await stack.enter_async_context(Client(broker.url, tenant=f"t{n}")) for n in range(_TENANTS)]
        async with asyncio.TaskGroup() as group:
            askers = [
                group.create_task(_ask(clients[number % _TENANTS], load, number), name=f"asker {number}")
                for number in range(_BATCHES_OUTSTANDING * load.max_running)
            ]
            await asyncio.sleep(load.warm_s)
            before = await _all(ports, _GENERATED)
            await asyncio.sleep(load.seconds)
            after = await _all(ports, _GENERATED)
            for asker in askers:
                asker.cancel()
    return [(late - early) / load.seconds for early, late in zip(before, after, strict=True)]


async def measure(load: Load, rounds: int, step_ms: float) -> ReplicaFigures:
    """One replica and two in turn."""
    os.environ["SLEEPER_STEP_S"] = str(step_ms / 1000)
    with cluster() as database:
        runs = [(await _rates(load, database, 1), await _rates(load, database, 2)) for _ in range(rounds)]
    return ReplicaFigures(
        rounds=rounds,
        seconds=load.seconds,
        max_running=load.max_running,
        step_ms=step_ms,
        one_tokens_per_s=statistics.median(sum(one) for one, _ in runs),
        two_tokens_per_s=statistics.median(sum(two) for _, two in runs),
        ratio=statistics.median(sum(two) / sum(one) for one, two in runs),
        shares=[rate / sum(runs[-1][1]) for rate in runs[-1][1]],
    )


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Whose tokenizer is used.")
@click.option("--max-running", default=16, show_default=True)
@click.option("--step-ms", default=40.0, show_default=True, help="What a worker takes over a step.")
@click.option("--output-tokens", default=64, show_default=True, help="Of a request, on average.")
@click.option("--warm-s", default=5.0, show_default=True)
@click.option("--seconds", default=15.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    model: str,
    max_running: int,
    step_ms: float,
    output_tokens: int,
    warm_s: float,
    seconds: float,
    rounds: int,
    as_json: bool,
) -> None:
    """The throughput of two replicas by that of one."""
    load = Load(model, max_running, output_tokens, warm_s, seconds)
    cli.show(asyncio.run(measure(load, rounds, step_ms)), as_json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        worker.COMMAND = (sys.executable, "-m", "benchmarks.sleeper")
        service_cli.main()
    else:
        main()
