"""What sharing the cores costs: one worker alone and two at once, with OpenMP's default spinning and with ours."""

import asyncio
import os

import click
import msgspec

from benchmarks import cli, engine
from benchmarks.workload import Workload, config, mixed
from protocol.plan import WorkerConfig

#: libgomp's own default (GCC manual, "GOMP_SPINCOUNT"), and scheduler/worker.py's.
_SPINS = {"default": "300000", "short": "2000"}


class ContentionFigures(msgspec.Struct, frozen=True):
    """Output tokens/s, of both workers together where there are two."""

    alone_default: float
    alone_short: float
    two_default: float
    two_short: float


async def _together(workload: Workload, worker: WorkerConfig, count: int) -> float:
    runs = await asyncio.gather(*(engine.run(workload, worker) for _ in range(count)))
    return sum(run.output_tokens for run in runs) / max(run.seconds for run in runs)


def measure(workload: Workload, worker: WorkerConfig) -> ContentionFigures:
    """Each case on fresh workers."""
    rates = {}
    for count, name in ((1, "alone"), (2, "two")):
        for spins, value in _SPINS.items():
            os.environ["GOMP_SPINCOUNT"] = value
            rates[f"{name}_{spins}"] = asyncio.run(_together(workload, worker, count))
    return ContentionFigures(**rates)


@click.command()
@cli.options
def main(model: str, max_running: int, max_batch_tokens: int, as_json: bool) -> None:
    """Sixteen requests of 8 tokens; two_default may take minutes."""
    workload = mixed(16, prompt=(8, 16), output=(8, 8), seed=3)
    cli.show(measure(workload, config(model, max_running, max_batch_tokens).worker()), as_json)


if __name__ == "__main__":
    main()
