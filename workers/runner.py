"""Executes one plan: ragged inputs, one forward pass over all rows, one sampled token for each row that asks for it.

Where a plan lets the worker speculate, the drafts stand in the slot's history behind its last token, so they are computed like
any other tokens; each place is sampled as if it were the last. Logits are kept where a token is sampled, and where a prompt's
tokens are scored.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from protocol.plan import Scored, StepPlan, StepResult, Verdict
from workers.attention import AttentionBackend
from workers.drafts import Drafter, judge
from workers.forward import forward
from workers.grammar import Grammars, Mask
from workers.graphs import DecodeGraphs, decodes_alone
from workers.lora import Adapters
from workers.sampler import Sampler
from workers.scores import Scores, Stretch
from workers.slots import Drawn, Slots


class Runner:
    """One model, its KV cache and the slots of the sequences that are running."""

    def __init__(
        self,
        module: PreTrainedModel,
        backend: AttentionBackend,
        *,
        grammars: Grammars,
        max_running: int,
        max_model_len: int,
        adapters: Adapters | None = None,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        blocks = -(-max_model_len // backend.block_size)
        self._module = module
        self._backend = backend
        self._slots = Slots(max_running, blocks, backend.block_size, backend.device)
        self._sampler = Sampler(max_running, backend.device)
        self._scores = Scores()
        self._grammars = grammars
        self._drafter = drafter
        self._adapters = adapters
        self._clock = clock
        self._graphs: DecodeGraphs | None = None

    def capture(self) -> None:
        """From now on replay decodes from graphs. Raises RuntimeError where that can't be."""
        if self._drafter is not None:
            raise RuntimeError("decodes that may be drafted for aren't captured")
        self._graphs = DecodeGraphs(self._module, self._backend, self._slots)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run one step; the copy of what was sampled is the only wait for the device."""
        begun = self._clock()
        self._admit(plan)
        drafted = self._draft(plan)
        mask = self._grammars.mask(_sampled(plan))
        stretches = self._scores.stretches(plan)
        logits, drawn = self._compute(plan, drafted, stretches)
        count = len(drawn.ids)
        sampled = self._sample(plan, drafted, drawn, logits[:count], mask) if count else ([], {}, [])
        tokens, scored, verdicts = sampled
        prompts = self._score(stretches, logits[count:])
        seconds = self._clock() - begun
        return StepResult(plan.step, tokens, seconds, scored=scored, prompts=prompts, verdicts=verdicts)

    def _admit(self, plan: StepPlan) -> None:
        """Take in what the plan says of slots and their blocks."""
        for admission in plan.admissions:
            self._slots.admit(admission)
            self._sampler.assign(admission.slot, admission.sampling)
            self._scores.assign(admission)
            self._grammars.assign(admission)
            if self._adapters:
                self._adapters.assign(admission.slot, admission.adapter)
        self._slots.extend((*plan.rows, *plan.verifications))

    def _draft(self, plan: StepPlan) -> list[int]:
        """How many tokens were drafted for each verification."""
        if not plan.verifications:
            return []
        assert self._drafter is not None, "only who drafts is asked to"
        return self._drafter.draft(self._slots, plan.verifications)

    def _compute(self, plan: StepPlan, drafted: list[int], stretches: list[Stretch]) -> tuple[Tensor, Drawn]:
        """The forward pass; logits ``[n, V]`` of the tokens after which one is sampled, then of all stretches."""
        adapted = self._adapters.use(*_slots_and_lengths(plan, drafted)) if self._adapters else False
        if self._graphs is not None and not adapted and decodes_alone(plan):
            return self._graphs.replay(self._slots.advance(plan))
        inputs = self._slots.inputs(plan, drafted)
        if self._drafter is not None:
            self._drafter.follow(inputs)
        keep = torch.cat([inputs.drawn, *(stretch.kept(inputs.drawn.device) for stretch in stretches)])
        return forward(self._module, self._backend, inputs, keep), inputs.select()

    def _sample(
        self, plan: StepPlan, drafted: list[int], drawn: Drawn, logits: Tensor, mask: Mask | None
    ) -> tuple[list[int], dict[int, Scored], list[Verdict]]:
        """One token after each of those ``drawn``, by these logits ``[n, V]``; with those the history goes on."""
        slots = _sampled(plan)
        plain = len(slots)
        for verification, drafts in zip(plan.verifications, drafted, strict=True):
            slots += [verification.slot] * (1 + drafts)
        rows = self._slots.rows(slots, drawn)
        tokens = self._sampler.sample(logits if mask is None else mask.apply(logits), rows)
        self._slots.tokens[rows.index, rows.positions] = tokens.int()
        scored = self._scores.sampled(logits[:plain], slots[:plain], tokens[:plain])
        sampled, computed = torch.stack([tokens, drawn.ids]).tolist() if drafted else (tokens.tolist(), [])
        told = sampled[:plain] if mask is None else self._grammars.advance(mask, sampled[:plain])
        return told, scored, self._judge(plan, drafted, sampled[plain:], computed[plain:])

    def _score(self, stretches: list[Stretch], logits: Tensor) -> dict[int, list[Scored]]:
        """The logits of all stretches, one after the other."""
        parts = logits.split([stretch.length for stretch in stretches]) if stretches else ()
        return {
            stretch.row: stretch.score(part, self._slots.tokens[stretch.slot])
            for stretch, part in zip(stretches, parts, strict=True)
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


def _sampled(plan: StepPlan) -> list[int]:
    """The slots that sample one token, in the order in which a result tells of them."""
    return plan.decodes + [row.slot for row in plan.rows if row.sample]


def _slots_and_lengths(plan: StepPlan, drafted: list[int]) -> tuple[list[int], list[int]]:
    """Of every row of the ragged batch."""
    slots = plan.decodes + [row.slot for row in plan.rows] + [each.slot for each in plan.verifications]
    return slots, [1] * len(plan.decodes) + [row.length for row in plan.rows] + [1 + drafts for drafts in drafted]
