"""What a request adds to the logits of some tokens."""

import torch
from torch import Tensor

from protocol.plan import Sampling
from workers.logits.base import Processor, Rows


class LogitBias(Processor):
    """Source: OpenAI API reference, ``logit_bias``; transformers' SequenceBiasLogitsProcessor with single tokens."""

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.logit_bias)

    def keep(self, slot: int, sampling: Sampling) -> None:
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        self._biases[slot] = torch.tensor(tokens, device=self.device), torch.tensor(biases, device=self.device)

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        for row, slot in enumerate(rows.slots):
            tokens, biases = self._biases[slot]
            logits[row].index_add_(0, tokens, biases)
        return logits
