"""What a request may have done to its logits before its next token is drawn."""

import torch

from workers.logits.bans import BadWords, MinTokens
from workers.logits.base import Processor, Rows
from workers.logits.bias import LogitBias
from workers.logits.filters import MinP, Temperature, TopKTopP, TypicalP
from workers.logits.penalties import OutputPenalties, RepetitionPenalty

__all__ = ["Processor", "Rows", "processors"]

#: In the order of transformers' `generate`; the penalties that it lacks stand beside the one that it has.
_KINDS: list[type[Processor]] = [
    LogitBias,
    RepetitionPenalty,
    OutputPenalties,
    BadWords,
    MinTokens,
    Temperature,
    TopKTopP,
    MinP,
    TypicalP,
]


def processors(slots: int, device: torch.device) -> list[Processor]:
    """One of each, for so many slots, in the order in which they apply."""
    return [kind(slots, device) for kind in _KINDS]
