"""Penalties for tokens that were there before, counted in the history on the device: nothing has to be told or undone."""

import torch
from torch import Tensor

from protocol.plan import Sampling
from workers.logits.base import Processor, Rows


def counts(rows: Rows, begin: Tensor, vocab_size: int) -> Tensor:
    """How often each row's past has each token from position ``begin``, int64 ``[n]``, on: float32 ``[n, V]``."""
    past = rows.history[rows.index].long()
    at = torch.arange(past.shape[-1], device=past.device)
    counted = (at >= begin[:, None]) & (at < rows.positions[:, None])
    return torch.zeros(len(past), vocab_size, device=past.device).scatter_add_(-1, past, counted.float())


class RepetitionPenalty(Processor):
    """Divides the positive and multiplies the negative logits of every token in prompt and output.

    Source: Keskar et al., "CTRL", 2019; transformers' RepetitionPenaltyLogitsProcessor.
    """

    fields = ("repetition_penalty",)

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return sampling.repetition_penalty != 1

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        seen = counts(rows, torch.zeros_like(rows.positions), logits.shape[-1]) > 0
        penalty = self.values["repetition_penalty"][rows.index][:, None]
        return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


class OutputPenalties(Processor):
    """Takes ``presence_penalty`` off every token that the output has, and ``frequency_penalty`` each time that it has it.

    Source: OpenAI API reference, "Frequency and presence penalties".
    """

    fields = ("presence_penalty", "frequency_penalty")

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.presence_penalty or sampling.frequency_penalty)

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        found = counts(rows, rows.prompt_len[rows.index], logits.shape[-1])
        presence, frequency = (self.values[name][rows.index][:, None] for name in self.fields)
        return logits - presence * (found > 0) - frequency * found
