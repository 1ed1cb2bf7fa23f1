"""Steps of nothing but decodes on CUDA, recorded once and replayed: launching their kernels one by one takes longer than running
them.

A graph's shapes are fixed, so there is one for each of some batch sizes, and a batch takes the next larger one. The rows that
fill it up are the spare slot's, whose one block is nobody's. All of a graph's inputs follow, on the device, from which slots
decode and at which positions: that is all that a step sends.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from protocol.plan import StepPlan
from workers.attention import AttentionBackend, RaggedBatch
from workers.forward import forward
from workers.slots import Drawn, Inputs, Slots, Spans


def ladder(most: int) -> list[int]:
    """Batch sizes up to ``most``, at most half as much again from one to the next."""
    steps = {step for power in range(most.bit_length()) for step in (1 << power, 3 << power)}
    return sorted({most, *(step for step in steps if step < most)})


def decodes_alone(plan: StepPlan) -> bool:
    """Whether every slot of a plan computes one token and samples the next, as decodes do."""
    return not plan.verifications and all(row.length == 1 and row.sample for row in plan.rows)


@dataclass(frozen=True, slots=True)
class _Graph:
    """``rows``: int64 ``[2, size]``, the slots and their positions; ``logits`` ``[size, V]`` are those of the last replay."""

    graph: torch.cuda.CUDAGraph
    rows: Tensor
    inputs: Inputs
    logits: Tensor


class DecodeGraphs:
    """A graph for each size of the `ladder`, for as many slots as there are.

    The last block of ``backend`` must be nobody's. Raises RuntimeError for a model whose pass can't be captured.
    """

    @torch.inference_mode()
    def __init__(self, module: PreTrainedModel, backend: AttentionBackend, slots: Slots) -> None:
        self._module, self._backend, self._slots = module, backend, slots
        slots.tables[slots.spare] = backend.num_blocks
        self._sizes = ladder(slots.spare)
        # They never run at once, so they may share what memory they need; the largest needs most.
        pool = torch.cuda.graph_pool_handle()
        self._graphs = {size: self._capture(size, pool) for size in reversed(self._sizes)}

    def replay(self, spans: Spans) -> tuple[Tensor, Drawn]:
        """One token of each slot: logits ``[n, V]``, good until the next replay, of each of the tokens."""
        count = len(spans.slots)
        size = self._sizes[bisect_left(self._sizes, count)]
        rows = np.zeros((2, size), dtype=np.int64)
        rows[0] = self._slots.spare
        rows[:, :count] = spans.slots, spans.starts
        graph = self._graphs[size]
        graph.rows.copy_(torch.from_numpy(rows).pin_memory(), non_blocking=True)
        graph.graph.replay()
        ids, slots, positions = (
            tensor[:count] for tensor in (graph.inputs.ids, graph.inputs.slots, graph.inputs.positions)
        )
        return graph.logits[:count], Drawn(ids, slots, positions, int(spans.starts.max()) + 1)

    def _capture(self, size: int, pool: tuple[int, int]) -> _Graph:
        device = self._backend.device
        rows = torch.zeros(2, size, dtype=torch.int64, device=device)
        rows[0] = self._slots.spare
        start = torch.arange(size + 1, dtype=torch.int32, device=device)
        # Whatever is compiled or allocated at a first run must not be captured.
        forward(self._module, self._backend, self._inputs(rows, start))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            inputs = self._inputs(rows, start)
            logits = forward(self._module, self._backend, inputs)
        return _Graph(graph, rows, inputs, logits)

    def _inputs(self, rows: Tensor, query_start: Tensor) -> Inputs:
        slots, positions = rows
        size = self._slots.block_size
        tables = self._slots.tables[slots]
        blocks = tables.gather(1, (positions // size)[:, None])[:, 0].long()
        batch = RaggedBatch(
            query_start=query_start,
            context_len=(positions + 1).int(),
            block_table=tables,
            cache_slots=blocks * size + positions % size,
            max_query_len=1,
            max_context_len=self._slots.max_len,
        )
        return Inputs(self._slots.tokens[slots, positions].long(), slots, positions, batch, query_start[:-1])
