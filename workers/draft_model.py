"""A draft model: a smaller one that guesses what the model will say."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from protocol.plan import Verification
from workers.attention import AttentionBackend
from workers.drafts import Drafter
from workers.forward import forward
from workers.greedy import greedy
from workers.model import Model
from workers.slots import Inputs, Slots, Spans


class DraftModel(Drafter):
    """A smaller model of the same vocabulary, with a KV cache of its own behind the same block tables.

    It computes all that the model computes, so whatever block is found, freed or given on holds both models' KV of the same
    tokens, and there is nothing else to keep account of. ``backend`` must have as many blocks as the model's. ``agree``: as the
    runner's.
    """

    def __init__(
        self, model: Model, backend: AttentionBackend, *, agree: Callable[[Tensor], object] | None = None
    ) -> None:
        self._module = model.module
        self._backend = backend
        self._agree = agree

    def draft(self, slots: Slots, verifications: list[Verification]) -> list[int]:
        """Greedily, one pass for each place; a slot that wants fewer drafts drops out."""
        for depth in range(max(each.drafts for each in verifications)):
            wanting = [each.slot for each in verifications if each.drafts > depth]
            positions = slots.computed(wanting) + depth
            spans = Spans(np.array(wanting), positions, np.ones_like(positions))
            inputs = slots.ragged(spans, np.arange(len(wanting)))
            tokens = greedy(forward(self._module, self._backend, inputs))
            if self._agree is not None:
                self._agree(tokens)
            slots.tokens[inputs.slots, inputs.positions + 1] = tokens.int()
        return [each.drafts for each in verifications]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        self._backend.copy(sources, targets)

    def follow(self, inputs: Inputs) -> None:
        """Compute the same, the last draft included, of which `draft` left no KV."""
        nothing = torch.empty(0, dtype=torch.int64, device=inputs.ids.device)
        forward(self._module, self._backend, inputs, nothing, whole=False)
