"""A GPU: decodes beside what its memory's bandwidth allows, and many requests at once, beside transformers' continuous batching.

The model has Qwen3-0.6B's shape and random weights, so nothing is fetched; the requests are those of nano-vllm's benchmark.
"""

import asyncio
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from benchmarks import cli, engine
from benchmarks.peers.foreign import Foreign
from benchmarks.peers.job import Item, Job
from benchmarks.workload import Workload, config, mixed
from protocol.plan import ExecutionName, WorkerConfig
from scheduler.loop import Engine, StepReport

#: Of the model, by the names of transformers' configuration.
SHAPE: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
#: Tokens of a request's prompt, and of its output, shortest and longest.
LENGTHS = (100, 1024)
#: Of requests that decode side by side.
PROMPT, OUTPUT = 512, 128

_COPIED_BYTES = 1 << 31
_COPIES = 20


class DecodeFigures(msgspec.Struct, frozen=True):
    """Of the steps in which ``batch`` sequences decode and nothing else happens; medians.

    ``step_s`` is the worker's own time, ``iteration_s`` all of it. ``floor_ratio``: the share of an iteration that it takes to
    read the weights and the KV of every sequence once.
    """

    batch: int
    steps: int
    step_s: float
    iteration_s: float
    floor_ratio: float

    @property
    def output_tokens_per_s(self) -> float:
        return self.batch / self.iteration_s


class RunFigures(msgspec.Struct, frozen=True):
    """All requests at once."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    output_tokens_per_s: float


class ExecutionFigures(msgspec.Struct, frozen=True):
    """One way to run steps. ``start_s``: until the worker was ready."""

    execution: ExecutionName
    start_s: float
    decodes: list[DecodeFigures]
    all: RunFigures
    some: RunFigures


class GpuFigures(msgspec.Struct, frozen=True):
    """``copy_bytes_per_s``: read and written, by a copy on the device. ``peer`` ran the requests of each execution's ``some``."""

    device: str
    versions: dict[str, str]
    weight_bytes: int
    kv_bytes_per_token: int
    copy_bytes_per_s: float
    executions: list[ExecutionFigures]
    peer: RunFigures | None


def make_model(folder: Path, shape: dict[str, Any], device: str) -> int:
    """Save one of random bfloat16 weights; how many bytes they are."""
    import torch  # noqa: PLC0415 - only where the benchmark is run
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **shape), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def copy_bytes_per_s(device: str) -> float:
    """The best of some copies, counting what is read and what is written."""
    import torch  # noqa: PLC0415

    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(_COPIES):
        torch.accelerator.synchronize()
        begun = time.perf_counter()
        target.copy_(source)
        torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - begun)
    return 2 * _COPIED_BYTES / min(seconds)


async def measure(
    worker: WorkerConfig, batches: list[int], all: Workload, some: Workload, weight_bytes: int, bytes_per_s: float
) -> tuple[ExecutionFigures, int]:
    """One worker through all of it; and how many bytes of KV a token has."""
    begun = time.perf_counter()
    async with Engine(worker) as running:
        start_s = time.perf_counter() - begun
        loop = asyncio.create_task(running.run(), name="loop")
        try:
            kv_bytes = running.info.kv_bytes_per_block // running.info.block_size
            decodes = []
            for batch in batches:
                reports = await _decode(running, batch)
                floors = [(weight_bytes + report.work.context * kv_bytes) / bytes_per_s for report in reports]
                decodes.append(_decode_figures(batch, reports, floors))
            figures = ExecutionFigures(
                worker.execution, start_s, decodes, all=await _run(running, all), some=await _run(running, some)
            )
            return figures, kv_bytes
        finally:
            loop.cancel()


async def _decode(running: Engine, batch: int) -> list[StepReport]:
    """The steps of decodes alone. Raises ValueError when there were none."""
    reports: list[StepReport] = []
    lengths = {"prompt": (PROMPT, PROMPT), "output": (OUTPUT, OUTPUT)}
    await engine.measure(mixed(batch, **lengths, seed=batch, vocab=running.info.vocab_size), running, reports)
    alone = [report for report in reports if report.decode_tokens == batch and report.prefill_tokens == 0]
    if not alone:
        raise ValueError(f"in no step {batch} sequences decoded and nothing else happened")
    return alone


def _decode_figures(batch: int, reports: list[StepReport], floors: list[float]) -> DecodeFigures:
    iterations = [report.seconds + report.gap_s for report in reports]
    return DecodeFigures(
        batch=batch,
        steps=len(reports),
        step_s=statistics.median(report.seconds for report in reports),
        iteration_s=statistics.median(iterations),
        floor_ratio=statistics.median(floor / took for floor, took in zip(floors, iterations, strict=True)),
    )


async def _run(running: Engine, workload: Workload) -> RunFigures:
    figures = await engine.measure(workload, running, [])
    return _figures(workload, figures.seconds)


def _figures(workload: Workload, seconds: float) -> RunFigures:
    prompts = sum(len(item.prompt_token_ids) for item in workload.requests)
    tokens = workload.output_tokens
    return RunFigures(len(workload.requests), prompts, tokens, seconds, tokens / seconds)


def run_peer(model: str, workload: Workload, device: str) -> RunFigures:
    """transformers' continuous batching. Raises PeerFailed."""
    items = [Item(item.id, item.prompt_token_ids, item.max_tokens) for item in workload.requests]
    warmup = [Item(-1 - item.id, item.prompt_token_ids, 4) for item in items[:8]]
    options = {"dtype": "bfloat16", "device": device}
    job = Job(model, threads=8, max_running=len(items), items=items, warmup=warmup)
    return _figures(workload, Foreign("transformers_cb", options=options).run(job).seconds)


@click.command()
@click.option("--execution", "executions", multiple=True, type=click.Choice(get_args(ExecutionName)[1:]))
@click.option("--batch", "batches", multiple=True, type=int, default=(1, 32, 256), show_default=True)
@click.option("--requests", default=256, show_default=True)
@click.option("--peer-requests", default=64, show_default=True, help="Of these, run by transformers, too; 0: none.")
@click.option("--kv-memory-mb", default=40_000, show_default=True)
@click.option("--max-batch-tokens", default=8192, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    executions: tuple[ExecutionName, ...],
    batches: tuple[int, ...],
    requests: int,
    peer_requests: int,
    kv_memory_mb: int,
    max_batch_tokens: int,
    as_json: bool,
) -> None:
    """Decodes at some batch sizes, then many requests at once, each way to run steps; then transformers (CUDA)."""
    import torch  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        weight_bytes = make_model(Path(folder), SHAPE, "cuda")
        bytes_per_s = copy_bytes_per_s("cuda")
        torch.cuda.empty_cache()
        every, some = (
            mixed(count, prompt=LENGTHS, output=LENGTHS, seed=count, vocab=SHAPE["vocab_size"])
            for count in (requests, peer_requests or 1)
        )
        sizes = config(folder, max(*batches, requests), max_batch_tokens).worker()
        done = []
        for execution in executions or get_args(ExecutionName)[1:]:
            worker = msgspec.structs.replace(sizes, kv_memory_mb=kv_memory_mb, execution=execution)
            one, kv_bytes = asyncio.run(measure(worker, list(batches), every, some, weight_bytes, bytes_per_s))
            done.append(one)
            click.echo(one, err=True)
        peer = run_peer(folder, some, "cuda") if peer_requests else None
    figures = GpuFigures(
        device=torch.cuda.get_device_name(),
        versions={name: version(name) for name in ("torch", "transformers")},
        weight_bytes=weight_bytes,
        kv_bytes_per_token=kv_bytes,
        copy_bytes_per_s=bytes_per_s,
        executions=done,
        peer=peer,
    )
    cli.show(figures, as_json)


if __name__ == "__main__":
    main()
