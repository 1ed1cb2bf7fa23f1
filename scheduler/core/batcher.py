"""Continuous batching: which sequences share the next step, and what its result means for them.

Iteration-level scheduling (Yu et al., "Orca", OSDI'22) with paged KV blocks (vLLM, SOSP'23) and one token budget shared by
decodes and chunks of prompts (Agrawal et al., "Sarathi-Serve", OSDI'24):

1. every running sequence that decodes gets its one token, oldest first; when blocks run out, the youngest running
   sequence is preempted (its blocks are freed, its tokens are kept and computed again later);
2. prompts under way get what is left of the budget;
3. waiting sequences are let in while budget, slots and blocks last, the least served tenant's first (``fairness.py``).

Plans may be made ahead of results: a decode needs no token value here, since the worker keeps the last one.

After a step that failed only those who were in it run, half of them at a time, until the one at fault is alone.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import compress

from protocol.plan import Admission, Row, StepPlan
from scheduler.core.blocks import BlockPool
from scheduler.core.fairness import FairQueue
from scheduler.core.sequence import FinishReason, Sequence, State
from scheduler.core.suspects import Suspects


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_running`` sequences at once; ``max_batch_tokens`` computed per step; ``max_model_len`` tokens in a sequence."""

    max_running: int
    max_batch_tokens: int
    max_model_len: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= self.max_batch_tokens:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_running ({self.max_running}) >= 1, "
                "so that no decode is ever left out"
            )


class CapacityError(ValueError):
    """The sequence could never finish within the model's context or the whole block pool."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token was generated; with ``finish`` the sequence has ended and its blocks are free already."""

    id: str
    token: int
    finish: FinishReason | None


@dataclass(slots=True)
class Counters:
    """Running totals. ``late_tokens`` were sampled for sequences that had ended meanwhile and were dropped."""

    preemptions: int = 0
    recomputed_tokens: int = 0
    late_tokens: int = 0


@dataclass(slots=True)
class _Draft:
    """A plan in the making, and whose each row is."""

    step: int
    budget: int
    admissions: list[Admission] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    members: list[Sequence] = field(default_factory=list)

    @property
    def samplers(self) -> list[Sequence]:
        """Whose each sampled token will be."""
        return list(compress(self.members, (row.sample for row in self.rows)))


class Batcher:
    """Holds every unfinished sequence. All methods are synchronous and deterministic."""

    def __init__(self, limits: Limits, pool: BlockPool, queue: FairQueue | None = None) -> None:
        self.limits = limits
        self.pool = pool
        self.queue = queue or FairQueue()
        self.counters = Counters()
        self.running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self._in_flight: deque[_Draft] = deque()
        self._suspects = Suspects()
        self._step = 0

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self.running)

    def __contains__(self, id: str) -> bool:
        return id in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence. Raises CapacityError for one that could never finish, ValueError for an id in use."""
        if sequence.id in self._sequences:
            raise ValueError(f"sequence {sequence.id} is here already")
        longest = sequence.prompt_len + sequence.max_tokens
        room = min(self.limits.max_model_len, self.pool.num_blocks * self.pool.block_size)
        if longest > room:
            raise CapacityError(f"{longest} tokens can't fit: {room} is the most a sequence may hold")
        self._sequences[sequence.id] = sequence
        self.queue.push(sequence)

    def end(self, id: str) -> Sequence | None:
        """Take a sequence out, whatever it is doing; its blocks are free at once. None when it isn't here."""
        sequence = self._sequences.pop(id, None)
        if sequence is None:
            return None
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.queue.remove(sequence)
        sequence.state = State.ENDED
        self._suspects.forget(id)
        return sequence

    def plan(self) -> StepPlan | None:
        """Fill the next step; None when there is nothing to compute."""
        draft = self._draft()
        if not draft.rows and self._suspects and not self._in_flight:
            self._make_room_for_suspects()
            draft = self._draft()
        if not draft.rows:
            return None
        self._in_flight.append(draft)
        self._step += 1
        return StepPlan(draft.step, draft.admissions, draft.rows)

    def row_ids(self, plan: StepPlan) -> list[str]:
        """Whose each row of a plan in flight is."""
        return next([member.id for member in draft.members] for draft in self._in_flight if draft.step == plan.step)

    def apply(self, step: int, tokens: list[int]) -> list[TokenEvent]:
        """Take the tokens a step sampled. Steps are applied in the order they were planned; raises ValueError if not."""
        due = self._in_flight[0] if self._in_flight else _Draft(-1, 0)
        samplers = due.samplers
        if due.step != step or len(samplers) != len(tokens):
            raise ValueError(
                f"result of step {step} with {len(tokens)} tokens; {due.step} with {len(samplers)} was due"
            )
        self._in_flight.popleft()
        self._acquit(due)
        events = []
        for sequence, token in zip(samplers, tokens, strict=True):
            if sequence.state is State.ENDED:
                self.counters.late_tokens += 1
                continue
            finish = sequence.accept(token)
            self.queue.charge_output(sequence)
            if finish is not None:
                self.end(sequence.id)
            events.append(TokenEvent(sequence.id, token, finish))
        return events

    def fail(self, *, lost: bool) -> list[Sequence]:
        """The oldest step in flight failed, so all of them are void; ``lost``: with all that the worker had in memory.

        Returns the sequences that were in it: when it was a single one, that one is at fault.
        """
        failed = self._in_flight[0]
        if lost:
            self.restart()
        else:
            self._retract()
        marks = {}
        for sequence, row in zip(failed.members, failed.rows, strict=True):
            if sequence.state is not State.ENDED:
                sequence.failures += 1
                marks[sequence.id] = row.start + row.length
        self._suspects.accuse(marks)
        return [self._sequences[id] for id in marks]

    def restart(self) -> None:
        """The worker lost its memory: every running sequence waits again, planned steps are void."""
        self._in_flight.clear()
        for sequence in reversed(list(self.running)):
            self._preempt(sequence)
        for sequence in self.queue:
            sequence.unseen = 0

    def _retract(self) -> None:
        """Undo what was planned; the blocks stay with their owners. What the worker took in of it is anyone's guess."""
        while self._in_flight:
            draft = self._in_flight.pop()
            for sequence, row in zip(draft.members, draft.rows, strict=True):
                sequence.unseen -= row.sample
                if sequence.state is State.RUNNING:
                    sequence.computed = row.start
                    sequence.untell()

    def _acquit(self, passed: _Draft) -> None:
        for sequence, row in zip(passed.members, passed.rows, strict=True):
            if not self._suspects or self._suspects.clear(sequence.id, row.start + row.length):
                sequence.failures = 0

    def _make_room_for_suspects(self) -> None:
        for sequence in reversed(list(self.running)):
            if not self._suspects.may_run(sequence.id):
                self._preempt(sequence)

    def _draft(self) -> _Draft:
        draft = _Draft(self._step, self.limits.max_batch_tokens)
        preempted = self._plan_decodes(draft)
        self._plan_prefills(draft)
        if not preempted:
            self._admit_waiting(draft)
        return draft

    def _plan_decodes(self, draft: _Draft) -> bool:
        """Give each decoding sequence its token; says whether any sequence was preempted for it."""
        before = self.counters.preemptions
        for sequence in list(self.running):
            if sequence.uncomputed != 1 or sequence.is_exhausted or not self._may_run(sequence):
                continue
            while self._lacks_block(sequence) and not self.pool.num_free:
                self._preempt(self.running[-1])
            if sequence.state is State.RUNNING:
                if self._lacks_block(sequence):
                    sequence.blocks += self.pool.allocate(1)
                self._add_row(draft, sequence, 1)
        return self.counters.preemptions > before

    def _plan_prefills(self, draft: _Draft) -> None:
        for sequence in self.running:
            if draft.budget and sequence.uncomputed > 1 and self._may_run(sequence):
                self._add_row(draft, sequence, min(sequence.uncomputed, draft.budget))

    def _admit_waiting(self, draft: _Draft) -> None:
        while draft.budget and self._free_slots and (sequence := self._next_waiting()) is not None:
            needed = self.pool.blocks_for(len(sequence.tokens))
            # One block is left for each running sequence, else the newcomer would soon preempt or be preempted.
            if sequence.unseen or needed + len(self.running) > self.pool.num_free:
                return
            self._admit(draft, sequence, needed)

    def _next_waiting(self) -> Sequence | None:
        if not self._suspects:
            return self.queue.head()
        return next((sequence for sequence in self.queue if self._suspects.may_run(sequence.id)), None)

    def _may_run(self, sequence: Sequence) -> bool:
        return sequence.state is State.RUNNING and self._suspects.may_run(sequence.id)

    def _admit(self, draft: _Draft, sequence: Sequence, needed: int) -> None:
        self.queue.admit(sequence)
        sequence.state = State.RUNNING
        sequence.blocks = self.pool.allocate(needed)
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        self._add_row(draft, sequence, min(sequence.uncomputed, draft.budget))

    def _add_row(self, draft: _Draft, sequence: Sequence, length: int) -> None:
        if not sequence.told:
            sequence.told = True
            draft.admissions.append(Admission(sequence.slot, sequence.sampling))
        start = sequence.computed
        known = [] if sequence.slot_has_last_token else sequence.tokens[start : start + length]
        sequence.computed += length
        samples = sequence.computed == sequence.planned_len
        new_blocks = sequence.blocks[sequence.sent_blocks :]
        sequence.sent_blocks = len(sequence.blocks)
        draft.rows.append(Row(sequence.slot, start, length, known, new_blocks, samples))
        draft.members.append(sequence)
        draft.budget -= length
        if samples:
            sequence.unseen += 1
            sequence.slot_has_last_token = True

    def _lacks_block(self, sequence: Sequence) -> bool:
        return self.pool.blocks_for(sequence.computed + 1) > len(sequence.blocks)

    def _preempt(self, sequence: Sequence) -> None:
        self.counters.preemptions += 1
        self.counters.recomputed_tokens += sequence.computed
        self.running.remove(sequence)
        self._release(sequence)
        sequence.restart()
        sequence.state = State.WAITING
        self.queue.put_back(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
