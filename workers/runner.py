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
from workers.attention import AttentionBackend, Attributes
from workers.bridge import attending
from workers.drafts import Drafter, judge
from workers.grammar import Grammars, Mask
from workers.lora import Adapters
from workers.sampler import Sampler
from workers.scores import Scores, Stretch
from workers.slots import Inputs, Slots


def forward(
    module: PreTrainedModel,
    backend: AttentionBackend,
    inputs: Inputs,
    keep: Tensor,
) -> Tensor:
    """One pass over a ragged batch; logits ``[len(keep), V]`` of its tokens at ``keep``."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, attributes: Attributes) -> Tensor:
        return backend.attend(layer, query, key, value, inputs.batch, attributes)

    with attending(attend):
        output = module(
            input_ids=inputs.ids[None],
            position_ids=inputs.positions[None],
            attention_mask=None,
            use_cache=False,
            logits_to_keep=keep,
        )
    logits: Tensor = output.logits[0]
    return logits


class Runner:
    """One model, its KV cache and the slots of the sequences that are running. ``agree``: makes sampled tokens, int64 ``[n]``, in
    place, those of all who run the same steps."""

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
        agree: Callable[[Tensor], object] | None = None,
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
        self._agree = agree
        self._clock = clock

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run one step; the copy of what was sampled is the only wait for the device."""
        begun = self._clock()
        self._admit(plan)
        drafted = self._draft(plan)
        inputs = self._slots.inputs(plan, drafted)
        if self._drafter is not None:
            self._drafter.follow(inputs)
        if self._adapters:
            self._adapters.use(*_slots_and_lengths(plan, drafted))
        drawn = _drawn(plan, drafted, inputs)
        mask = self._grammars.mask(_sampled(plan))
        stretches = self._scores.stretches(plan)
        keep = torch.cat([drawn, *(stretch.kept(drawn.device) for stretch in stretches)])
        logits = forward(self._module, self._backend, inputs, keep)
        count = len(drawn)
        sampled = self._sample(plan, drafted, inputs, drawn, logits[:count], mask) if count else ([], {}, [])
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

    def _sample(
        self, plan: StepPlan, drafted: list[int], inputs: Inputs, drawn: Tensor, logits: Tensor, mask: Mask | None
    ) -> tuple[list[int], dict[int, Scored], list[Verdict]]:
        """One token after each of the tokens at ``drawn``, int64 ``[n]``, by these ``[n, V]`` logits; with those the history
        goes on."""
        slots = _sampled(plan)
        plain = len(slots)
        for verification, drafts in zip(plan.verifications, drafted, strict=True):
            slots += [verification.slot] * (1 + drafts)
        rows = self._slots.rows(slots, inputs.positions[drawn] + 1, inputs.batch.max_context_len)
        tokens = self._sampler.sample(logits if mask is None else mask.apply(logits), rows)
        if self._agree is not None:
            self._agree(tokens)
        self._slots.tokens[rows.index, rows.positions] = tokens.int()
        scored = self._scores.sampled(logits[:plain], slots[:plain], tokens[:plain])
        sampled, computed = torch.stack([tokens, inputs.ids[drawn]]).tolist() if drafted else (tokens.tolist(), [])
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


def _drawn(plan: StepPlan, drafted: list[int], inputs: Inputs) -> Tensor:
    """The tokens after which one is sampled, int64: the last of each row that samples, and all of each verification."""
    decodes = len(plan.decodes)
    rows = [*range(decodes), *(index for index, row in enumerate(plan.rows, start=decodes) if row.sample)]
    last = inputs.batch.query_start[1:][rows].long() - 1
    if not drafted:
        return last
    total = len(inputs.ids)
    return torch.cat([last, torch.arange(total - sum(drafted) - len(drafted), total, device=last.device)])
