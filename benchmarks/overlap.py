"""When to plan the next step: never ahead, at once, or as ``scheduler/lead.py`` does. What the worker waits, and what a newcomer.

A batch that decodes all the time, and newcomers that come one after the other at random moments.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Callable

import click
import msgspec

from benchmarks import cli
from benchmarks.workload import config
from protocol.plan import WorkerConfig
from scheduler.core.sequence import Sequence
from scheduler.lead import Lead
from scheduler.loop import Engine, StepReport

_TOKEN = 7


class _Fixed(Lead):
    """The next step is planned so long after one has begun, however long that takes."""

    def __init__(self, delay_s: float) -> None:
        super().__init__()
        self._delay_s = delay_s

    def delay_s(self, tokens: int) -> float:
        del tokens
        return self._delay_s


_LEADS: dict[str, Callable[[], Lead]] = {
    "never": lambda: _Fixed(3600),
    "at once": lambda: _Fixed(0),
    "as late as may be": Lead,
}


class OverlapFigures(msgspec.Struct, frozen=True):
    """Of one way, over all rounds. ``newcomer_steps``: from a newcomer's submission to its first token, in mean steps; at least
    the one it is computed in and, on average, half of the one that runs when it comes."""

    lead: str
    steps: int
    mean_step_s: float
    median_waited_s: float
    waited_share: float
    newcomer_steps: float


class Overlap(msgspec.Struct, frozen=True):
    ways: list[OverlapFigures]


class _Run(msgspec.Struct, frozen=True):
    reports: list[StepReport]
    newcomers_s: list[float]


async def _run(worker: WorkerConfig, lead: Lead, batch: int, newcomers: int) -> _Run:
    draw = random.Random(3)
    async with Engine(worker, lead=lead) as engine:
        for number in range(batch):
            engine.submit(Sequence(f"old {number}", [_TOKEN] * 8, max_tokens=engine.info.max_model_len - 8))
        loop = asyncio.create_task(engine.run(), name="loop")
        try:
            reports = [await engine.reports.get() for _ in range(20)]
            step_s = statistics.median(report.seconds for report in reports)
            reports.clear()
            times = [
                await _newcomer(engine, f"new {number}", step_s * draw.uniform(1, 3), reports)
                for number in range(newcomers)
            ]
        finally:
            loop.cancel()
    return _Run(reports, times)


async def _newcomer(engine: Engine, id: str, pause_s: float, reports: list[StepReport]) -> float:
    """How long one waits for its first token that comes after a pause."""
    timer = asyncio.create_task(asyncio.sleep(pause_s), name="pause")
    while not timer.done():
        report = asyncio.create_task(engine.reports.get(), name="report")
        await asyncio.wait({timer, report}, return_when=asyncio.FIRST_COMPLETED)
        if report.done():
            reports.append(report.result())
        else:
            report.cancel()
    begun = time.monotonic()
    engine.submit(Sequence(id, [_TOKEN], max_tokens=1))
    while True:
        reports.append(await engine.reports.get())
        if any(event.id == id for event in reports[-1].events):
            return reports[-1].at - begun


def _figures(name: str, runs: list[_Run]) -> OverlapFigures:
    reports = [report for run in runs for report in run.reports]
    busy_s, waited_s = sum(report.seconds for report in reports), sum(report.waited_s for report in reports)
    step_s = busy_s / len(reports)
    return OverlapFigures(
        lead=name,
        steps=len(reports),
        mean_step_s=step_s,
        median_waited_s=statistics.median(report.waited_s for report in reports),
        waited_share=waited_s / busy_s,
        newcomer_steps=statistics.mean(time_s for run in runs for time_s in run.newcomers_s) / step_s,
    )


async def measure(worker: WorkerConfig, batch: int, newcomers: int, rounds: int) -> Overlap:
    """The ways take turns."""
    runs: dict[str, list[_Run]] = {name: [] for name in _LEADS}
    for _ in range(rounds):
        for name, kind in _LEADS.items():
            runs[name].append(await _run(worker, kind(), batch, newcomers))
    return Overlap([_figures(name, of) for name, of in runs.items()])


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--batch", default=31, show_default=True, help="Sequences that decode all the time.")
@click.option("--newcomers", default=20, show_default=True, help="In each round.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(model: str, batch: int, newcomers: int, rounds: int, as_json: bool) -> None:
    """Compare when the next step is planned."""
    worker = config(model, batch + 1, 256).worker()
    cli.show(asyncio.run(measure(worker, batch, newcomers, rounds)), as_json)


if __name__ == "__main__":
    main()
