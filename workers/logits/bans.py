"""Tokens that may not come now: an end that is too early, the last token of a bad word."""

import torch
from torch import Tensor

from protocol.plan import Sampling
from workers.logits.base import Processor, Rows


class MinTokens(Processor):
    """No stop token before the output has its least length. Source: transformers' MinNewTokensLengthLogitsProcessor."""

    fields = ("min_tokens",)

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        self._stops: dict[int, Tensor] = {}

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.min_tokens and sampling.stop_ids)

    def keep(self, slot: int, sampling: Sampling) -> None:
        super().keep(slot, sampling)
        self._stops[slot] = torch.tensor(sampling.stop_ids, device=self.device)

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        # Whether it is still too early is known to the device alone, so a slot goes on asking when it no longer is.
        early = rows.positions - rows.prompt_len[rows.index] < self.values["min_tokens"][rows.index]
        bans = torch.where(early, -torch.inf, 0.0)
        for row, slot in enumerate(rows.slots):
            stops = self._stops[slot]
            logits[row].index_add_(0, stops, bans[row].expand(len(stops)))
        return logits


class BadWords(Processor):
    """No token that completes one of a request's token sequences, which may begin in the prompt.

    Source: transformers' NoBadWordsLogitsProcessor.
    """

    #: Stands in place of tokens before a word's first.
    _ANY = -1

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        # By slot, words aligned to the right: int32 [words, longest].
        self._words: dict[int, Tensor] = {}

    @staticmethod
    def wanted(sampling: Sampling) -> bool:
        return bool(sampling.bad_words)

    def keep(self, slot: int, sampling: Sampling) -> None:
        longest = max(map(len, sampling.bad_words))
        aligned = [(self._ANY,) * (longest - len(word)) + word for word in sampling.bad_words]
        self._words[slot] = torch.tensor(aligned, dtype=torch.int32, device=self.device)

    def change(self, logits: Tensor, rows: Rows) -> Tensor:
        for row, slot in enumerate(rows.slots):
            beginnings, ends = self._words[slot].tensor_split([-1], dim=-1)
            at = rows.positions[row] + torch.arange(-beginnings.shape[-1], 0, device=logits.device)
            there = (beginnings == rows.history[slot, at.clamp(min=0)]) & (at >= 0)
            bans = torch.where((there | (beginnings == self._ANY)).all(dim=-1), -torch.inf, 0.0)
            logits[row].index_add_(0, ends[:, 0], bans)
        return logits
