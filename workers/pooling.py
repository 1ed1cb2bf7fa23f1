"""Embeddings: what is made of a prompt's hidden states, for the slots that ask."""

import torch
from torch import Tensor

from protocol.plan import Admission, Pooling, StepPlan


class Poolings:
    """Which slots ask for what."""

    def __init__(self) -> None:
        self._asked: dict[int, tuple[Pooling, int]] = {}

    def assign(self, admission: Admission) -> None:
        """The slot's new sequence has these parameters."""
        self._asked.pop(admission.slot, None)
        if admission.sampling.pooling is not None:
            self._asked[admission.slot] = admission.sampling.pooling, admission.prompt_len

    def asked(self, plan: StepPlan) -> bool:
        """Whether any of the plan's rows is of a slot that asks."""
        return any(row.slot in self._asked for row in plan.rows) if self._asked else False

    def pool(self, plan: StepPlan, hidden: Tensor) -> dict[int, bytes]:
        """What a `StepResult` tells of the plan's rows: hidden states ``[T, H]`` of all its tokens.

        A prompt's mean is summed up by who gets these, since here nothing is kept from one step to the next. In double precision,
        so that its numbers don't depend on how the prompt was cut.
        """
        if not self._asked:
            return {}
        pooled: dict[int, Tensor] = {}
        start = len(plan.decodes)
        for number, row in enumerate(plan.rows):
            end = start + row.length
            pooling, prompt_len = self._asked.get(row.slot, (None, 0))
            if pooling == "mean":
                pooled[number] = hidden[start:end].double().sum(dim=0)
            elif pooling == "last" and row.start + row.length == prompt_len:
                pooled[number] = hidden[end - 1].double()
            start = end
        if not pooled:
            return {}
        vectors = torch.stack(list(pooled.values())).cpu().numpy()
        return {number: vector.tobytes() for number, vector in zip(pooled, vectors, strict=True)}
