"""A model cut in two: its last hidden states, and the head that makes logits of them."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class HiddenStates:
    """What a model's decoder computes, after its final norm: the ``last_hidden_state`` of transformers' AutoModel.

    Made once for a model: it hears of every forward pass.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        self._module = module
        base: Any = module.base_model
        self._decoder: nn.Module = base.get_decoder()
        self._decoder.register_forward_hook(self._hear)
        self._output: Any = None

    @property
    def size(self) -> int:
        """How many numbers each has."""
        return self.newest().shape[-1]

    def newest(self) -> Tensor:
        """Of the last forward pass: ``[T, H]``, for all its tokens, in the model's dtype."""
        hidden: Tensor = self._output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of any of them: ``[n, H]`` -> ``[n, V]``."""
        output = copy.copy(self._output)
        output.last_hidden_state = hidden[None]
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
        # The model's own forward may scale or cap its logits, so it runs, and its decoder only hands over what is there.
        forward = self._decoder.forward
        self._decoder.forward = lambda *_, **__: output
        try:
            logits: Tensor = self._module(input_ids=ids, use_cache=False).logits[0]
        finally:
            self._decoder.forward = forward
        return logits

    def _hear(self, _module: nn.Module, _inputs: object, output: object) -> None:
        self._output = output
