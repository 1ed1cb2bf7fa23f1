"""Steps of nothing but decodes on CUDA, recorded once and replayed: launching their kernels one by one takes longer than running
them.

A graph's shapes are fixed, so there is one for each of some batch sizes, and a batch takes the next larger one. The rows that
fill it up are the spare slot's, whose one block is nobody's. All of a graph's inputs follow, on the device, from which slots
decode and at which positions: that is all that a step sends.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from protocol.plan import StepPlan
from workers.attention import AttentionBackend, RaggedBatch
from workers.forward import forward
from workers.slots import Drawn, Inputs, Slots, Spans
from workers.transfer import send


def ladder(most: int) -> list[int]:
    """Batch sizes up to ``most``, at most half as much again from one to the next."""
    steps = {step for power in range(most.bit_length()) for step in (1 << power, 3 << power)}
    return sorted({most, *(step for step in steps if step < most)})


def decodes_alone(plan: StepPlan) -> bool:
    """Whether every slot of a plan computes one token and samples the next, as decodes do."""
    return not plan.verifications and all(row.length == 1 and row.sample for row in plan.rows)


def decode_inputs(slots: Slots, rows: Tensor, query_start: Tensor) -> Inputs:
    """Of one token in each row, found on the device. ``rows``: int64 ``[2, n]``, slots and positions; ``query_start``: int32
    ``[n + 1]``."""
    index, positions = rows
    size = slots.block_size
    tables = slots.tables[index]
    blocks = tables.gather(1, (positions // size)[:, None])[:, 0].long()
    batch = RaggedBatch(
        query_start=query_start,
        context_len=(positions + 1).int(),
        block_table=tables,
        cache_slots=blocks * size + positions % size,
        max_query_len=1,
        max_context_len=slots.max_len,
    )
    return Inputs(slots.tokens[index, positions].long(), index, positions, batch, None)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A pass over ``rows``, int64 ``[2, size]``: each replay computes ``inputs`` and ``logits``, ``[size, V]``, anew."""

    replay: Callable[[], None]
    rows: Tensor
    inputs: Inputs
    logits: Tensor


class DecodeGraphs:
    """A graph for each size of the `ladder`, for as many slots as there are.

    Raises RuntimeError for a model or an attention backend whose pass can't be captured.
    """

    @torch.inference_mode()
    def __init__(self, module: PreTrainedModel, backend: AttentionBackend, slots: Slots) -> None:
        if not backend.capturable:
            raise RuntimeError(f"steps with attention backend {backend.name!r} can't be captured")
        self._module, self._backend, self._slots = module, backend, slots
        slots.tables[slots.spare] = backend.num_blocks
        self._sizes = ladder(slots.spare)
        # Graphs never run at once, so they may share what memory they need; the largest needs most.
        self._pool: Any = None
        self._graphs = {size: self._record(*self._rows(size)) for size in reversed(self._sizes)}

    def replay(self, spans: Spans) -> tuple[Tensor, Drawn]:
        """One token of each slot: logits ``[n, V]``, good until the next replay, of each of the tokens."""
        count = len(spans.slots)
        size = self._sizes[bisect_left(self._sizes, count)]
        rows = np.zeros((2, size), dtype=np.int64)
        rows[0] = self._slots.spare
        rows[:, :count] = spans.slots, spans.starts
        recorded = self._graphs[size]
        (sent,) = send([rows], self._backend.device)
        recorded.rows.copy_(sent)
        recorded.replay()
        inputs = recorded.inputs
        ids, slots, positions = (tensor[:count] for tensor in (inputs.ids, inputs.slots, inputs.positions))
        return recorded.logits[:count], Drawn(ids, slots, positions, int(spans.starts.max()) + 1)

    def compute(self, rows: Tensor, query_start: Tensor) -> tuple[Inputs, Tensor]:
        """What is recorded."""
        inputs = decode_inputs(self._slots, rows, query_start)
        return inputs, forward(self._module, self._backend, inputs)

    def _rows(self, size: int) -> tuple[Tensor, Tensor]:
        """So many of the spare slot's."""
        rows = torch.zeros(2, size, dtype=torch.int64, device=self._backend.device)
        rows[0] = self._slots.spare
        return rows, torch.arange(size + 1, dtype=torch.int32, device=rows.device)

    def _record(self, rows: Tensor, query_start: Tensor) -> Recorded:
        # Whatever is compiled or allocated at a first run must not be captured.
        self.compute(rows, query_start)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            inputs, logits = self.compute(rows, query_start)
        self._pool = graph.pool()
        return Recorded(graph.replay, rows, inputs, logits)
