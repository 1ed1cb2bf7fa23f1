"""Speculative decoding: who drafts, and what becomes of the drafts.

All ways to draft name one token for each place, so the draft distribution is a point mass, and rejection sampling (Leviathan
et al., "Fast Inference from Transformers via Speculative Decoding", ICML'23) says: accept a draft x with probability p(x), else
draw from p without x. To draw from p as if there were no draft, and accept the draft if it is what was drawn, is just that: it
is with probability p(x), and what else was drawn is distributed as p without x. It takes no draws of its own, so each place
keeps the one that its seed and position give it, and a text is the same whatever was drafted.
"""

from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

from protocol.plan import Verdict, Verification
from workers.slots import Inputs, Slots

#: Lengths of the endings that are looked up, the longest first: one token alone says too little.
_ENDINGS = (4, 3, 2)


def judge(sampled: list[int], drafts: list[int]) -> Verdict:
    """``sampled`` are one more than the drafts: each is what follows if the drafts before it are right."""
    accepted = 0
    while accepted < len(drafts) and sampled[accepted] == drafts[accepted]:
        accepted += 1
    return Verdict(len(drafts), sampled[: accepted + 1])


class Drafter(ABC):
    """Guesses what a step's verifications will sample."""

    @abstractmethod
    def draft(self, slots: Slots, verifications: list[Verification]) -> list[int]:
        """Write at most as many tokens as are asked for behind each slot's last one; returns how many."""

    @abstractmethod
    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """These blocks of the KV cache, int64 ``[n]`` each, are copied."""

    @abstractmethod
    def follow(self, inputs: Inputs) -> None:
        """The step computes these."""


class NGram(Drafter):
    """Prompt look-up: what followed the same few tokens before, in the prompt or in the output."""

    def draft(self, slots: Slots, verifications: list[Verification]) -> list[int]:
        """How many there are shapes the step, so the texts come to the host first; the device has nothing to do then."""
        texts = slots.texts([verification.slot for verification in verifications])
        found = [look_up(text, each.drafts) for text, each in zip(texts, verifications, strict=True)]
        for verification, text, drafts in zip(verifications, texts, found, strict=True):
            slots.write(verification.slot, len(text), drafts)
        return [len(drafts) for drafts in found]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """It keeps nothing of its own."""

    def follow(self, inputs: Inputs) -> None:
        """It keeps nothing of its own."""


def look_up(text: np.ndarray, most: int) -> np.ndarray:
    """What followed the longest ending of a text ``[n]`` that stands in it before: the last time that ``most`` tokens did, or
    else the first time."""
    for length in _ENDINGS:
        if length >= len(text):
            continue
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
        after = np.flatnonzero((windows == text[-length:]).all(axis=1)) + length
        if len(after):
            long = after[after + most <= len(text)]
            begin = long[-1] if len(long) else after[0]
            return text[begin : begin + most]
    return text[:0]
