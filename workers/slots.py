"""What the worker keeps of each running sequence between steps: its tokens, how many are computed, its block table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from protocol.plan import Admission, Row, StepPlan, Verification
from workers.attention import RaggedBatch
from workers.logits import Rows


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step's forward pass takes: ``ids`` and ``positions`` int64 ``[T]``, and the batch that its attention runs on."""

    ids: Tensor
    positions: Tensor
    batch: RaggedBatch


class Slots:
    """One row per slot; changed only by what a plan sends, so a step costs what it schedules.

    ``tokens``: int32 ``[slots, positions]``, on the device: a token that was sampled is there for the next step, and for whatever
    else asks what came before, without ever having been on the host. ``prompt_len``: int64 ``[slots]``, there too.
    """

    def __init__(self, slots: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = np.zeros((slots, max_blocks), dtype=np.int32)
        self._num_blocks = [0] * slots
        self._computed = np.zeros(slots, dtype=np.int64)
        self.tokens = torch.zeros(slots, max_blocks * block_size + 1, dtype=torch.int32, device=device)
        self.prompt_len = torch.zeros(slots, dtype=torch.int64, device=device)

    def admit(self, admission: Admission) -> None:
        """Whatever the slot held before is forgotten."""
        slot = admission.slot
        self._num_blocks[slot] = 0
        known = torch.tensor(admission.tokens, dtype=torch.int32)
        self.tokens[slot, : len(known)] = known.to(self._device, non_blocking=True)
        self.prompt_len[slot] = admission.prompt_len

    def extend(self, rows: Iterable[Row | Verification]) -> None:
        """Append the rows' new blocks to their slots' tables."""
        for row in rows:
            start = self._num_blocks[row.slot]
            self._tables[row.slot, start : start + len(row.new_blocks)] = row.new_blocks
            self._num_blocks[row.slot] = start + len(row.new_blocks)

    def inputs(self, plan: StepPlan, drafted: Sequence[int] = ()) -> Inputs:
        """Of the plan's decodes, its rows, then its verifications with so many drafts each, which then count as computed."""
        decodes, rows = plan.decodes, plan.rows
        verified = [verification.slot for verification in plan.verifications]
        slots = np.array([*decodes, *(row.slot for row in rows), *verified], dtype=np.int64)
        lengths = np.array([1] * len(decodes) + [row.length for row in rows] + [1 + n for n in drafted], dtype=np.int64)
        given = np.array([row.start for row in rows], dtype=np.int64)
        starts = np.concatenate([self._computed[decodes], given, self._computed[verified]])
        self._computed[slots] = starts + lengths
        return self.ragged(slots, starts, lengths)

    def ragged(self, slots: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> Inputs:
        """So many tokens of each slot from its start on, one slot after the other; all int64 ``[R]``."""
        ends = starts + lengths
        query_start = np.fromiter(accumulate(lengths, initial=0), np.int32, len(slots) + 1)
        owner = np.repeat(np.arange(len(slots)), lengths)
        positions = np.arange(query_start[-1]) - query_start[owner] + starts[owner]
        longest = int(ends.max())
        tables = self._tables[slots, : -(-longest // self._block_size)]
        blocks = tables[owner, positions // self._block_size].astype(np.int64)
        batch = RaggedBatch(
            query_start=self._to_device(query_start),
            context_len=self._to_device(ends.astype(np.int32)),
            block_table=self._to_device(tables),
            cache_slots=self._to_device(blocks * self._block_size + positions % self._block_size),
            max_query_len=int(lengths.max()),
            max_context_len=longest,
        )
        on_device = self._to_device(positions)
        ids = self.tokens[self._to_device(slots[owner]), on_device].long()
        return Inputs(ids, on_device, batch)

    def rows(self, slots: list[int], positions: Tensor, longest: int) -> Rows:
        """Of these slots the tokens at ``positions``, int64 ``[n]``, none over ``longest``, are to be drawn."""
        index = torch.tensor(slots, device=self._device)
        return Rows(slots, index, positions, self.tokens[:, :longest], self.prompt_len)

    def computed(self, slots: list[int]) -> np.ndarray:
        """How many positions of these are, int64."""
        return self._computed[slots]

    def roll_back(self, slot: int, positions: int) -> None:
        """So many of the last positions were computed in vain."""
        self._computed[slot] -= positions

    def texts(self, slots: list[int]) -> list[np.ndarray]:
        """On the host, all tokens of these up to the one that a decode would compute, int32."""
        ends = self._computed[slots] + 1
        texts = self.tokens[slots, : int(ends.max())].cpu().numpy()
        return [text[:end] for text, end in zip(texts, ends, strict=True)]

    def drafts(self, slot: int, count: int) -> list[int]:
        """On the host, so many tokens from behind the one that a decode would compute."""
        begin = int(self._computed[slot]) + 1
        tokens: list[int] = self.tokens[slot, begin : begin + count].tolist()
        return tokens

    def write(self, slot: int, position: int, tokens: np.ndarray) -> None:
        """These tokens, int32, stand from that position on."""
        self.tokens[slot, position : position + len(tokens)] = self._to_device(tokens)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)
