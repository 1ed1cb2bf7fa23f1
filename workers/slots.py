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
from workers.transfer import send


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens after which one is sampled: ``ids``, the ``slots`` that they are in and their ``positions``, int64 ``[n]``. No
    position is over ``longest``, not even of those that are sampled."""

    ids: Tensor
    slots: Tensor
    positions: Tensor
    longest: int


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step's forward pass takes: ``ids``, ``slots`` and ``positions`` of its tokens, int64 ``[T]``, and the batch that its
    attention runs on. ``drawn``: after which of the tokens one is sampled, int64 ``[n]``, or None: after each of them."""

    ids: Tensor
    slots: Tensor
    positions: Tensor
    batch: RaggedBatch
    drawn: Tensor | None

    def select(self) -> Drawn:
        """Those after which one is sampled."""
        tokens = (self.ids, self.slots, self.positions)
        ids, slots, positions = tokens if self.drawn is None else (tensor[self.drawn] for tensor in tokens)
        return Drawn(ids, slots, positions, self.batch.max_context_len)


@dataclass(frozen=True, slots=True)
class Spans:
    """So many tokens of each of these ``slots``, from ``starts`` on; all int64 ``[R]``, on the host."""

    slots: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


class Slots:
    """One row per slot, and one that is `spare`; changed only by what a plan sends, so a step costs what it schedules.

    On the device: ``tokens``, int32 ``[slots, positions]``: a token that was sampled is there for the next step, and for whatever
    else asks what came before, without ever having been on the host. ``prompt_len``, int64 ``[slots]``; ``tables``, int32
    ``[slots, blocks]``, the block tables, which the host has, too.
    """

    def __init__(self, slots: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.spare = slots
        self.block_size = block_size
        self.max_len = max_blocks * block_size
        self._device = device
        self._tables = np.zeros((slots + 1, max_blocks), dtype=np.int32)
        self._num_blocks = [0] * slots
        self._computed = np.zeros(slots, dtype=np.int64)
        (self.tables,) = send([self._tables], device)
        self.tokens = torch.zeros(slots + 1, self.max_len + 1, dtype=torch.int32, device=device)
        self.prompt_len = torch.zeros(slots, dtype=torch.int64, device=device)

    def admit(self, admission: Admission) -> None:
        """Whatever the slot held before is forgotten."""
        slot = admission.slot
        self._num_blocks[slot] = 0
        self.write(slot, 0, np.array(admission.tokens, dtype=np.int32))
        self.prompt_len[slot] = admission.prompt_len

    def extend(self, rows: Iterable[Row | Verification]) -> None:
        """Append the rows' new blocks to their slots' tables."""
        cells: list[int] = []
        blocks: list[int] = []
        for row in rows:
            if row.new_blocks:
                first = row.slot * self._tables.shape[1] + self._num_blocks[row.slot]
                cells += range(first, first + len(row.new_blocks))
                blocks += row.new_blocks
                self._num_blocks[row.slot] += len(row.new_blocks)
        if blocks:
            self._tables.reshape(-1)[cells] = blocks
            if self._device.type != "cpu":
                at, held = send([np.array(cells, dtype=np.int64), np.array(blocks, dtype=np.int32)], self._device)
                self.tables.view(-1)[at] = held

    def advance(self, plan: StepPlan, drafted: Sequence[int] = ()) -> Spans:
        """Of the plan's decodes, its rows, then its verifications with so many drafts each, which then count as computed."""
        decodes, rows = plan.decodes, plan.rows
        verified = [verification.slot for verification in plan.verifications]
        slots = np.array([*decodes, *(row.slot for row in rows), *verified], dtype=np.int64)
        lengths = np.array([1] * len(decodes) + [row.length for row in rows] + [1 + n for n in drafted], dtype=np.int64)
        given = np.array([row.start for row in rows], dtype=np.int64)
        starts = np.concatenate([self._computed[decodes], given, self._computed[verified]])
        self._computed[slots] = starts + lengths
        return Spans(slots, starts, lengths)

    def inputs(self, plan: StepPlan, drafted: Sequence[int] = ()) -> Inputs:
        """Of all that the plan computes, as `advance` has it; drawn after are the last token of each row that samples, and all of
        each verification."""
        spans = self.advance(plan, drafted)
        ends = spans.lengths.cumsum()
        decodes = len(plan.decodes)
        rows = [*range(decodes), *(index for index, row in enumerate(plan.rows, start=decodes) if row.sample)]
        verified = np.arange(ends[-1] - sum(drafted) - len(drafted), ends[-1])
        return self.ragged(spans, np.concatenate([ends[rows] - 1, verified]))

    def ragged(self, spans: Spans, drawn: np.ndarray) -> Inputs:
        """These tokens, one slot after the other; ``drawn`` int64 ``[n]``, in order and each but once."""
        ends = spans.starts + spans.lengths
        query_start = np.fromiter(accumulate(spans.lengths, initial=0), np.int32, len(spans.slots) + 1)
        owner = np.repeat(np.arange(len(spans.slots)), spans.lengths)
        positions = np.arange(query_start[-1]) - query_start[owner] + spans.starts[owner]
        longest = int(ends.max())
        tables = self._tables[spans.slots, : -(-longest // self.block_size)]
        blocks = tables[owner, positions // self.block_size].astype(np.int64)
        cache_slots = blocks * self.block_size + positions % self.block_size
        arrays = (query_start, ends.astype(np.int32), tables, cache_slots, positions, spans.slots[owner], drawn)
        start, context, table, cached, at, slots, draws = send(arrays, self._device)
        batch = RaggedBatch(
            query_start=start,
            context_len=context,
            block_table=table,
            cache_slots=cached,
            max_query_len=int(spans.lengths.max()),
            max_context_len=longest,
        )
        return Inputs(self.tokens[slots, at].long(), slots, at, batch, None if len(drawn) == len(positions) else draws)

    def rows(self, slots: list[int], drawn: Drawn) -> Rows:
        """What is to be drawn after these, in these ``slots``."""
        return Rows(slots, drawn.slots, drawn.positions + 1, self.tokens[:, : drawn.longest], self.prompt_len)

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
        self.tokens[slot, position : position + len(tokens)] = send([tokens], self._device)[0]
