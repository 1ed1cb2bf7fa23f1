"""The engine without MQTT: batcher, loop and worker process on a workload file."""

import asyncio
import time
from pathlib import Path

import click
import msgspec

from benchmarks import cli
from benchmarks.workload import Workload, config, load, sequence
from protocol.plan import WorkerConfig
from scheduler.lead import Lead
from scheduler.loop import Engine, StepReport


class EngineFigures(msgspec.Struct, frozen=True):
    """``seconds`` runs from the first submission to the last token. ``mean_gap_s``: an iteration's time beside the worker's;
    ``mean_waited_s``: how long the worker waited for a step, ``waited_share`` by how long steps took."""

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


async def run(workload: Workload, worker: WorkerConfig, lead: Lead | None = None) -> EngineFigures:
    """One run on a fresh worker."""
    async with Engine(worker, lead=lead) as engine:
        loop = asyncio.create_task(engine.run(), name="loop")
        try:
            return await _measure(workload, engine)
        finally:
            loop.cancel()


async def _measure(workload: Workload, engine: Engine) -> EngineFigures:
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


@click.command()
@cli.workload_option
@cli.options
def main(file: Path, model: str, max_running: int, max_batch_tokens: int, as_json: bool) -> None:
    """Run a workload through the engine alone."""
    figures = asyncio.run(run(load(file), config(model, max_running, max_batch_tokens).worker()))
    cli.show(figures, as_json, hidden=("token_ids",))


if __name__ == "__main__":
    main()
