"""When a request would be done, at the pace of the last steps. It is an estimate, and assumes that

- a step takes a fixed time and the same time more for each token in it, whatever their contexts (``Pace``);
- KV blocks suffice for ``seats`` sequences at once, and nobody is preempted;
- those ahead are alike and generate as many tokens as they may; ``Queue.ahead`` is what is left of them;
- the tenants that have something outstanding go on asking, and each gets its weight's share;
- nobody who comes later goes before this request, by a higher priority or an earlier deadline.

So it errs on the late side where others stop early, fall silent or are of unequal length, and on the early side where KV blocks
are scarce, contexts grow long, or more urgent requests follow. Where the assumptions hold it is right within a factor of two
(tests/scheduler/test_outlook.py).
"""

from dataclasses import dataclass

#: Over about so many steps the pace is averaged: some seconds to half a minute.
_MEMORY = 256


class Pace:
    """A step's time as ``fixed_s + tokens * per_token_s``: least squares, of which each step forgets a little.

    A mere average of tokens per second won't do: steps that held one token say nothing of those that hold hundreds.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._tokens = self._seconds = 0.0
        self._variance = self._covariance = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens in so long."""
        self._steps = min(self._steps + 1, _MEMORY)
        newest = 1 / self._steps
        more_tokens, more_seconds = tokens - self._tokens, seconds - self._seconds
        self._tokens += newest * more_tokens
        self._seconds += newest * more_seconds
        self._variance += newest * ((1 - newest) * more_tokens**2 - self._variance)
        self._covariance += newest * ((1 - newest) * more_tokens * more_seconds - self._covariance)

    @property
    def known(self) -> bool:
        return self._steps > 0

    @property
    def per_token_s(self) -> float:
        """Neither this nor the fixed time is negative; what steps of one size only can't tell is taken for nothing."""
        if not self._variance:
            return 0.0
        return min(max(self._covariance / self._variance, 0.0), self._seconds / self._tokens)

    @property
    def fixed_s(self) -> float:
        return self._seconds - self._tokens * self.per_token_s


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens to compute: those of prompts, many in a step, and those to generate, of each request one in a step."""

    prompt: int = 0
    output: int = 0

    def __add__(self, more: "Work") -> "Work":
        return Work(self.prompt + more.prompt, self.output + more.output)


@dataclass(frozen=True, slots=True)
class Queue:
    """What a new request finds: how many are ``outstanding`` in all, what of its own tenant goes first, and that one's share."""

    outstanding: int
    seats: int
    ahead: Work
    share: float


def estimate_s(pace: Pace, queue: Queue, own: Work) -> float:
    """Seconds until a new request is done."""
    fixed_s, token_s = pace.fixed_s, pace.per_token_s
    # A seat is free once all but ``seats - 1`` of those outstanding have ended.
    to_end = max(queue.outstanding - queue.seats + 1, 0) / max(queue.outstanding, 1)
    ahead_s = queue.ahead.prompt * token_s + queue.ahead.output * (fixed_s / queue.seats + token_s)
    # The prompt's last step gives the first token; from then on a full batch shares each step.
    batch = min(queue.outstanding + 1, queue.seats)
    own_s = fixed_s + own.prompt * token_s + max(own.output - 1, 0) * (fixed_s + batch * token_s)
    return to_end * ahead_s / queue.share + own_s
