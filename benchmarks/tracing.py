"""What tracing costs: a workload over MQTT with every request's spans sent to a collector, and without, by turns."""

import asyncio
from pathlib import Path

import click
import msgspec

from benchmarks import cli, serve
from benchmarks.collector import Collector, collecting
from benchmarks.workload import Workload, config, load
from scheduler.config import Config, TracingConfig


class TracingFigures(msgspec.Struct, frozen=True):
    """Output tokens/s of the round whose ratio is the median; ``spans`` came in from all rounds of so many ``requests``."""

    rounds: int
    requests: int
    spans: int
    on_output_tokens_per_s: float
    off_output_tokens_per_s: float
    share: float


async def measure(workload: Workload, settings: Config, tenants: int, rounds: int) -> TracingFigures:
    async with collecting(Collector()) as collector:
        traced = msgspec.structs.replace(settings, tracing=TracingConfig(collector.endpoint))

        async def off() -> float:
            return (await serve.run(workload, settings, tenants)).output_tokens_per_s

        figures, rate = await serve.alternate(workload, traced, tenants, rounds, off)
    return TracingFigures(
        rounds=rounds,
        requests=rounds * len(workload.requests),
        spans=len(collector.spans),
        on_output_tokens_per_s=figures.output_tokens_per_s,
        off_output_tokens_per_s=rate,
        share=figures.output_tokens_per_s / rate,
    )


@click.command()
@cli.workload_option
@click.option("--tenants", default=4, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@cli.options
def main(
    file: Path, tenants: int, rounds: int, model: str, max_running: int, max_batch_tokens: int, as_json: bool
) -> None:
    """Run a workload over MQTT with tracing and without."""
    settings = config(model, max_running, max_batch_tokens)
    cli.show(asyncio.run(measure(load(file), settings, tenants, rounds)), as_json)


if __name__ == "__main__":
    main()
