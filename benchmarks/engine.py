"""The engine without MQTT: batcher, loop and worker process on a workload file."""

import asyncio
import time
from pathlib import Path
from typing import get_args

import click
import msgspec

from benchmarks import cli
from benchmarks import floor as bare
from benchmarks.workload import Workload, config, load, sequence
from protocol.plan import WeightsName, WorkerConfig
from scheduler.loop import Engine, StepReport


class EngineFigures(msgspec.Struct, frozen=True):
    """``seconds`` runs from the first submission to the last token; ``mean_gap_s``: an iteration's time beside the worker's.

    ``floor_ratio``: the share of the worker's time that the bare matrix products of the same steps take.
    """

    output_tokens: int
    prompt_tokens: int
    seconds: float
    output_tokens_per_s: float
    steps: int
    mean_running: float
    mean_step_s: float
    mean_gap_s: float
    preemptions: int
    token_ids: dict[str, list[int]]
    floor_ratio: float | None = None


async def run(workload: Workload, worker: WorkerConfig, *, floor: bool = False) -> EngineFigures:
    """One run on a fresh worker; with ``floor``, the bare products of its steps after it."""
    async with Engine(worker) as engine:
        loop = asyncio.create_task(engine.run(), name="loop")
        try:
            figures, reports = await _measure(workload, engine)
        finally:
            loop.cancel()
    if not floor:
        return figures
    steps = [(report.prefill_tokens + report.decode_tokens, len(report.events)) for report in reports]
    products_s = await bare.seconds(bare.Job(worker, steps))
    return msgspec.structs.replace(figures, floor_ratio=products_s / sum(report.seconds for report in reports))


async def _measure(workload: Workload, engine: Engine) -> tuple[EngineFigures, list[StepReport]]:
    outputs: dict[str, list[int]] = {str(item.id): [] for item in workload.requests}
    unfinished = set(outputs)
    reports: list[StepReport] = []
    begun = time.perf_counter()
    for item in workload.requests:
        engine.submit(sequence(item, engine.info.eos_ids))
    while unfinished:
        report = await engine.reports.get()
        reports.append(report)
        for event in report.events:
            outputs[event.id].append(event.token)
            if event.finish:
                unfinished.remove(event.id)
        if report.given_up:
            raise RuntimeError(f"the worker failed on {len(report.given_up)} sequences")
    seconds = time.perf_counter() - begun
    tokens = sum(len(output) for output in outputs.values())
    figures = EngineFigures(
        output_tokens=tokens,
        prompt_tokens=sum(len(item.prompt_token_ids) for item in workload.requests),
        seconds=seconds,
        output_tokens_per_s=tokens / seconds,
        steps=len(reports),
        mean_running=sum(len(report.rows) for report in reports) / len(reports),
        mean_step_s=sum(report.seconds for report in reports) / len(reports),
        mean_gap_s=sum(report.gap_s for report in reports) / len(reports),
        preemptions=reports[-1].preemptions,
        token_ids=outputs,
    )
    return figures, reports


@click.command()
@cli.workload_option
@cli.options
@click.option("--weights", default="auto", show_default=True, type=click.Choice(get_args(WeightsName)))
@click.option("--floor", is_flag=True, help="Time the bare matrix products of the same steps, too (CPU).")
def main(
    file: Path, model: str, max_running: int, max_batch_tokens: int, as_json: bool, weights: WeightsName, floor: bool
) -> None:
    """Run a workload through the engine alone."""
    worker = config(model, max_running, max_batch_tokens).worker()
    figures = asyncio.run(run(load(file), msgspec.structs.replace(worker, weights=weights), floor=floor))
    cli.show(figures, as_json, hidden=("token_ids",))


if __name__ == "__main__":
    main()
