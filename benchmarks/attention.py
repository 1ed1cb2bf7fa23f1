"""Times the CPU attention kernel against the reference: `python -m benchmarks.attention [--json]`.

SmolLM2-135M's attention (9 query heads, 3 KV heads, 64 dims), as many layers as the model has, visited in turn as a
step does: one layer timed alone would find its cache in L3.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import click
import torch
from rich.console import Console
from rich.table import Table

from workers.attention import Attributes, LayerShape, RaggedBatch
from workers.attention.cpu import CpuAttention
from workers.attention.reference import ReferenceAttention

SMOLLM2 = LayerShape(query_heads=9, kv_heads=3, key_dim=64, value_dim=64)
LAYERS = 30
BLOCK_SIZE = 16
ATTRIBUTES = Attributes(scaling=SMOLLM2.key_dim**-0.5)
WARM_UP_STEPS = 3


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
    """Milliseconds per layer, the fastest step's and the median step's; the reference's fastest beside them."""

    workload: Workload
    threads: int
    cpu_ms: float
    cpu_median_ms: float
    reference_ms: float
    cache_gb_per_s: float
    gflop_per_s: float


def random_batch(workload: Workload) -> RaggedBatch:
    blocks = -(-workload.context_len // BLOCK_SIZE)
    table = torch.randperm(workload.rows * blocks, dtype=torch.int32).view(workload.rows, blocks)
    positions = torch.arange(workload.context_len - workload.query_len, workload.context_len)
    slots = table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
    return RaggedBatch(
        query_start=torch.arange(workload.rows + 1, dtype=torch.int32) * workload.query_len,
        context_len=torch.full((workload.rows,), workload.context_len, dtype=torch.int32),
        block_table=table,
        cache_slots=slots.flatten(),
        max_query_len=workload.query_len,
        max_context_len=workload.context_len,
    )


def step_times(step: Callable[[], None], steps: int) -> list[float]:
    """Milliseconds per layer of each step, sorted."""
    for _ in range(WARM_UP_STEPS):
        step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3 / LAYERS)
    return sorted(times)


def measure(workload: Workload, steps: int) -> Timing:
    batch = random_batch(workload)
    tokens = len(batch.cache_slots)
    query = torch.randn(tokens, SMOLLM2.query_heads, SMOLLM2.key_dim)
    key = torch.randn(tokens, SMOLLM2.kv_heads, SMOLLM2.key_dim)
    value = torch.randn(tokens, SMOLLM2.kv_heads, SMOLLM2.value_dim)
    times = {}
    for backend in (CpuAttention, ReferenceAttention):
        shape = ([SMOLLM2] * LAYERS, batch.block_table.numel(), BLOCK_SIZE, torch.float32, torch.device("cpu"))
        attention = backend(*shape)
        for cache in (attention.keys, attention.values) if backend is CpuAttention else (
            attention.cache.keys, attention.cache.values
        ):
            for tensor in cache:
                tensor.normal_()

        def step(attention: CpuAttention | ReferenceAttention = attention) -> None:
            for layer in range(LAYERS):
                attention.attend(layer, query, key, value, batch, ATTRIBUTES)

        times[backend] = step_times(step, steps if backend is CpuAttention else 2)
    cpu = times[CpuAttention]
    read = workload.rows * workload.context_len * AttentionBytes
    return Timing(workload, torch.get_num_threads(), cpu[0], cpu[len(cpu) // 2], times[ReferenceAttention][0], read, 0)
