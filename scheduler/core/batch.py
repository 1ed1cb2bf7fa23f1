"""The running batch: who runs, in which slot, on which blocks."""

from collections import Counter
from dataclasses import dataclass

from protocol.plan import Admission, Row, Verdict, Verification
from scheduler.core.blocks import BlockPool
from scheduler.core.draft import Draft, Speculator
from scheduler.core.fairness import FairQueue
from scheduler.core.family import Family, PromptBlocks
from scheduler.core.sequence import Sequence, State
from scheduler.core.speculation import Speculation


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_running`` sequences at once; ``max_batch_tokens`` computed per step; ``max_model_len`` tokens in a sequence;
    ``max_adapters`` different ones among those who run."""

    max_running: int
    max_batch_tokens: int
    max_model_len: int
    max_adapters: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= self.max_batch_tokens:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_running ({self.max_running}) >= 1, "
                "so that no decode is ever left out"
            )


@dataclass(slots=True)
class Counters:
    """Running totals. ``late_tokens`` were sampled for sequences that had ended meanwhile and were dropped, of these
    ``cancelled_tokens`` for those that were taken out; ``cached_tokens`` were found in the prefix cache, by whoever was
    admitted, and ``forked_tokens`` of prompts with siblings; ``rejected_tokens`` were drafted in vain."""

    preemptions: int = 0
    recomputed_tokens: int = 0
    late_tokens: int = 0
    cancelled_tokens: int = 0
    cached_tokens: int = 0
    forked_tokens: int = 0
    rejected_tokens: int = 0


#: Tokens of prompts that go into a step however many decode, so that no newcomer waits for ever.
_LEAST_OF_PROMPTS = 16


class Batch:
    """What policies act on. ``running`` holds who runs, the oldest first: who is ``decoding`` has one token to compute in the
    next step, who is ``prefilling`` may have more, who is neither ends with a step in flight. ``adapters``: how many run with
    each. ``draft`` is the step in the making."""

    def __init__(self, limits: Limits, pool: BlockPool, queue: FairQueue, speculation: Speculation | None) -> None:
        self.limits = limits
        self.pool = pool
        self.queue = queue
        self.speculation = speculation
        self.counters = Counters()
        self.running: dict[str, Sequence] = {}
        self.decoding: dict[str, Sequence] = {}
        self.prefilling: dict[str, Sequence] = {}
        self.adapters: Counter[str] = Counter()
        self._free_slots = list(range(limits.max_running - 1, -1, -1))
        self.begin(0)

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def begin(self, step: int, most: int | None = None) -> Draft:
        """Start a new draft, of ``most`` tokens while somebody decodes; a few of prompts may be among them all the same."""
        budget = self.limits.max_batch_tokens
        if most is not None and self.decoding:
            budget = min(budget, max(most, len(self.decoding) + _LEAST_OF_PROMPTS))
        self.draft = Draft(step, budget)
        return self.draft

    def fits(self, sequence: Sequence, tokens: int | None = None, *, freed: int = 0, slots: int = 0) -> bool:
        """Whether a waiting sequence can be admitted with blocks for ``tokens``, by default those it has; ``freed`` blocks and
        ``slots`` more would be there. What the prefix cache would save isn't counted."""
        needed = self.pool.blocks_for(len(sequence.tokens) if tokens is None else tokens)
        if sequence.family is not None:
            if sequence in sequence.family.held:
                return False
            needed -= self.pool.num_used(self.pool.shared(sequence) or [])
        # One block is left for each running sequence, else the newcomer would soon preempt or be preempted.
        spare = self.pool.num_free + freed - len(self.running) + slots
        room = len(self._free_slots) + slots and not sequence.unseen and needed <= spare
        return bool(room) and self._has_adapter_for(sequence)

    def admit(self, sequence: Sequence, tokens: int | None = None) -> None:
        """Give a waiting sequence a slot, and blocks for ``tokens``, by default those it has. Raises OutOfBlocks."""
        edge = self._take_over(sequence)
        needed = self.pool.blocks_for(len(sequence.tokens) if tokens is None else tokens)
        self.pool.grow(sequence, needed - len(sequence.blocks))
        if edge is not None:
            self._copy(edge, sequence)
        if not sequence.charged:
            sequence.cached = min(sequence.computed, sequence.prompt_len)
            self.draft.started.append(sequence)
        self.queue.admit(sequence)
        sequence.state = State.RUNNING
        sequence.slot = self._free_slots.pop()
        self.running[sequence.id] = self.prefilling[sequence.id] = sequence
        if sequence.adapter:
            self.adapters[sequence.adapter] += 1

    def preempt(self, sequence: Sequence) -> None:
        """Its blocks are freed; its tokens are kept and computed again later."""
        self.counters.preemptions += 1
        self.counters.recomputed_tokens += sequence.computed
        sequence.state = State.WAITING
        self._take_out(sequence)
        self.queue.put_back(sequence)

    def end(self, sequence: Sequence) -> None:
        """It has ended, or is to, whatever it is doing."""
        before, sequence.state = sequence.state, State.ENDED
        if before is State.RUNNING:
            self._take_out(sequence)
            self.queue.leave(sequence)
        elif sequence.family is not None and sequence in sequence.family.held:
            sequence.family.held.remove(sequence)
        else:
            self.queue.remove(sequence)

    def shortage(self) -> int:
        """How many blocks the decodes of the next step lack."""
        free = self.pool.num_free
        if free >= len(self.decoding):
            return 0
        return sum(1 for sequence in self.decoding.values() if _needs_block(sequence)) - free

    def decode(self, sequences: list[Sequence] | None = None) -> None:
        """Give all that decode, or those named, their one token; of all, some may speculate. Raises OutOfBlocks when there was
        a ``shortage``."""
        draft = self.draft
        shares = self._shares() if sequences is None else {}
        if shares:
            sequences = [sequence for sequence in self.decoding.values() if sequence not in shares]
        slots, smooth, others, context = draft.decodes, draft.decoders, [], 0
        for sequence in self.decoding.values() if sequences is None else sequences:
            position = sequence.computed
            if position >= sequence.smooth_until:
                others.append(sequence)
                continue
            sequence.computed = position = position + 1
            sequence.unseen += 1
            context += position
            slots.append(sequence.slot)
            smooth.append(sequence)
        draft.context = context
        draft.samplers = smooth.copy()
        draft.budget -= len(smooth)
        for sequence in others:
            self._decode_unsmooth(sequence)
        for sequence, drafts in shares.items():
            self._verify(sequence, drafts)

    def prefill(self, sequence: Sequence, length: int) -> None:
        """Compute ``length`` more of its tokens; with the last one it decodes from then on, if it is to generate any."""
        self.draft.prefilled += length
        self._add_row(sequence, length)
        if sequence.computed == len(sequence.tokens):
            del self.prefilling[sequence.id]
            if sequence.generates:
                self.decoding[sequence.id] = sequence
            else:
                self.draft.prefills.append(sequence)

    def lead_is_over(self, family: Family, prompt: PromptBlocks | None = None) -> None:
        """``prompt``: it is computed. Those that were held wait for their turn."""
        family.prompt = prompt or family.prompt
        family.leader = None
        for sequence in family.held:
            self.queue.rejoin(sequence)
        family.held = []

    def retract(self, draft: Draft) -> None:
        """Undo a step in flight; the blocks stay with their owners. What the worker took in of it is anyone's guess."""
        for sequence in draft.samplers:
            sequence.unseen -= 1
        for sequence, blocks in draft.copiers:
            if sequence.blocks is blocks:
                self.preempt(sequence)
        for sequence in draft.decoders:
            if sequence.state is State.RUNNING:
                sequence.computed -= 1
                sequence.untell()
        for speculator, verification in zip(draft.speculators, draft.verifications, strict=True):
            self.correct(speculator, 1 + verification.drafts, verification.drafts)
            speculator.sequence.untell()
        for (sequence, blocks), row in zip(draft.owners, draft.rows, strict=True):
            if sequence.blocks is blocks and sequence.state is State.RUNNING:
                sequence.computed = row.start
                sequence.untell()
                if sequence.uncomputed > 1 or not sequence.generates:
                    self.prefilling[sequence.id] = sequence
                    self.decoding.pop(sequence.id, None)

    def correct(self, speculator: Speculator, tokens: int, drafts: int) -> None:
        """So many of a speculator's planned ``tokens`` won't come; its ``drafts`` have been judged, or never will be."""
        sequence = speculator.sequence
        sequence.unseen -= tokens
        sequence.drafted -= drafts
        if sequence.blocks is speculator.blocks:
            sequence.computed -= tokens

    def observe(self, sequence: Sequence, verdict: Verdict) -> None:
        """Learn from what became of a sequence's drafts."""
        assert self.speculation is not None
        self.speculation.observe(sequence, verdict)
        self.counters.rejected_tokens += verdict.drafted - verdict.accepted

    def _shares(self) -> dict[Sequence, int]:
        """Who may speculate, and how far: only where nobody else could use the room."""
        if self.speculation is None or self.prefilling or self.pool.num_free < len(self.decoding):
            return {}
        return self.speculation.shares(self.decoding.values(), self.draft.budget)

    def _verify(self, sequence: Sequence, drafts: int) -> None:
        """Compute its newest token and so many drafts, wherever it stands when that is known; blocks for all of them are taken.

        Those of rejected drafts stay with it: its next tokens need them.
        """
        draft, start = self.draft, sequence.computed
        sequence.computed += 1 + drafts
        sequence.unseen += 1 + drafts
        sequence.drafted += drafts
        self.pool.grow(sequence, self.pool.blocks_for(sequence.computed) - len(sequence.blocks))
        draft.verifications.append(Verification(sequence.slot, drafts, sequence.take_new_blocks()))
        draft.speculators.append(Speculator(sequence, sequence.blocks, start))
        draft.drafted.append(drafts)
        draft.budget -= 1 + drafts

    def _decode_unsmooth(self, sequence: Sequence) -> None:
        """A decode that has all its tokens planned, lacks a block, or that the worker must be told more of than its slot."""
        if sequence.computed + 1 >= sequence.end_len:
            return
        if sequence.drafted:
            # Where it stands isn't known yet, and a row would have to say.
            self._verify(sequence, 0)
        else:
            if sequence.computed == sequence.room:
                self.pool.grow(sequence, 1)
            self._add_row(sequence, 1)

    def _add_row(self, sequence: Sequence, length: int) -> None:
        draft = self.draft
        if not sequence.told:
            sequence.told = True
            tokens = sequence.tokens.copy()
            admission = Admission(sequence.slot, tokens, sequence.sampling, sequence.prompt_len, sequence.adapter)
            draft.admissions.append(admission)
        start = sequence.computed
        sequence.computed += length
        samples = sequence.generates and sequence.computed == len(sequence.tokens) + sequence.unseen
        draft.rows.append(Row(sequence.slot, start, length, sequence.take_new_blocks(), samples))
        draft.owners.append((sequence, sequence.blocks))
        draft.budget -= length
        if samples:
            draft.samplers.append(sequence)
            sequence.unseen += 1

    def _take_over(self, sequence: Sequence) -> int | None:
        """Give it the blocks there are of its beginning; returns the one that holds what its prompt lacks then, to be copied."""
        shared = self.pool.shared(sequence)
        if shared is not None:
            self.pool.fork(sequence, shared)
        elif sequence.family is not None:
            self._lead(sequence, sequence.family)
        forked = sequence.computed
        self.pool.reuse(sequence)
        self.counters.cached_tokens += sequence.computed - forked
        self.counters.forked_tokens += forked
        return None if shared is None else self.pool.edge(sequence)

    def _lead(self, sequence: Sequence, family: Family) -> None:
        """It computes the prompt; its siblings that wait do so for that."""
        family.leader = sequence
        for sibling in family.members:
            if sibling is not sequence and sibling.state is State.WAITING and sibling not in family.held:
                self.queue.remove(sibling)
                family.held.append(sibling)

    def _copy(self, edge: int, sequence: Sequence) -> None:
        """It has the rest of its prompt from there, in a block of its own."""
        self.draft.copies.append((edge, sequence.blocks[sequence.computed // self.pool.block_size]))
        self.draft.copiers.append((sequence, sequence.blocks))
        self.counters.forked_tokens += sequence.fork_len - sequence.computed
        sequence.computed = sequence.fork_len

    def _has_adapter_for(self, sequence: Sequence) -> bool:
        """Whether its adapter is in use already, or another one may be."""
        adapters = self.adapters
        return not sequence.adapter or sequence.adapter in adapters or len(adapters) < self.limits.max_adapters

    def _take_out(self, sequence: Sequence) -> None:
        if sequence.adapter:
            self.adapters -= Counter({sequence.adapter: 1})
        del self.running[sequence.id]
        self.decoding.pop(sequence.id, None)
        self.prefilling.pop(sequence.id, None)
        family = sequence.family
        self.pool.free(sequence.blocks, keep=family is not None and family.lives)
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.release()
        if family is not None and family.leader is sequence:
            self.lead_is_over(family)


def _needs_block(sequence: Sequence) -> bool:
    return sequence.computed == sequence.room and sequence.computed + 1 < sequence.end_len
