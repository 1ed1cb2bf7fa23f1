"""Log probabilities of tokens, for the slots that ask: of those that are sampled, and of those of the prompt."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from protocol.plan import Admission, Scored, StepPlan

#: What OpenAI's API says for "very unlikely": infinity and what is no number have no place in JSON.
_LEAST = -9999.0
#: Places of a prompt whose logits are in memory at once.
_AT_ONCE = 64


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


@dataclass(frozen=True, slots=True)
class Stretch:
    """Prompt tokens to be scored in a step: those after each of the ``length`` positions from ``start`` on, which are in the
    plan's row ``row`` and begin at ``offset`` among all that the step computes. ``most``: how many of the likeliest to tell.
    """

    row: int
    slot: int
    start: int
    length: int
    offset: int
    most: int

    def score(self, hidden: Tensor, head: Callable[[Tensor], Tensor], history: Tensor) -> list[Scored]:
        """From the step's hidden states ``[T, H]``, what makes logits of some, and its slot's tokens."""
        places = hidden[self.offset : self.offset + self.length].split(_AT_ONCE)
        tokens = history[self.start + 1 : self.start + 1 + self.length].long().split(_AT_ONCE)
        return [
            scored
            for states, after in zip(places, tokens, strict=True)
            for scored in score(head(states), after, [self.most] * len(after))
        ]


class Scores:
    """Which slots ask for scores, and for how many of the likeliest tokens."""

    def __init__(self) -> None:
        self._output: dict[int, int] = {}
        self._prompt: dict[int, tuple[int, int, int]] = {}

    def assign(self, admission: Admission) -> None:
        """The slot's new sequence has these parameters."""
        slot, sampling = admission.slot, admission.sampling
        self._output.pop(slot, None)
        self._prompt.pop(slot, None)
        if sampling.logprobs is not None:
            self._output[slot] = sampling.logprobs
        if sampling.prompt_logprobs is not None:
            self._prompt[slot] = sampling.prompt_logprobs, sampling.score_from - 1, admission.prompt_len - 1

    def sampled(self, logits: Tensor, slots: list[int], tokens: Tensor) -> dict[int, Scored]:
        """Of one sampled token per row those that are asked for, by row: logits ``[n, V]``, tokens int64 ``[n]``."""
        rows = [row for row, slot in enumerate(slots) if slot in self._output] if self._output else []
        if not rows:
            return {}
        return dict(
            zip(rows, score(logits[rows], tokens[rows], [self._output[slots[row]] for row in rows]), strict=True)
        )

    def stretches(self, plan: StepPlan) -> list[Stretch]:
        """The parts of prompts that a plan computes and somebody asks for."""
        if not self._prompt:
            return []
        found = []
        offset = len(plan.decodes)
        for number, row in enumerate(plan.rows):
            most, first, end = self._prompt.get(row.slot, (0, 0, 0))
            start = max(row.start, first)
            length = min(row.start + row.length, end) - start
            if length > 0:
                found.append(Stretch(number, row.slot, start, length, offset + start - row.start, most))
            offset += row.length
        return found
