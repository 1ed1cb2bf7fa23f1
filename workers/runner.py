"""Executes one plan: ragged inputs, one forward pass over all rows, one sampled token for each row that asks for it.

Logits are kept where a token is sampled, and where a prompt's tokens are scored.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from protocol.plan import Scored, StepPlan, StepResult
from workers.attention import AttentionBackend, Attributes
from workers.bridge import attending
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
    """One model, its KV cache and the slots of the sequences that are running."""

    def __init__(
        self,
        module: PreTrainedModel,
        backend: AttentionBackend,
        *,
        max_running: int,
        max_model_len: int,
        adapters: Adapters | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        blocks = -(-max_model_len // backend.block_size)
        self._module = module
        self._backend = backend
        self._slots = Slots(max_running, blocks, backend.block_size, backend.device)
        self._sampler = Sampler(max_running, backend.device)
        self._scores = Scores()
        self._adapters = adapters
        self._clock = clock

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run one step; the copy of what was sampled is the only wait for the device."""
        begun = self._clock()
        for admission in plan.admissions:
            self._slots.admit(admission)
            self._sampler.assign(admission.slot, admission.sampling)
            self._scores.assign(admission)
            if self._adapters:
                self._adapters.assign(admission.slot, admission.adapter)
        self._slots.extend(plan.rows)
        inputs = self._slots.inputs(plan)
        if self._adapters:
            lengths = [1] * len(plan.decodes) + [row.length for row in plan.rows]
            self._adapters.use(plan.decodes + [row.slot for row in plan.rows], lengths)
        sampled = [*range(len(plan.decodes)), *_sampled(plan)]
        last = inputs.batch.query_start[1:][sampled].long() - 1
        stretches = self._scores.stretches(plan)
        keep = torch.cat([last, *(stretch.kept(last.device) for stretch in stretches)])
        logits = forward(self._module, self._backend, inputs, keep)
        tokens, scored = self._sample(plan, inputs, last, logits[: len(sampled)]) if sampled else ([], {})
        prompts = self._score(stretches, logits[len(sampled) :])
        return StepResult(plan.step, tokens, self._clock() - begun, scored=scored, prompts=prompts)

    def _sample(
        self, plan: StepPlan, inputs: Inputs, last: Tensor, logits: Tensor
    ) -> tuple[list[int], dict[int, Scored]]:
        """``last``: int64 ``[n]``, which of the step's tokens these ``[n, V]`` logits are after."""
        slots = plan.decodes + [row.slot for row in plan.rows if row.sample]
        rows = self._slots.rows(slots, inputs.positions[last] + 1, inputs.batch.max_context_len)
        tokens = self._sampler.sample(logits, rows)
        self._slots.tokens[rows.index, rows.positions] = tokens.int()
        return tokens.tolist(), self._scores.sampled(logits, slots, tokens)

    def _score(self, stretches: list[Stretch], logits: Tensor) -> dict[int, list[Scored]]:
        """The logits of all stretches, one after the other."""
        parts = logits.split([stretch.length for stretch in stretches]) if stretches else ()
        return {
            stretch.row: stretch.score(part, self._slots.tokens[stretch.slot])
            for stretch, part in zip(stretches, parts, strict=True)
        }


def _sampled(plan: StepPlan) -> list[int]:
    """The rows that sample, counted from the first decode."""
    return [index for index, row in enumerate(plan.rows, start=len(plan.decodes)) if row.sample]
