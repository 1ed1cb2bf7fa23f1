"""Continuous batching: which sequences share the next step, and what its result means for them.

Iteration-level scheduling (Yu et al., "Orca", OSDI'22) on paged KV blocks (vLLM, SOSP'23). Here is what every policy needs:
sequences come and go, steps are planned and applied, failing ones are taken back. Who gets into a step is for a policy to
say (``policies/``); it acts on the ``Batch``, which does the bookkeeping of slots, blocks and rows.

Plans may be made ahead of results: a decode needs no token value here, since the worker keeps the last one.

After a step that failed only those who were in it run, half of them at a time, until the one at fault is alone.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import chain

import msgspec

from protocol.plan import StepPlan, StepResult, Verdict
from scheduler.core.batch import Batch, Counters, Limits
from scheduler.core.blocks import BlockPool
from scheduler.core.draft import Draft
from scheduler.core.fairness import FairQueue
from scheduler.core.family import Family
from scheduler.core.policies.base import Policy
from scheduler.core.policies.fair import Fair
from scheduler.core.policies.trial import Trial
from scheduler.core.sequence import FinishReason, Sequence, State
from scheduler.core.speculation import Speculation
from scheduler.core.suspects import Suspects


class CapacityError(ValueError):
    """The sequence could never finish within the model's context or the whole block pool."""


class TokenEvent(msgspec.Struct, frozen=True, gc=False):
    """One token was generated; with ``finish`` the sequence has ended and its blocks are free already."""

    id: str
    token: int
    finish: FinishReason | None


class Batcher:
    """Holds every unfinished sequence. All methods are synchronous and deterministic.

    Raises ValueError when ``speculation`` could need two blocks at once.
    """

    def __init__(
        self,
        limits: Limits,
        pool: BlockPool,
        policy: Policy | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        if speculation is not None and speculation.max_draft >= pool.block_size:
            raise ValueError(f"{speculation.max_draft} drafts are too many for blocks of {pool.block_size}")
        self.limits = limits
        self.pool = pool
        self.policy = policy or Fair()
        self._batch = Batch(limits, pool, self.policy.queue, speculation)
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: deque[Draft] = deque()
        self._suspects = Suspects()
        self._trial = Trial(self.policy.queue, self._suspects)
        self._failing: set[str] = set()
        self._step = 0

    @property
    def queue(self) -> FairQueue:
        return self.policy.queue

    @property
    def counters(self) -> Counters:
        return self._batch.counters

    @property
    def running(self) -> dict[str, Sequence]:
        """Who runs, the oldest first."""
        return self._batch.running

    @property
    def num_waiting(self) -> int:
        return len(self._sequences) - len(self.running)

    def __contains__(self, id: str) -> bool:
        return id in self._sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def submit(self, *sequences: Sequence) -> None:
        """Queue a sequence, or several with the same prompt, tenant and priority, which is then computed and charged once.

        Raises CapacityError for those that could never finish, ValueError for an id in use.
        """
        room = min(self.limits.max_model_len, self.pool.num_blocks * self.pool.block_size)
        for sequence in sequences:
            if sequence.id in self._sequences:
                raise ValueError(f"sequence {sequence.id} is here already")
            if sequence.end_len > room:
                raise CapacityError(f"{sequence.end_len} tokens can't fit: {room} is the most a sequence may hold")
        family = Family(list(sequences)) if len(sequences) > 1 else None
        for number, sequence in enumerate(sequences):
            sequence.family = family
            sequence.charged = number > 0
            sequence.public_len = self.pool.public_len(sequence.tokens)
            self._sequences[sequence.id] = sequence
            self.queue.push(sequence)

    def end(self, id: str) -> Sequence | None:
        """Take a sequence out, whatever it is doing; its blocks are free at once. None when it isn't here."""
        sequence = self._sequences.pop(id, None)
        if sequence is None:
            return None
        self._batch.end(sequence)
        self._suspects.forget(id)
        return sequence

    def plan(self, most: int | None = None) -> StepPlan | None:
        """Fill the next step, with about ``most`` tokens while somebody decodes; None when there is nothing to compute."""
        draft = self._draft(most)
        if not draft and self._suspects and not self._in_flight:
            self._trial.make_room(self._batch)
            draft = self._draft(most)
        if not draft:
            return None
        self._in_flight.append(draft)
        self._step += 1
        return draft.plan

    def draft_of(self, plan: StepPlan | StepResult) -> Draft:
        """What is behind a plan in flight, or its result."""
        return next(draft for draft in self._in_flight if draft.step == plan.step)

    def apply(self, step: int, tokens: list[int], verdicts: Items[Verdict] = ()) -> list[TokenEvent]:
        """Take the tokens a step sampled. Steps are applied in the order they were planned; raises ValueError if not."""
        due = self._in_flight[0] if self._in_flight else Draft(-1, 0)
        if (due.step, len(due.samplers), len(due.speculators)) != (step, len(tokens), len(verdicts)):
            raise ValueError(
                f"result of step {step} with {len(tokens)} tokens and {len(verdicts)} verdicts; "
                f"{due.step} with {len(due.samplers)} and {len(due.speculators)} was due"
            )
        self._in_flight.popleft()
        self._acquit(due)
        for (sequence, blocks), row in zip(due.owners, due.rows, strict=True):
            if sequence.blocks is blocks:
                end = row.start + row.length
                self.pool.remember(sequence, end)
                if sequence.family is not None and row.start < sequence.prompt_len <= end:
                    self._batch.lead_is_over(sequence.family, self.pool.prompt_of(sequence))
        if due.prefills:
            self._complete(due)
        verified = self._judge(due, verdicts) if verdicts else ()
        return self._accept(chain(zip(due.samplers, tokens, strict=True), verified))

    def fail(self, *, lost: bool) -> list[Sequence]:
        """The oldest step in flight failed, so all of them are void; ``lost``: with all that the worker had in memory.

        Returns the sequences that were in it: when it was a single one, that one is at fault.
        """
        failed = self._in_flight[0]
        if lost:
            self.restart()
        else:
            while self._in_flight:
                self._batch.retract(self._in_flight.pop())
        marks = {}
        for sequence, end in failed.ends():
            if sequence.state is not State.ENDED:
                sequence.failures += 1
                marks[sequence.id] = end
        self._failing.update(marks)
        self._suspects.accuse(marks)
        return [self._sequences[id] for id in marks]

    def restart(self) -> None:
        """The worker lost its memory: every running sequence waits again, planned steps are void."""
        self._in_flight.clear()
        for sequence in list(self.running.values()):
            self._batch.preempt(sequence)
        for sequence in self.queue:
            sequence.unseen = sequence.drafted = 0
        self.pool.forget_content()

    def _draft(self, most: int | None) -> Draft:
        draft = self._batch.begin(self._step, most)
        (self._trial if self._suspects else self.policy).fill(self._batch)
        return draft

    def _acquit(self, passed: Draft) -> None:
        """Who got past the point where a step failed is no longer under suspicion."""
        if not self._failing:
            return
        for sequence, end in passed.ends():
            if not self._suspects or self._suspects.clear(sequence.id, end):
                sequence.failures = 0
                self._failing.discard(sequence.id)
        self._failing &= self._sequences.keys()

    def _complete(self, passed: Draft) -> None:
        """End those who wanted no more than their prompt computed."""
        passed.prefills = [sequence for sequence in passed.prefills if sequence.state is not State.ENDED]
        for sequence in passed.prefills:
            self.end(sequence.id)

    def _judge(self, passed: Draft, verdicts: Items[Verdict]) -> list[tuple[Sequence, int]]:
        """Roll back what was rejected; returns the tokens that are left, and whose they are."""
        passed.drafted = [verdict.drafted for verdict in verdicts]
        verified: list[tuple[Sequence, int]] = []
        for speculator, planned, verdict in zip(passed.speculators, passed.verifications, verdicts, strict=True):
            sequence = speculator.sequence
            self._batch.correct(speculator, planned.drafts + 1 - len(verdict.tokens), planned.drafts)
            self._batch.observe(sequence, verdict)
            if sequence.blocks is speculator.blocks:
                self.pool.remember(sequence, len(sequence.tokens) - 1)
            verified += [(sequence, token) for token in verdict.tokens]
        return verified

    def _accept(self, sampled: Iterable[tuple[Sequence, int]]) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        delivered: dict[str, int] = {}
        ended = State.ENDED
        for sequence, token in sampled:
            if sequence.state is ended:
                self.counters.late_tokens += 1
                self.counters.cancelled_tokens += sequence.finish_reason(sequence.tokens[-1]) is None
                continue
            sequence.tokens.append(token)
            sequence.unseen -= 1
            delivered[sequence.tenant] = delivered.get(sequence.tenant, 0) + 1
            finish = None
            if token in sequence.stop_ids or len(sequence.tokens) >= sequence.end_len:
                finish = sequence.finish_reason(token)
                self._finish(sequence)
            events.append(TokenEvent(sequence.id, token, finish))
        self.queue.charge_output(delivered)
        return events

    def _finish(self, sequence: Sequence) -> None:
        # The last token was never computed; what comes before it may begin the next turn of a chat.
        if sequence.state is State.RUNNING:
            self.pool.remember(sequence, len(sequence.tokens) - 1)
        self.end(sequence.id)
