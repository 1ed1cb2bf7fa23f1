"""What the worker keeps of each running sequence between steps: block table, last sampled token, sampling parameters."""

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from protocol.plan import Admission, Row
from workers.attention import RaggedBatch


class Slots:
    """One row per slot; changed only by what a plan sends, so a step costs what it schedules."""

    def __init__(self, slots: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = np.zeros((slots, max_blocks), dtype=np.int32)
        self._num_blocks = [0] * slots
        self.last_token = torch.zeros(slots, dtype=torch.int64, device=device)

    def admit(self, admission: Admission) -> None:
        self._num_blocks[admission.slot] = 0

    def extend(self, row: Row) -> None:
        """Append the row's new blocks to its slot's table."""
        start = self._num_blocks[row.slot]
        self._tables[row.slot, start : start + len(row.new_blocks)] = row.new_blocks
        self._num_blocks[row.slot] = start + len(row.new_blocks)

    def batch(self, rows: list[Row]) -> tuple[Tensor, RaggedBatch]:
        """Positions int64 ``[T]`` of a step's tokens, and the batch its attention runs on."""
        lengths = np.fromiter((row.length for row in rows), np.int64, len(rows))
        starts = np.fromiter((row.start for row in rows), np.int64, len(rows))
        query_start = np.fromiter(accumulate(lengths, initial=0), np.int32, len(rows) + 1)
        owner = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(query_start[-1]) - query_start[owner] + starts[owner]
        context = (starts + lengths).astype(np.int32)
        longest = int(context.max())
        used = -(-longest // self._block_size)
        tables = self._tables[[row.slot for row in rows], :used]
        blocks = tables[owner, positions // self._block_size].astype(np.int64)
        batch = RaggedBatch(
            query_start=self._to_device(query_start),
            context_len=self._to_device(context),
            block_table=self._to_device(tables),
            cache_slots=self._to_device(blocks * self._block_size + positions % self._block_size),
            max_query_len=int(lengths.max()),
            max_context_len=longest,
        )
        return self._to_device(positions), batch

    def input_ids(self, rows: list[Row]) -> Tensor:
        """Token ids int64 ``[T]``: those the plan names, and each decode's own last token, which never left the device."""
        known: list[int] = []
        decodes: list[int] = []
        slots: list[int] = []
        for row in rows:
            if not row.tokens:
                decodes.append(len(known))
                slots.append(row.slot)
            known += row.tokens or (0,)
        ids = torch.tensor(known, device=self._device)
        if decodes:
            ids[decodes] = self.last_token[slots]
        return ids

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
