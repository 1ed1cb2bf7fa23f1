"""Times the CPU attention kernel against the reference: `python -m benchmarks.attention [--json]`.

SmolLM2-135M's attention (9 query heads, 3 KV heads, 64 dims), as many layers as the model has, visited in turn as a
step does: one layer timed alone would find its cache in L3.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from workers.attention import AttentionBackend, Attributes, LayerShape, RaggedBatch
from workers.attention.cpu import CpuAttention
from workers.attention.reference import ReferenceAttention

SMOLLM2 = LayerShape(query_heads=9, kv_heads=3, key_dim=64, value_dim=64)
LAYERS = 30
BLOCK_SIZE = 16
ATTRIBUTES = Attributes(scaling=SMOLLM2.key_dim**-0.5)
REFERENCE_STEPS = 3


@dataclass(frozen=True, slots=True)
class Workload:
    """`rows` rows of `query_len` new tokens each, at the end of `context_len` tokens."""

    name: str
    rows: int
    query_len: int
    context_len: int


WORKLOADS = (
    Workload("decode", 1, 1, 200),
    Workload("decode", 16, 1, 200),
    Workload("decode", 64, 1, 200),
    Workload("decode", 1, 1, 4096),
    Workload("prefill", 1, 256, 256),
    Workload("prefill", 1, 256, 2048),
)


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per layer; `half` is the kernel with keys and values in float16.

    `cache_gb_per_s` and `gflop_per_s` are the kernel's in float32, over its median step.
    """

    workload: Workload
    threads: int
    cpu_best_ms: float
    cpu_median_ms: float
    half_median_ms: float
    reference_median_ms: float
    cache_gb_per_s: float
    gflop_per_s: float


def random_batch(workload: Workload, block_size: int = BLOCK_SIZE) -> RaggedBatch:
    blocks = -(-workload.context_len // block_size)
    table = torch.randperm(workload.rows * blocks, dtype=torch.int32).view(workload.rows, blocks)
    positions = torch.arange(workload.context_len - workload.query_len, workload.context_len)
    slots = table[:, positions // block_size].long() * block_size + positions % block_size
    return RaggedBatch(
        query_start=torch.arange(workload.rows + 1, dtype=torch.int32) * workload.query_len,
        context_len=torch.full((workload.rows,), workload.context_len, dtype=torch.int32),
        block_table=table,
        cache_slots=slots.flatten(),
        max_query_len=workload.query_len,
        max_context_len=workload.context_len,
    )


def step_times(
    backend: type[AttentionBackend],
    batch: RaggedBatch,
    steps: int,
    block_size: int = BLOCK_SIZE,
    kv_dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Milliseconds per layer of each step, sorted, over a cache whose whole contexts have been written."""
    num_blocks = batch.block_table.numel()
    attention = backend([SMOLLM2] * LAYERS, num_blocks, block_size, torch.float32, torch.device("cpu"), kv_dtype)
    fill = replace(
        batch,
        query_start=torch.arange(num_blocks + 1, dtype=torch.int32) * block_size,
        context_len=torch.full((num_blocks,), block_size, dtype=torch.int32),
        block_table=torch.arange(num_blocks, dtype=torch.int32)[:, None],
        cache_slots=torch.arange(num_blocks * block_size),
    )

    def step(of: RaggedBatch) -> float:
        query, key, value = (
            torch.randn(len(of.cache_slots), heads, dim)
            for heads, dim in (
                (SMOLLM2.query_heads, SMOLLM2.key_dim),
                (SMOLLM2.kv_heads, SMOLLM2.key_dim),
                (SMOLLM2.kv_heads, SMOLLM2.value_dim),
            )
        )
        start = time.perf_counter()
        for layer in range(LAYERS):
            attention.attend(layer, query, key, value, of, ATTRIBUTES)
        return (time.perf_counter() - start) * 1e3 / LAYERS

    step(fill)
    step(batch)
    return sorted(step(batch) for _ in range(steps))


def measure(workload: Workload, steps: int) -> Timing:
    batch = random_batch(workload)
    cpu = step_times(CpuAttention, batch, steps)
    half = step_times(CpuAttention, batch, steps, kv_dtype=torch.float16)
    reference = step_times(ReferenceAttention, batch, REFERENCE_STEPS)
    dims = SMOLLM2.key_dim + SMOLLM2.value_dim
    cache_bytes = workload.rows * workload.context_len * SMOLLM2.kv_heads * dims * torch.float32.itemsize
    seen = sum(range(workload.context_len - workload.query_len + 1, workload.context_len + 1))
    flop = 2 * workload.rows * seen * SMOLLM2.query_heads * dims
    median = statistics.median(cpu)
    return Timing(
        workload=workload,
        threads=torch.get_num_threads(),
        cpu_best_ms=cpu[0],
        cpu_median_ms=median,
        half_median_ms=statistics.median(half),
        reference_median_ms=statistics.median(reference),
        cache_gb_per_s=cache_bytes / median / 1e6,
        gflop_per_s=flop / median / 1e6,
    )


def table(timings: Sequence[Timing]) -> Table:
    shown = Table(title=f"Paged attention, ms per layer, {timings[0].threads} threads", box=box.SIMPLE)
    for column in ("load", "rows", "query", "context", "best", "median", "float16", "torch", "GB/s", "GFLOP/s"):
        shown.add_column(column, justify="left" if column == "load" else "right")
    for timing in timings:
        load = timing.workload
        shown.add_row(
            load.name,
            *(str(count) for count in (load.rows, load.query_len, load.context_len)),
            *(
                f"{ms:.3f}"
                for ms in (timing.cpu_best_ms, timing.cpu_median_ms, timing.half_median_ms, timing.reference_median_ms)
            ),
            *(f"{rate:.1f}" for rate in (timing.cache_gb_per_s, timing.gflop_per_s)),
        )
    return shown


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a table.")
@click.option("--steps", default=20, show_default=True, help="Timed steps of the kernel per workload.")
def main(as_json: bool, steps: int) -> None:
    """Time the CPU attention kernel against the reference on SmolLM2-135M's shapes."""
    timings = [measure(workload, steps) for workload in WORKLOADS]
    if as_json:
        print(json.dumps([asdict(timing) for timing in timings], indent=2))
    else:
        Console().print(table(timings))


if __name__ == "__main__":
    main()
