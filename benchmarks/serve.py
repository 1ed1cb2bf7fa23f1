"""The whole service: the same workload over a real broker, from tenants' clients."""

import asyncio
import contextlib
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import click
import msgspec

from benchmarks import cli, engine
from benchmarks.workload import WorkItem, Workload, config, load
from protocol.client import Client
from protocol.request import Request
from scheduler import service
from scheduler.config import BrokerConfig, Config, MetricsConfig


class Percentiles(msgspec.Struct, frozen=True):
    """Seconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: list[float]) -> "Percentiles":
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return cls(cuts[49], cuts[94], cuts[98])


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


class _Answer(msgspec.Struct):
    tokens: int
    ttft_s: float
    gaps_s: list[float]


async def run(workload: Workload, settings: Config, tenants: int) -> ServeFigures:
    """One run on a fresh broker, service and clients."""
    with tempfile.TemporaryDirectory() as data_dir:
        settings = msgspec.structs.replace(
            settings, broker=BrokerConfig(data_dir=data_dir), metrics=MetricsConfig(port=0)
        )
        async with service.running(settings) as running:
            return await _measure(workload, running.broker_url, settings.model.alias, tenants)


async def _measure(workload: Workload, url: str, model: str, tenants: int) -> ServeFigures:
    clients = [Client(url, tenant=f"tenant{number}") for number in range(tenants)]
    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        for client in clients:
            await stack.enter_async_context(client)
        begun = time.perf_counter()
        tasks = [
            group.create_task(_ask(clients[index % tenants], item, model), name=f"request {item.id}")
            for index, item in enumerate(workload.requests)
        ]
        answers = await asyncio.gather(*tasks)
        seconds = time.perf_counter() - begun
    tokens = sum(answer.tokens for answer in answers)
    return ServeFigures(
        output_tokens=tokens,
        prompt_tokens=sum(len(item.prompt_token_ids) for item in workload.requests),
        seconds=seconds,
        output_tokens_per_s=tokens / seconds,
        ttft_s=Percentiles.of([answer.ttft_s for answer in answers]),
        itl_s=Percentiles.of([gap for answer in answers for gap in answer.gaps_s]),
    )


async def _ask(client: Client, item: WorkItem, model: str) -> _Answer:
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
    return _Answer(stream.result.usage.completion_tokens, times[0] - begun, gaps)


async def _against_engine(workload: Workload, settings: Config, tenants: int, rounds: int) -> ServeFigures:
    """Alternate with the bare engine; report the median run and the median of the ratios."""
    pairs = []
    for _ in range(rounds):
        bare = await engine.run(workload, settings.worker())
        pairs.append((await run(workload, settings, tenants), bare.output_tokens_per_s))
    pairs.sort(key=lambda pair: pair[0].output_tokens_per_s / pair[1])
    figures, bare_rate = pairs[len(pairs) // 2]
    return msgspec.structs.replace(
        figures,
        engine_output_tokens_per_s=bare_rate,
        share_of_engine=figures.output_tokens_per_s / bare_rate,
    )


@click.command()
@cli.workload_option
@click.option("--tenants", default=4, show_default=True)
@click.option("--against-engine", "rounds", type=int, help="Alternate this many rounds with the engine alone.")
@cli.options
def main(
    file: Path, tenants: int, rounds: int | None, model: str, max_running: int, max_batch_tokens: int, as_json: bool
) -> None:
    """Run a workload over MQTT."""
    settings = config(model, max_running, max_batch_tokens)
    workload = load(file)
    if rounds:
        figures = asyncio.run(_against_engine(workload, settings, tenants, rounds))
    else:
        figures = asyncio.run(run(workload, settings, tenants))
    cli.show(figures, as_json)


if __name__ == "__main__":
    main()
