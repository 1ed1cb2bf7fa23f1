"""Log probabilities of tokens, for the slots that ask: of those that are sampled, and of those of the prompt."""

import torch
from torch import Tensor

from protocol.plan import Sampling, Scored

#: What OpenAI's API says for "very unlikely": infinity and what is no number have no place in JSON.
_LEAST = -9999.0


def score(logits: Tensor, tokens: Tensor, most: list[int]) -> list[Scored]:
    """Rate a token in each row: the model's own logits ``[n, V]``, tokens int64 ``[n]``, how many of the likeliest to tell."""
    logprobs = logits.float().log_softmax(dim=-1)
    own = logprobs.gather(-1, tokens[:, None])
    ranks = (logprobs > own).sum(dim=-1) + 1
    values, likeliest = logprobs.topk(min(max(most), logits.shape[-1]), dim=-1)
    values, own = (torch.nan_to_num(part, nan=_LEAST, neginf=_LEAST) for part in (values, own[:, 0]))
    columns = zip(tokens.tolist(), own.tolist(), ranks.tolist(), likeliest.tolist(), values.tolist(), most, strict=True)
    return [
        Scored(token, logprob, rank, list(zip(ids[:number], tops[:number], strict=True)))
        for token, logprob, rank, ids, tops, number in columns
    ]


class Scores:
    """Which slots ask, and for how many of the likeliest tokens. ``output`` and ``prompt``: by slot."""

    def __init__(self) -> None:
        self.output: dict[int, int] = {}
        self.prompt: dict[int, int] = {}

    def assign(self, slot: int, sampling: Sampling) -> None:
        """From now on the slot's sequence has these parameters."""
        for asked, number in ((self.output, sampling.logprobs), (self.prompt, sampling.prompt_logprobs)):
            asked.pop(slot, None)
            if number is not None:
                asked[slot] = number

    def sampled(self, logits: Tensor, slots: list[int], tokens: Tensor) -> dict[int, Scored]:
        """Of one sampled token per row those that are asked for, by row: logits ``[n, V]``, tokens int64 ``[n]``."""
        rows = [row for row, slot in enumerate(slots) if slot in self.output] if self.output else []
        if not rows:
            return {}
        return dict(
            zip(rows, score(logits[rows], tokens[rows], [self.output[slots[row]] for row in rows]), strict=True)
        )
