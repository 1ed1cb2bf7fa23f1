"""Invariants of the batcher after every step of random histories, under every policy: arrivals, cancels, crashes, tiny pools,
prompts that begin alike or are all that is to be computed, steps planned ahead, drafts right and wrong, requests for several
texts."""

from collections import Counter, deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from protocol.plan import Row, Sampling, StepPlan, Verdict, Verification
from scheduler.core import policies
from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher
from scheduler.core.blocks import BlockPool
from scheduler.core.sequence import Sequence, State
from scheduler.core.speculation import Speculation

EOS = 1


class Worker:
    """What a worker holds: a block table and the tokens of each slot, and the token at every place of its KV blocks."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.tables: dict[int, list[int]] = {}
        self.kv: dict[tuple[int, int], int] = {}
        self.texts: dict[int, dict[int, int]] = {}
        self.computed: dict[int, int | None] = {}
        self.seeds: dict[int, int] = {}

    def run(self, plan: StepPlan, sample) -> tuple[list[int], list[Verdict], list[int]]:
        """Tokens, verdicts, and of each row a sum over what it computed, as a mean's hidden states are summed up."""
        before = self.kv.copy() if plan.copies else {}
        for source, target in plan.copies:
            for offset in range(self.block_size):
                self.kv[target, offset] = before.get((source, offset), -1)
        for admission in plan.admissions:
            self.tables[admission.slot] = []
            self.seeds[admission.slot] = admission.sampling.seed
            self.computed[admission.slot] = None
            self.texts[admission.slot] = dict(enumerate(admission.tokens))
        decodes = [Row(slot, self.computed[slot], 1, [], sample=True) for slot in plan.decodes]
        tokens, sums = [], []
        for row in decodes + plan.rows:
            self.tables[row.slot] += row.new_blocks
            text = self.texts[row.slot]
            assert row.start == (self.computed[row.slot] or row.start), "no position is computed twice or left out"
            self.computed[row.slot] = end = row.start + row.length
            for position in range(row.start, end):
                self.kv[self._place(row.slot, position)] = text[position]
            read = [self.kv[self._place(row.slot, position)] for position in range(end)]
            sums.append(sum(read[row.start :]))
            if row.sample:
                text[end] = sample(read, self.seeds[row.slot])
                tokens.append(text[end])
        verdicts = [self._verify(verification, sample) for verification in plan.verifications]
        return tokens, verdicts, sums[len(decodes) :]

    def _verify(self, verification: Verification, sample) -> Verdict:
        """Drafts are as often right as wrong, and sometimes fewer than asked for."""
        slot, text, seed = verification.slot, self.texts[verification.slot], self.seeds[verification.slot]
        self.tables[slot] += verification.new_blocks
        start = self.computed[slot]
        self.kv[self._place(slot, start)] = text[start]
        right: list[int] = []
        for position in range(start, start + verification.drafts):
            right.append(sample([text[at] for at in range(position + 1)], seed))
            text[position + 1] = right[-1]
        drafted = max(verification.drafts - start % 2, 0)
        drafts = [token + (position * token) % 3 // 2 for position, token in enumerate(right[:drafted], start)]
        for position, token in enumerate([text[start], *drafts], start):
            self.kv[self._place(slot, position)] = token
        tokens: list[int] = []
        for position in range(start, start + drafted + 1):
            tokens.append(sample([self.kv[self._place(slot, at)] for at in range(position + 1)], seed))
            text[position + 1] = tokens[-1]
            if tokens != drafts[: len(tokens)]:
                break
        self.computed[slot] = start + len(tokens)
        return Verdict(drafted, tokens)

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        return self.tables[slot][position // self.block_size], position % self.block_size

    def damage(self, slots: set[int]) -> None:
        """A step with these failed somewhere: nothing that it should have changed can be relied on."""
        for slot in slots & set(self.tables):
            self.tables[slot].append(0)
            self.texts[slot] = {}


def slots_of(plan: StepPlan) -> list[int]:
    return plan.decodes + [each.slot for each in plan.rows + plan.verifications]


class Histories(RuleBasedStateMachine):
    @initialize(
        running=st.integers(1, 5),
        extra_budget=st.integers(0, 12),
        blocks=st.integers(3, 16),
        size=st.sampled_from([1, 2, 3, 4, 4, 4]),
        ahead=st.integers(1, 2),
        cache=st.booleans(),
        policy=st.sampled_from(["fair", "fair", *policies.NAMES]),
        public=st.integers(0, 12),
        drafts=st.sampled_from([0, 1, 2, 3, 3]),
        cheap=st.integers(2, 12),
    )
    def start(self, running, extra_budget, blocks, size, ahead, cache, policy, public, drafts, cheap):
        pool = BlockPool(blocks, size, prefix_cache=cache)
        pool.share(list(range(100, 100 + public)))
        drafts = min(drafts, size - 1)
        speculation = Speculation(drafts, cheap) if drafts else None
        self.batcher = Batcher(Limits(running, running + extra_budget, 40), pool, policies.create(policy), speculation)
        self.policy = policy
        self.room = min(40, blocks * size)
        self.ahead = ahead
        self.worker = Worker(size)
        self.in_flight = deque()
        self.sequences: dict[str, Sequence] = {}
        self.emitted: dict[str, list[int]] = {}
        self.sums: dict[str, int] = {}
        self.ended: set[str] = set()
        self.poison: dict[str, int] = {}

    def sample(self, kv: list[int], seed: int) -> int:
        """A token that depends on the whole history, as a model's would; sometimes EOS."""
        return hash((seed, *kv)) % 17

    @rule(
        prompt=st.integers(1, 12),
        max_tokens=st.integers(1, 20) | st.just(0),
        pooling=st.sampled_from([None, "last", "mean"]),
        poison=st.none() | st.integers(0, 12),
        tenant=st.sampled_from("abc"),
        like=st.none() | st.integers(0, 1),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        texts=st.sampled_from([1, 1, 1, 2, 3, 6]),
    )
    def submit(self, prompt, max_tokens, pooling, poison, tenant, like, priority, texts):
        prompt = min(prompt, self.room - min(max_tokens, 1))
        max_tokens = min(max_tokens, self.room - prompt)
        if prompt < 1:
            return
        number = len(self.sequences)
        first = 100 + (number + 2 if like is None else like) * 50
        sequences = [
            Sequence(
                f"s{number + index}",
                list(range(first, first + prompt)),
                max_tokens=max_tokens,
                stop_ids=frozenset({EOS}),
                sampling=Sampling(seed=index, pooling=pooling),
                tenant=tenant,
                priority=priority,
            )
            for index in range(texts if max_tokens and pooling is None else 1)
        ]
        for sequence in sequences:
            self.sequences[sequence.id] = sequence
            self.emitted[sequence.id] = []
        if poison is not None and len(self.poison) < 2:
            self.poison[sequences[-1].id] = poison
        self.batcher.submit(*sequences)

    @rule()
    def plan(self):
        if len(self.in_flight) >= self.ahead:
            return
        plan = self.batcher.plan()
        if plan is None:
            return
        limits, work = self.batcher.limits, self.batcher.draft_of(plan).work
        verified = sum(1 + verification.drafts for verification in plan.verifications)
        assert 0 < work.tokens == len(plan.decodes) + sum(row.length for row in plan.rows) + verified
        if self.policy in ("fair", "chunked"):
            assert work.tokens <= limits.max_batch_tokens
        self.check_that_nothing_shared_is_written(plan)
        slots = slots_of(plan)
        assert len(set(slots)) == len(slots) <= limits.max_running
        # The device runs steps in order, so what it samples is known here; the batcher hears of it later.
        # After one that fails it is of no consequence what the worker makes of those that follow.
        poisonous = any(
            self.sequences[id].computed > self.poison.get(id, 1000) for id in self.batcher.draft_of(plan).ids
        )
        fails = any(result is None for _, result, _ in self.in_flight) or poisonous
        self.in_flight.append((plan, None if fails else self.worker.run(plan, self.sample), poisonous))

    def check_that_nothing_shared_is_written(self, plan):
        draft, size = self.batcher.draft_of(plan), self.batcher.pool.block_size
        written = [(sequence, sequence.computed - 1, sequence.computed) for sequence in draft.decoders]
        written += [
            (sequence, row.start, row.start + row.length)
            for (sequence, _), row in zip(draft.owners, draft.rows, strict=True)
        ]
        holders = Counter(block for sequence in self.batcher.running.values() for block in sequence.blocks)
        for sequence, start, end in written:
            assert all(holders[block] == 1 for block in sequence.blocks[start // size : -(-end // size)])
        assert all(holders[target] == 1 for _, target in plan.copies)

    def fail(self, *, lost):
        """The step whose result is due failed; the one at fault is given up the second time it is caught alone."""
        _, _, poisonous = self.in_flight[0]
        slots = {slot for plan, _, _ in self.in_flight for slot in slots_of(plan)}
        self.in_flight.clear()
        failed = self.batcher.fail(lost=lost)
        if lost:
            self.worker = Worker(self.batcher.pool.block_size)
        else:
            self.worker.damage(slots)
        if poisonous and len(failed) == 1 and failed[0].failures >= 2:
            assert failed[0].id in self.poison
            self.batcher.end(failed[0].id)
            self.ended.add(failed[0].id)

    @precondition(lambda self: self.in_flight)
    @rule(lost=st.booleans())
    def transient_failure(self, lost):
        self.fail(lost=lost)

    @precondition(lambda self: self.in_flight)
    @rule()
    def apply(self):
        if self.in_flight[0][1] is None:
            self.fail(lost=False)
            return
        plan, result, _ = self.in_flight.popleft()
        free = self.batcher.pool.num_free
        tokens, verdicts, sums = result
        draft = self.batcher.draft_of(plan)
        events = self.batcher.apply(plan.step, tokens, verdicts)
        self.take_sums(draft, sums)
        for event in events:
            assert event.id not in self.ended
            self.emitted[event.id].append(event.token)
            if event.finish:
                self.ended.add(event.id)
                assert self.sequences[event.id].blocks == []
        finished_running = [event for event in events if event.finish]
        assert self.batcher.pool.num_free >= free
        if finished_running and self.ahead == 1:
            shared = self.batcher.pool.num_blocks - self.batcher.pool.num_free
            assert self.batcher.pool.num_free > free or shared, "an ended sequence frees its blocks in that iteration"

    def take_sums(self, draft, sums):
        """What is only prefilled ends once it is computed, all of it in one go where its mean is wanted."""
        for (sequence, _), row, part in zip(draft.owners, draft.rows, sums, strict=True):
            before = self.sums.get(sequence.id, 0) if row.start else 0
            self.sums[sequence.id] = before + part
        for sequence in draft.prefills:
            assert sequence.id not in self.ended
            assert not sequence.generates
            assert sequence.blocks == []
            self.ended.add(sequence.id)
            if sequence.sampling.pooling == "mean":
                assert self.sums[sequence.id] == sum(sequence.tokens)

    @rule(steps=st.integers(1, 6))
    def run(self, steps):
        """Steps without an incident between them, as many planned ahead as may be."""
        for _ in range(steps):
            for _ in range(self.ahead):
                self.plan()
            if self.in_flight:
                self.apply()

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def cancel(self, data):
        id = data.draw(st.sampled_from(sorted(self.sequences)))
        ended = self.batcher.end(id)
        assert (ended is None) == (id in self.ended)
        self.ended.add(id)

    @rule()
    def crash(self):
        self.in_flight.clear()
        self.worker = Worker(self.batcher.pool.block_size)
        self.batcher.restart()
        assert self.batcher.pool.num_free == self.batcher.pool.num_blocks

    @invariant()
    def blocks_are_conserved_and_shared_only_for_the_same_beginning(self):
        if not hasattr(self, "batcher"):
            return
        pool = self.batcher.pool
        owners: dict[int, list[tuple[Sequence, int]]] = {}
        for sequence in self.batcher.running.values():
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            assert sequence.room == len(sequence.blocks) * pool.block_size >= sequence.computed
            assert 0 <= sequence.drafted <= sequence.unseen, "what may be rejected is still to come"
            assert sequence.computed < sequence.planned_len + (not sequence.generates) <= sequence.end_len + 1
            for index, block in enumerate(sequence.blocks):
                owners.setdefault(block, []).append((sequence, index))
        assert len(owners) + pool.num_free == pool.num_blocks
        for holders in owners.values():
            ends = {(index + 1) * pool.block_size for _, index in holders}
            contents = {tuple(sequence.tokens[: max(ends)]) for sequence, _ in holders}
            assert len(ends) == len(contents) == 1, "only the same beginning is shared"
            public = all(sequence.public_len >= max(ends) for sequence, _ in holders)
            assert public or len({sequence.tenant for sequence, _ in holders}) == 1, "and only within a tenant"
        for sequence in self.sequences.values():
            if sequence.state is not State.RUNNING:
                assert sequence.blocks == []
                assert sequence.slot == -1

    @invariant()
    def every_text_is_what_it_would_be_alone(self):
        if not hasattr(self, "batcher"):
            return
        for id, sequence in self.sequences.items():
            kv = sequence.tokens[: sequence.prompt_len]
            for token in self.emitted[id]:
                assert token == self.sample(kv, sequence.sampling.seed)
                kv.append(token)
            assert sequence.output == self.emitted[id]

    def teardown(self):
        """Whatever happened, everything left ends within the steps its tokens need."""
        if not hasattr(self, "batcher"):
            return
        while self.in_flight:
            self.apply()
        work = sum(len(sequence.tokens) + sequence.max_tokens for sequence in self.sequences.values())
        for _ in range(20 * work + 20):
            if not len(self.batcher):
                break
            self.run(1)
        assert not len(self.batcher), "no history may end in a standstill"
        assert self.ended == set(self.sequences)


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
