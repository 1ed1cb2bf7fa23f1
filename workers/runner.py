"""Executes one plan: ragged inputs, one forward pass over all rows, one sampled token for each row that asks for it.

Where a plan lets the worker speculate, the drafts stand in the slot's history behind its last token, so they are computed like
any other tokens; each place is sampled as if it were the last. Logits are made where a token is sampled and, a few at a time,
where a prompt's tokens are scored.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from protocol.plan import Scored, StepPlan, StepResult, Verdict
from workers.attention import AttentionBackend
from workers.drafts import Drafter, judge
from workers.forward import forward
from workers.grammar import Grammars, Mask
from workers.graphs import DecodeGraphs, decodes_alone
from workers.hidden import HiddenStates
from workers.lora import Adapters
from workers.pooling import Poolings
from workers.sampler import Sampler
from workers.scores import Scores, Stretch
from workers.slots import Drawn, Slots
from workers.transfer import send


class Runner:
    """One model, its KV cache and the slots of the sequences that are running. ``agree``: makes sampled tokens, int64 ``[n]``, in
    place, those of all who run the same steps."""

    def __init__(
        self,
        module: PreTrainedModel,
        backend: AttentionBackend,
        *,
        hidden: HiddenStates,
        grammars: Grammars,
        max_running: int,
        max_model_len: int,
        adapters: Adapters | None = None,
        drafter: Drafter | None = None,
        agree: Callable[[Tensor], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        blocks = -(-max_model_len // backend.block_size)
        self._module = module
        self._backend = backend
        self._slots = Slots(max_running, blocks, backend.block_size, backend.device)
        self._sampler = Sampler(max_running, backend.device)
        self._hidden = hidden
        self._scores = Scores()
        self._poolings = Poolings()
        self._grammars = grammars
        self._drafter = drafter
        self._adapters = adapters
        self._agree = agree
        self._clock = clock
        self._graphs: DecodeGraphs | None = None

    def capture(self) -> None:
        """From now on replay decodes from graphs. Raises RuntimeError where that can't be."""
        if self._drafter is not None:
            raise RuntimeError("decodes that may be drafted for aren't captured")
        if self._agree is not None:
            raise RuntimeError("steps of a model that several ranks share aren't captured")
        self._graphs = DecodeGraphs(self._module, self._backend, self._slots)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run one step; the copy of what was sampled is the only wait for the device."""
        begun = self._clock()
        self._admit(plan)
        if plan.copies:
            self._copy(plan.copies)
        drafted, ahead = self._draft(plan)
        for admission in plan.admissions:  # compiling them comes after what the drafts need of the same thread
            self._grammars.assign(admission)
        slots = _sampling(plan, drafted)
        mask = self._grammars.mask(slots, ahead)
        logits, drawn = self._compute(plan, drafted)
        hidden = self._hidden.newest()
        sampled = self._sample(plan, drafted, slots, drawn, logits, mask) if slots else ([], {}, [])
        tokens, scored, verdicts = sampled
        pooled = self._poolings.pool(plan, hidden)
        prompts = self._score(self._scores.stretches(plan), hidden)
        seconds = self._clock() - begun
        return StepResult(plan.step, tokens, seconds, scored=scored, prompts=prompts, pooled=pooled, verdicts=verdicts)

    def _admit(self, plan: StepPlan) -> None:
        """Take in what the plan says of slots and their blocks."""
        for admission in plan.admissions:
            self._slots.admit(admission)
            self._sampler.assign(admission.slot, admission.sampling)
            self._scores.assign(admission)
            self._poolings.assign(admission)
            if self._adapters:
                self._adapters.assign(admission.slot, admission.adapter)
        self._slots.extend((*plan.rows, *plan.verifications))

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        (pairs,) = send([np.array(copies, dtype=np.int64)], self._backend.device)
        sources, targets = pairs.unbind(dim=1)
        for keeper in (self._backend, self._drafter):
            if keeper is not None:
                keeper.copy(sources, targets)

    def _draft(self, plan: StepPlan) -> tuple[list[int], dict[int, list[int]]]:
        """How many tokens were drafted for each verification; and, of the slots that have a grammar, those which it allows."""
        if not plan.verifications:
            return [], {}
        assert self._drafter is not None, "only who drafts is asked to"
        drafted = self._drafter.draft(self._slots, plan.verifications)
        slots = [verification.slot for verification in plan.verifications]
        ahead = {
            slot: self._slots.drafts(slot, count)
            for slot, count in zip(slots, drafted, strict=True)
            if count and slot in self._grammars
        }
        if ahead:
            ahead = self._grammars.check(ahead)
            drafted = [len(ahead[slot]) if slot in ahead else count for slot, count in zip(slots, drafted, strict=True)]
        return drafted, ahead

    def _compute(self, plan: StepPlan, drafted: list[int]) -> tuple[Tensor, Drawn]:
        """The forward pass; logits ``[n, V]`` of the tokens after which one is sampled."""
        adapted = self._adapters.use(*_slots_and_lengths(plan, drafted)) if self._adapters else False
        # A replay leaves no hidden states; who samples asks for none.
        if self._graphs is not None and not adapted and decodes_alone(plan):
            return self._graphs.replay(self._slots.advance(plan))
        inputs = self._slots.inputs(plan, drafted)
        if self._drafter is not None:
            self._drafter.follow(inputs)
        whole = self._poolings.asked(plan) or bool(self._scores.stretches(plan))
        return forward(self._module, self._backend, inputs, inputs.drawn, whole=whole), inputs.select()

    def _sample(
        self,
        plan: StepPlan,
        drafted: list[int],
        slots: list[int],
        drawn: Drawn,
        logits: Tensor,
        mask: Mask | None,
    ) -> tuple[list[int], dict[int, Scored], list[Verdict]]:
        """One token of the ``slots`` after each of those ``drawn``, by these logits ``[n, V]``; with those the history goes
        on."""
        plain = plan.num_sampled
        rows = self._slots.rows(slots, drawn)
        tokens = self._sampler.sample(logits if mask is None else mask.apply(logits), rows)
        if self._agree is not None:
            self._agree(tokens)
        self._slots.tokens[rows.index, rows.positions] = tokens.int()
        scored = self._scores.sampled(logits[:plain], slots[:plain], tokens[:plain])
        sampled, computed = torch.stack([tokens, drawn.ids]).tolist() if drafted else (tokens.tolist(), [])
        told = sampled if mask is None else mask.told(sampled)
        verdicts = self._judge(plan, drafted, told[plain:], computed[plain:])
        if mask is not None:
            verified = zip(plan.verifications, verdicts, strict=True)
            self._grammars.advance(zip(slots[:plain], ([token] for token in told[:plain]), strict=True))
            self._grammars.advance((verification.slot, verdict.tokens) for verification, verdict in verified)
        return told[:plain], scored, verdicts

    def _score(self, stretches: list[Stretch], hidden: Tensor) -> dict[int, list[Scored]]:
        return {
            stretch.row: stretch.score(hidden, self._hidden.logits, self._slots.tokens[stretch.slot])
            for stretch in stretches
        }

    def _judge(self, plan: StepPlan, drafted: list[int], sampled: list[int], computed: list[int]) -> list[Verdict]:
        """``sampled`` after each of the ``computed`` tokens: of each verification the slot's last one, then its drafts."""
        verdicts, start = [], 0
        for verification, drafts in zip(plan.verifications, drafted, strict=True):
            end = start + 1 + drafts
            verdict = judge(sampled[start:end], computed[start + 1 : end])
            self._slots.roll_back(verification.slot, drafts - verdict.accepted)
            verdicts.append(verdict)
            start = end
        return verdicts


def _sampling(plan: StepPlan, drafted: list[int]) -> list[int]:
    """Whose each token is that is sampled: first one each, in the order in which a result tells of them, then those of each
    verification."""
    slots = plan.decodes + [row.slot for row in plan.rows if row.sample]
    for verification, drafts in zip(plan.verifications, drafted, strict=True):
        slots += [verification.slot] * (1 + drafts)
    return slots


def _slots_and_lengths(plan: StepPlan, drafted: list[int]) -> tuple[list[int], list[int]]:
    """Of every row of the ragged batch."""
    slots = plan.decodes + [row.slot for row in plan.rows] + [each.slot for each in plan.verifications]
    return slots, [1] * len(plan.decodes) + [row.length for row in plan.rows] + [1 + drafts for drafts in drafted]
