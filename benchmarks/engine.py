"""The engine without MQTT: batcher, loop and worker process on a workload file."""

import asyncio
import time
from pathlib import Path
from typing import get_args

import click
import msgspec

from benchmarks import bare, cli
from benchmarks.workload import Workload, config, load, sequence
from protocol.plan import KVDtypeName, WeightsName, WorkerConfig
from scheduler.core.speculation import Speculation
from scheduler.lead import Lead
from scheduler.loop import Engine, StepReport
from scheduler.simulation.fit import TracedStep


class EngineFigures(msgspec.Struct, frozen=True):
    """``seconds`` runs from the first submission to the last token. ``mean_gap_s``: an iteration's time beside the worker's;
    ``mean_waited_s``: how long the worker waited for a step, ``waited_share`` by how long steps took. ``floor_ratio``: the share
    of the worker's time that the bare matrix products of the same steps take.
    """

    output_tokens: int
    prompt_tokens: int
    seconds: float
    output_tokens_per_s: float
    steps: int
    mean_running: float
    mean_step_s: float
    mean_gap_s: float
    mean_waited_s: float
    waited_share: float
    late_tokens: int
    preemptions: int
    token_ids: dict[str, list[int]]
    floor_ratio: float | None = None


async def run(workload: Workload, worker: WorkerConfig, lead: Lead | None = None) -> EngineFigures:
    """One run on a fresh worker."""
    figures, _ = await record(workload, worker, lead)
    return figures


async def record(
    workload: Workload, worker: WorkerConfig, lead: Lead | None = None, speculation: Speculation | None = None
) -> tuple[EngineFigures, list[StepReport]]:
    """One run on a fresh worker, and its steps."""
    reports: list[StepReport] = []
    async with Engine(worker, speculation=speculation, lead=lead) as engine:
        loop = asyncio.create_task(engine.run(), name="loop")
        try:
            return await measure(workload, engine, reports), reports
        finally:
            loop.cancel()


async def measure(workload: Workload, engine: Engine, reports: list[StepReport]) -> EngineFigures:
    """One run on an engine that is running and has nothing else to do; ``reports``, an empty list, gets its steps."""
    outputs: dict[str, list[int]] = {str(item.id): [] for item in workload.requests}
    unfinished = set(outputs)
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
    waited_s = sum(report.waited_s for report in reports)
    return EngineFigures(
        output_tokens=tokens,
        prompt_tokens=sum(len(item.prompt_token_ids) for item in workload.requests),
        seconds=seconds,
        output_tokens_per_s=tokens / seconds,
        steps=len(reports),
        mean_running=sum(len(report.rows) for report in reports) / len(reports),
        mean_step_s=sum(report.seconds for report in reports) / len(reports),
        mean_gap_s=sum(report.gap_s for report in reports) / len(reports),
        mean_waited_s=waited_s / len(reports),
        waited_share=waited_s / sum(report.seconds for report in reports),
        late_tokens=reports[-1].late_tokens,
        preemptions=reports[-1].preemptions,
        token_ids=outputs,
    )


def _floor_ratio(worker: WorkerConfig, reports: list[StepReport]) -> float:
    steps = [(report.work.tokens, len(report.events)) for report in reports]
    times = asyncio.run(bare.time_bare(bare.Job(worker, steps)))
    return times.products_s / sum(report.seconds for report in reports)


def _traced(report: StepReport) -> TracedStep:
    """What the cost model of the simulator is fitted to."""
    return TracedStep(report.work, report.prefill_tokens, report.decode_tokens, report.seconds, report.gap_s)


@click.command()
@cli.workload_option
@cli.options
@click.option("--weights", default="auto", show_default=True, type=click.Choice(get_args(WeightsName)))
@click.option("--kv-dtype", default="auto", show_default=True, type=click.Choice(get_args(KVDtypeName)))
@click.option("--floor", is_flag=True, help="Time the bare matrix products of the same steps, too (CPU).")
@click.option("--trace", type=click.Path(path_type=Path, dir_okay=False), help="Write a JSON line for each step here.")
def main(
    file: Path,
    model: str,
    max_running: int,
    max_batch_tokens: int,
    as_json: bool,
    weights: WeightsName,
    kv_dtype: KVDtypeName,
    floor: bool,
    trace: Path | None,
) -> None:
    """Run a workload through the engine alone."""
    worker = msgspec.structs.replace(
        config(model, max_running, max_batch_tokens).worker(), weights=weights, kv_dtype=kv_dtype
    )
    figures, reports = asyncio.run(record(load(file), worker))
    if floor:
        figures = msgspec.structs.replace(figures, floor_ratio=_floor_ratio(worker, reports))
    if trace is not None:
        trace.write_bytes(msgspec.json.Encoder().encode_lines([_traced(report) for report in reports]))
    cli.show(figures, as_json, hidden=("token_ids",))


if __name__ == "__main__":
    main()
