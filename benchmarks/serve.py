"""The whole service: the same workload over a real broker, from tenants' clients."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import click
import msgspec

from benchmarks import cli, engine
from benchmarks.live import serving
from benchmarks.workload import WorkItem, Workload, config, load
from protocol.client import Client
from protocol.request import Request
from scheduler.config import OFF, Config, JournalConfig
from scheduler.simulation.figures import Percentiles


class ServeFigures(msgspec.Struct, frozen=True):
    """As clients see it: ``ttft_s`` from publishing to the first chunk, ``itl_s`` between chunks."""

    output_tokens: int
    prompt_tokens: int
    seconds: float
    output_tokens_per_s: float
    ttft_s: Percentiles
    itl_s: Percentiles
    engine_output_tokens_per_s: float | None = None
    share_of_engine: float | None = None
    journal_off_output_tokens_per_s: float | None = None
    share_of_journal_off: float | None = None


class Answer(msgspec.Struct):
    """``tokens`` that came out, and when they did, as the client sees it."""

    tokens: int
    ttft_s: float
    gaps_s: list[float]


async def run(workload: Workload, settings: Config, tenants: int) -> ServeFigures:
    """One run on a fresh broker, service and clients."""
    async with serving(settings) as running:
        return await _measure(workload, running.broker_url, settings.model.alias, tenants)


async def _measure(workload: Workload, url: str, model: str, tenants: int) -> ServeFigures:
    answers, seconds = await ask_all(workload, url, model, tenants)
    tokens = sum(answer.tokens for answer in answers)
    return ServeFigures(
        output_tokens=tokens,
        prompt_tokens=sum(len(item.prompt_token_ids) for item in workload.requests),
        seconds=seconds,
        output_tokens_per_s=tokens / seconds,
        ttft_s=Percentiles.of([answer.ttft_s for answer in answers]),
        itl_s=Percentiles.of([gap for answer in answers for gap in answer.gaps_s]),
    )


async def ask_all(workload: Workload, url: str, model: str, tenants: int) -> tuple[list[Answer], float]:
    """All requests at once, dealt out to so many tenants; the answers, and seconds until the last one."""
    clients = [Client(url, tenant=f"tenant{number}") for number in range(tenants)]
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for client in clients:
            await stack.enter_async_context(client)
        begun = time.perf_counter()
        tasks = [
            group.create_task(ask(clients[index % tenants], item, model), name=f"request {item.id}")
            for index, item in enumerate(workload.requests)
        ]
        return await asyncio.gather(*tasks), time.perf_counter() - begun


async def ask(client: Client, item: WorkItem, model: str) -> Answer:
    """One request, greedy and streamed, to its end."""
    request = Request(
        prompt=item.prompt_token_ids,
        max_tokens=item.max_tokens,
        temperature=0.0,
        ignore_eos=item.ignore_eos,
        stream=True,
    )
    stream = client.stream(request, model=model)
    begun = time.perf_counter()
    times = [time.perf_counter() async for _ in stream]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    return Answer(stream.result.usage.completion_tokens, times[0] - begun, gaps)


async def _against_engine(workload: Workload, settings: Config, tenants: int, rounds: int) -> ServeFigures:
    """Alternate with the bare engine; the median run by its share."""

    async def bare() -> float:
        return (await engine.run(workload, settings.worker())).output_tokens_per_s

    figures, rate = await alternate(workload, settings, tenants, rounds, bare)
    share = figures.output_tokens_per_s / rate
    return msgspec.structs.replace(figures, engine_output_tokens_per_s=rate, share_of_engine=share)


async def _against_journal_off(workload: Workload, settings: Config, tenants: int, rounds: int) -> ServeFigures:
    """Alternate with a service that keeps nothing; the median run by its share."""
    without = msgspec.structs.replace(settings, journal=JournalConfig(path=OFF))

    async def off() -> float:
        return (await run(workload, without, tenants)).output_tokens_per_s

    figures, rate = await alternate(workload, settings, tenants, rounds, off)
    share = figures.output_tokens_per_s / rate
    return msgspec.structs.replace(figures, journal_off_output_tokens_per_s=rate, share_of_journal_off=share)


async def alternate(
    workload: Workload, settings: Config, tenants: int, rounds: int, other: Callable[[], Awaitable[float]]
) -> tuple[ServeFigures, float]:
    """The run whose ratio to the other's rate just before or after is the median, and that rate.

    Who goes first changes from round to round, so that a machine that warms up or slows down favours neither.
    """
    pairs = []
    for number in range(rounds):
        if number % 2:
            figures = await run(workload, settings, tenants)
            rate = await other()
        else:
            rate = await other()
            figures = await run(workload, settings, tenants)
        pairs.append((figures, rate))
    pairs.sort(key=lambda pair: pair[0].output_tokens_per_s / pair[1])
    return pairs[len(pairs) // 2]


@click.command()
@cli.workload_option
@click.option("--tenants", default=4, show_default=True)
@click.option("--against-engine", type=int, help="Alternate this many rounds with the engine alone.")
@click.option("--against-journal-off", type=int, help="Alternate this many rounds with a service without a journal.")
@cli.options
def main(
    file: Path,
    tenants: int,
    against_engine: int | None,
    against_journal_off: int | None,
    model: str,
    max_running: int,
    max_batch_tokens: int,
    as_json: bool,
) -> None:
    """Run a workload over MQTT."""
    settings = config(model, max_running, max_batch_tokens)
    workload = load(file)
    if against_engine:
        figures = asyncio.run(_against_engine(workload, settings, tenants, against_engine))
    elif against_journal_off:
        figures = asyncio.run(_against_journal_off(workload, settings, tenants, against_journal_off))
    else:
        figures = asyncio.run(run(workload, settings, tenants))
    cli.show(figures, as_json)


if __name__ == "__main__":
    main()
