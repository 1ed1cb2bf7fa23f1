"""Executes one plan: ragged inputs, one forward pass over all rows, one sampled token for each row that asks for it."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from protocol.plan import StepPlan, StepResult
from workers.attention import AttentionBackend, Attributes
from workers.bridge import attending
from workers.grammar import Grammars, Mask
from workers.sampler import Sampler
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
        grammars: Grammars,
        max_running: int,
        max_model_len: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        blocks = -(-max_model_len // backend.block_size)
        self._module = module
        self._backend = backend
        self._slots = Slots(max_running, blocks, backend.block_size, backend.device)
        self._sampler = Sampler(max_running, backend.device)
        self._grammars = grammars
        self._clock = clock

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Run one step; the copy of the sampled tokens is the only wait for the device."""
        begun = self._clock()
        for admission in plan.admissions:
            self._slots.admit(admission)
            self._sampler.assign(admission.slot, admission.sampling)
            self._grammars.assign(admission)
        self._slots.extend(plan.rows)
        inputs = self._slots.inputs(plan)
        sampled = [*range(len(plan.decodes)), *_sampled(plan)]
        slots = plan.decodes + [row.slot for row in plan.rows if row.sample]
        mask = self._grammars.mask(slots)
        last = inputs.batch.query_start[1:][sampled].long() - 1
        logits = forward(self._module, self._backend, inputs, keep=last)
        tokens = self._sample(slots, inputs.positions[last] + 1, logits, mask) if sampled else []
        return StepResult(plan.step, tokens, self._clock() - begun)

    def _sample(self, slots: list[int], positions: Tensor, logits: Tensor, mask: Mask | None) -> list[int]:
        """``positions``: int64, where the tokens will stand."""
        if mask is not None:
            mask.apply(logits)
        tokens = self._sampler.sample(logits, slots, positions)
        self._slots.tokens[slots, positions] = tokens.int()
        result: list[int] = tokens.tolist()
        return result if mask is None else self._grammars.advance(mask, result)


def _sampled(plan: StepPlan) -> list[int]:
    """The rows that sample, counted from the first decode."""
    return [index for index, row in enumerate(plan.rows, start=len(plan.decodes)) if row.sample]
