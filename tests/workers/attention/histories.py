"""Random ragged histories: what several sequences attend to, grown step by step through a paged cache."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from workers.attention.base import AttentionBackend, Attributes, LayerShape, RaggedBatch
from workers.attention.cpu import CpuAttention
from workers.attention.cuda import CudaAttention
from workers.attention.reference import ReferenceAttention

CPU = torch.device("cpu")


@dataclass(frozen=True)
class History:
    """`chunks[step][row]` new tokens of each row at each step; a row may sit a step out with 0."""

    shape: LayerShape
    block_size: int
    chunks: list[list[int]]
    attributes: Attributes
    seed: int

    @property
    def lengths(self) -> list[int]:
        return [sum(row) for row in zip(*self.chunks, strict=True)]

    @property
    def num_blocks(self) -> int:
        # Some blocks belong to no row.
        return sum(math.ceil(length / self.block_size) for length in self.lengths) + 3


@dataclass
class Sequences:
    """Each row's whole query, key and value, [length, heads, dim], and the block table it is written through."""

    history: History
    query: list[Tensor] = field(init=False)
    key: list[Tensor] = field(init=False)
    value: list[Tensor] = field(init=False)
    table: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        shape, random = self.history.shape, torch.Generator().manual_seed(self.history.seed)

        def rows(heads: int, dim: int) -> list[Tensor]:
            return [torch.randn(length, heads, dim, generator=random) for length in self.history.lengths]

        self.query = rows(shape.query_heads, shape.key_dim)
        self.key = rows(shape.kv_heads, shape.key_dim)
        self.value = rows(shape.kv_heads, shape.value_dim)
        blocks = torch.randperm(self.history.num_blocks, generator=random, dtype=torch.int32)
        counts = [math.ceil(length / self.history.block_size) for length in self.history.lengths]
        self.table = list(blocks[: sum(counts)].split(counts))

    def batch(self, starts: list[int], ends: list[int], rows: list[int], device: torch.device = CPU) -> RaggedBatch:
        """The batch that computes positions starts[row] to ends[row] of each of `rows`."""
        size = self.history.block_size
        lengths = [ends[row] - starts[row] for row in rows]
        table = torch.zeros(len(rows), max(len(self.table[row]) for row in rows), dtype=torch.int32)
        slots = []
        for i, row in enumerate(rows):
            valid = math.ceil(ends[row] / size)
            table[i, :valid] = self.table[row][:valid]
            positions = torch.arange(starts[row], ends[row])
            slots.append(self.table[row][positions // size].long() * size + positions % size)
        return RaggedBatch(
            query_start=torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32),
            context_len=torch.tensor([ends[row] for row in rows], dtype=torch.int32, device=device),
            block_table=table.to(device),
            cache_slots=torch.cat(slots).to(device),
            max_query_len=max(lengths),
            max_context_len=max(ends[row] for row in rows),
        )

    def attend(self, backend: AttentionBackend, starts: list[int], ends: list[int], rows: list[int]) -> list[Tensor]:
        """One step through layer 0; the outputs of each of `rows`."""
        batch = self.batch(starts, ends, rows, backend.device)
        query, key, value = (
            torch.cat([whole[row][starts[row] : ends[row]] for row in rows]).to(backend.device, backend.dtype)
            for whole in (self.query, self.key, self.value)
        )
        output = backend.attend(0, query, key, value, batch, self.history.attributes)
        return list(output.split([ends[row] - starts[row] for row in rows]))

    def move(self, backend: AttentionBackend) -> None:
        """Copy every row's blocks, each to where the next one was, the last to one that belongs to no row."""
        sources = torch.cat(self.table)
        spare = next(block for block in range(self.history.num_blocks) if block not in sources)
        targets = torch.cat([sources[1:], torch.tensor([spare], dtype=torch.int32)])
        backend.copy(*(blocks.long().to(backend.device) for blocks in (sources, targets)))
        self.table = list(targets.split([len(table) for table in self.table]))

    def replay(self, backend: AttentionBackend, *, moving: bool = False) -> list[Tensor]:
        """The whole history, step by step; each row's output, [length, query_heads, value_dim]. ``moving``: to other blocks
        between the steps."""
        rows = len(self.history.lengths)
        outputs: list[list[Tensor]] = [[] for _ in range(rows)]
        starts = [0] * rows
        for step in self.history.chunks:
            ends = [start + length for start, length in zip(starts, step, strict=True)]
            present = [row for row in range(rows) if step[row]]
            for row, output in zip(present, self.attend(backend, starts, ends, present), strict=True):
                outputs[row].append(output)
            starts = ends
            if moving:
                self.move(backend)
        return [torch.cat(output) for output in outputs]


def cache_tensors(backend: AttentionBackend) -> list[Tensor]:
    """Everything a backend keeps between steps; dimension 0 is the block."""
    if isinstance(backend, CpuAttention):
        return backend.cache
    assert isinstance(backend, (ReferenceAttention, CudaAttention))
    return [*backend.cache.keys, *backend.cache.values]


def fresh(backend: type[AttentionBackend], history: History, kv_dtype: torch.dtype = torch.float32) -> AttentionBackend:
    """A float32 CPU backend whose whole cache is NaN, so that a slot read before it is written shows."""
    made = backend([history.shape], history.num_blocks, history.block_size, torch.float32, CPU, kv_dtype)
    for tensor in cache_tensors(made):
        tensor.fill_(torch.nan)
    return made


@st.composite
def shapes(draw: st.DrawFn) -> LayerShape:
    kv_heads = draw(st.integers(1, 3))
    dims = st.sampled_from([8, 16, 24, 40, 64])
    group = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 50]))
    return LayerShape(kv_heads * group, kv_heads, draw(dims), draw(dims))


@st.composite
def histories(draw: st.DrawFn) -> History:
    shape = draw(shapes())
    rows = draw(st.integers(1, 5))
    lengths = st.one_of(st.just(1), st.integers(0, 5), st.integers(0, 90))
    first = draw(st.lists(st.integers(1, 90), min_size=rows, max_size=rows))
    later = draw(st.lists(st.lists(lengths, min_size=rows, max_size=rows).filter(any), max_size=4))
    seed = draw(st.integers(0, 2**31))
    sinks = torch.randn(shape.query_heads, generator=torch.Generator().manual_seed(seed)) * 3
    attributes = Attributes(
        scaling=draw(st.floats(0.25, 2.0)) * shape.key_dim**-0.5,
        sliding_window=draw(st.none() | st.integers(1, 100)),
        softcap=draw(st.none() | st.floats(1.0, 60.0)),
        sinks=draw(st.sampled_from([None, sinks])),
    )
    return History(shape, draw(st.sampled_from([8, 16, 24, 32, 64, 128])), [first, *later], attributes, seed)
