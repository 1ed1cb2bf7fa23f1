"""Decodes beside what the hardware allows: the bare matrix products of a full batch, and reading the weights once for one."""

import asyncio
import statistics
from typing import get_args

import click
import msgspec

from benchmarks import bare, cli, engine
from benchmarks.bare import Bare
from benchmarks.workload import config, mixed
from protocol.plan import KVDtypeName, WeightsName, WorkerConfig


class BatchFloor(msgspec.Struct, frozen=True):
    """Of the steps in which ``batch`` sequences decode and nothing else happens, in the worker's own time; medians of rounds.
    ``kv_dtype``: the setting of their keys and values.

    ``floor_ratio``: the share of a step that its bare matrix products take. ``bandwidth_ratio``: the share that reading
    the weights once takes.
    """

    batch: int
    kv_dtype: KVDtypeName
    steps: int
    step_s: float
    floor_ratio: float
    bandwidth_ratio: float


class FloorFigures(msgspec.Struct, frozen=True):
    """``weight_bytes``: what a step reads of weights at least. ``read_bytes_per_s``: how fast as many threads read memory."""

    rounds: int
    weights: WeightsName
    weight_bytes: int
    read_bytes_per_s: float
    batches: list[BatchFloor]


class Round(msgspec.Struct, frozen=True):
    """Those steps of one run, ``seconds`` of the worker's time together, and their bare products."""

    steps: int
    seconds: float
    bare: Bare

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps


def measure(worker: WorkerConfig, batch: int, prompt_tokens: int, output_tokens: int, vocab: int) -> Round:
    """One run of ``batch`` requests on a fresh worker. Raises ValueError when no step was decodes of them all."""
    workload = mixed(
        batch, prompt=(prompt_tokens, prompt_tokens), output=(output_tokens, output_tokens), seed=1, vocab=vocab
    )
    _, reports = asyncio.run(engine.record(workload, worker))
    decodes = [report for report in reports if report.decode_tokens == batch and report.prefill_tokens == 0]
    if not decodes:
        raise ValueError(f"in no step {batch} sequences decoded and nothing else happened; longer outputs are needed")
    times = asyncio.run(bare.time_bare(bare.Job(worker, [(batch, batch)] * len(decodes))))
    return Round(len(decodes), sum(report.seconds for report in decodes), times)


def summary(batch: int, kv_dtype: KVDtypeName, rounds: list[Round]) -> BatchFloor:
    """Of at least one round."""
    return BatchFloor(
        batch=batch,
        kv_dtype=kv_dtype,
        steps=sum(each.steps for each in rounds),
        step_s=statistics.median(each.step_s for each in rounds),
        floor_ratio=statistics.median(each.bare.products_s / each.seconds for each in rounds),
        bandwidth_ratio=statistics.median(each.bare.read_s / each.step_s for each in rounds),
    )


@click.command()
@cli.options
@click.option("--weights", default="auto", show_default=True, type=click.Choice(get_args(WeightsName)))
@click.option("--prompt-tokens", default=128, show_default=True)
@click.option("--output-tokens", default=96, show_default=True)
@click.option("--vocab", default=49152, show_default=True, help="Prompts are drawn from token ids below this.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
def main(
    model: str,
    max_running: int,
    max_batch_tokens: int,
    as_json: bool,
    weights: WeightsName,
    prompt_tokens: int,
    output_tokens: int,
    vocab: int,
    rounds: int,
) -> None:
    """Decode one sequence, and --max-running of them, beside the bare products and the memory's bandwidth (CPU), with keys and
    values held in either way."""
    worker = msgspec.structs.replace(config(model, max_running, max_batch_tokens).worker(), weights=weights)
    kinds: tuple[KVDtypeName, ...] = get_args(KVDtypeName)
    runs: dict[tuple[int, KVDtypeName], list[Round]] = {
        (batch, kind): [] for batch in (1, max_running) for kind in kinds
    }
    for _ in range(rounds):
        for (batch, kind), done in runs.items():
            holding = msgspec.structs.replace(worker, kv_dtype=kind)
            done.append(measure(holding, batch, prompt_tokens, output_tokens, vocab))
    times = [each.bare for done in runs.values() for each in done]
    figures = FloorFigures(
        rounds=rounds,
        weights=weights,
        weight_bytes=times[0].weight_bytes,
        read_bytes_per_s=statistics.median(each.read_bytes_per_s for each in times),
        batches=[summary(batch, kind, done) for (batch, kind), done in runs.items()],
    )
    cli.show(figures, as_json)


if __name__ == "__main__":
    main()
