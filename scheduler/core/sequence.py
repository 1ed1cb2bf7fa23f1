"""One generation: its tokens, where their KV lies, how far it is computed, and why it ended."""

from collections.abc import Iterable
from enum import Enum
from math import inf
from typing import Literal

from protocol.plan import Sampling

FinishReason = Literal["stop", "length"]


class State(Enum):
    """Where a sequence stands: ``waiting`` holds no blocks and no slot, ``running`` holds both, ``ended`` neither."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Sequence:
    """``tokens`` is the prompt, then every generated token seen so far.

    ``computed`` counts the leading positions whose KV is computed or planned; ``unseen`` the tokens a planned step will
    sample (0 or 1 with one step in flight at a time, up to one more per step planned ahead). ``failures`` counts the steps
    with it that failed, since one passed. ``output`` given at the start was generated before, by another process.
    ``charged``: its prompt has been, to its tenant. Within a tenant a higher ``priority`` goes first, then the earlier
    ``deadline`` (on any clock that all share).
    """

    __slots__ = (
        "blocks",
        "charged",
        "computed",
        "deadline",
        "failures",
        "id",
        "max_tokens",
        "priority",
        "prompt_len",
        "sampling",
        "sent_blocks",
        "slot",
        "slot_has_last_token",
        "state",
        "stop_ids",
        "tenant",
        "tokens",
        "told",
        "unseen",
    )

    def __init__(
        self,
        id: str,
        prompt: list[int],
        *,
        max_tokens: int,
        stop_ids: frozenset[int] = frozenset(),
        sampling: Sampling = Sampling(),  # noqa: B008 - frozen, so one shared default is safe
        output: Iterable[int] = (),
        tenant: str = "",
        priority: int = 0,
        deadline: float = inf,
    ) -> None:
        if not prompt or max_tokens < 1:
            raise ValueError("a sequence needs at least one prompt token and one token to generate")
        self.id = id
        self.tenant = tenant
        self.priority = priority
        self.deadline = deadline
        self.charged = False
        self.tokens = [*prompt, *output]
        self.prompt_len = len(prompt)
        self.max_tokens = max_tokens
        self.stop_ids = stop_ids
        self.sampling = sampling
        self.state = State.WAITING
        self.slot = -1
        self.blocks: list[int] = []
        self.unseen = 0
        self.failures = 0
        self.restart()

    def again(self) -> "Sequence":
        """The same one, with its tokens so far, to be submitted anew."""
        return Sequence(
            self.id,
            self.tokens[: self.prompt_len],
            max_tokens=self.max_tokens,
            stop_ids=self.stop_ids,
            sampling=self.sampling,
            output=self.output,
            tenant=self.tenant,
            priority=self.priority,
            deadline=self.deadline,
        )

    def restart(self) -> None:
        """Forget what was computed; the tokens stay, to be computed again."""
        self.computed = 0
        self.untell()

    def untell(self) -> None:
        """The worker is to be told anew of its sampling parameters, its blocks and its last token."""
        self.told = False
        self.sent_blocks = 0
        self.slot_has_last_token = False

    @property
    def output(self) -> list[int]:
        """The generated tokens seen so far."""
        return self.tokens[self.prompt_len :]

    @property
    def planned_len(self) -> int:
        """Length once every planned step has been applied."""
        return len(self.tokens) + self.unseen

    @property
    def uncomputed(self) -> int:
        """Positions that the next step could compute: 1 for a decode, more for a prefill."""
        return self.planned_len - self.computed

    @property
    def is_exhausted(self) -> bool:
        """Every token it may generate is planned already."""
        return self.planned_len - self.prompt_len >= self.max_tokens

    def accept(self, token: int) -> FinishReason | None:
        """Append a sampled token; says why the sequence ends with it, if it does."""
        self.tokens.append(token)
        self.unseen -= 1
        if token in self.stop_ids:
            return "stop"
        if len(self.tokens) - self.prompt_len >= self.max_tokens:
            return "length"
        return None
