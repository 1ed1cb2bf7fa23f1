"""One sequence: its tokens, where their KV lies, how far it is computed, and why it ended."""

from collections.abc import Iterable
from enum import Enum
from math import inf
from typing import TYPE_CHECKING, Literal

from protocol.plan import Sampling

if TYPE_CHECKING:
    from scheduler.core.family import Family

FinishReason = Literal["stop", "length"]


class State(Enum):
    """Where a sequence stands: ``waiting`` holds no blocks and no slot, ``running`` holds both, ``ended`` neither."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


class Sequence:
    """``tokens`` is the prompt, then every generated token seen so far. With ``max_tokens`` 0 there will be none: it is only
    prefilled, and has ended when its prompt is computed.

    ``computed`` counts the leading positions whose KV is computed or planned; ``unseen`` the tokens a planned step will
    sample (0 or 1 with one step in flight at a time, up to one more per step planned ahead). ``room``: tokens that its blocks
    hold. Up to position ``smooth_until`` the worker needs no news for a decode. ``drafted`` of the unseen tokens
    may be rejected: until that is known, ``computed`` and ``unseen`` are the most they can be. ``acceptance``: the share of its
    drafts that were right, lately. ``failures`` counts the steps with it that failed, since one passed. ``output`` given at the
    start was generated before, by another process.

    Within a tenant a higher ``priority`` goes first, then the earlier ``deadline`` (on any clock that all share), then the
    smaller ``number``, which its queue gives it. ``returned``: when it came, its tenant had nothing waiting and less service
    than the others. ``charged``: its prompt has been, to its tenant; ``cached`` tokens of it were found in the prefix cache
    then. The first ``public_len`` tokens may be shared with other tenants: the prefix cache knows them by ``public_salt``, what
    follows by ``salt``. ``adapter``: the one that the worker puts its tokens through, if any. ``family``: it and its siblings, if
    it has any.
    """

    __slots__ = (
        "acceptance",
        "adapter",
        "blocks",
        "cached",
        "charged",
        "computed",
        "deadline",
        "drafted",
        "end_len",
        "failures",
        "family",
        "id",
        "known_blocks",
        "max_tokens",
        "node",
        "number",
        "priority",
        "prompt_len",
        "public_len",
        "public_salt",
        "returned",
        "room",
        "salt",
        "sampling",
        "sent_blocks",
        "slot",
        "smooth_until",
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
        sampling: Sampling = Sampling(),
        output: Iterable[int] = (),
        tenant: str = "",
        priority: int = 0,
        deadline: float = inf,
        adapter: str = "",
    ) -> None:
        if not prompt or max_tokens < 0:
            raise ValueError("a sequence needs at least one prompt token, and can't generate less than none")
        self.id = id
        self.tenant = tenant
        self.priority = priority
        self.deadline = deadline
        self.adapter = adapter
        self.salt, self.public_salt = f"{tenant}:{adapter}", f":{adapter}"
        self.public_len = 0
        self.number = 0
        self.returned = False
        self.charged = False
        self.cached = 0
        self.tokens = [*prompt, *output]
        self.prompt_len = len(prompt)
        self.max_tokens = max_tokens
        self.end_len = self.prompt_len + max_tokens
        self.stop_ids = stop_ids
        self.sampling = sampling
        self.state = State.WAITING
        self.slot = -1
        self.unseen = 0
        self.drafted = 0
        self.acceptance = 0.5
        self.failures = 0
        self.family: Family | None = None
        self.release()

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
            adapter=self.adapter,
        )

    def release(self) -> None:
        """It holds no blocks; the tokens stay, to be computed again if it runs again.

        ``known_blocks`` of its blocks, up to the prefix cache's ``node``, can be found there.
        """
        self.blocks: list[int] = []
        self.room = 0
        self.computed = 0
        self.known_blocks = 0
        self.node = 0
        self.untell()

    def untell(self) -> None:
        """The worker is to be told anew of its tokens, its sampling parameters and its blocks."""
        self.told = False
        self.sent_blocks = 0
        self.smooth_until = 0

    def take_new_blocks(self) -> list[int]:
        """Those that the worker hasn't been told of, and now is: a decode within its blocks needs no more news."""
        new_blocks = self.blocks[self.sent_blocks :]
        self.sent_blocks = len(self.blocks)
        self.smooth_until = min(self.room, self.end_len - 1)
        return new_blocks

    @property
    def output(self) -> list[int]:
        """The generated tokens seen so far."""
        return self.tokens[self.prompt_len :]

    @property
    def generates(self) -> bool:
        return self.max_tokens > 0

    @property
    def reusable_len(self) -> int:
        """With how many positions computed before, by whomever, it can do without: its last token must be computed, and whatever
        else is to be scored or pooled."""
        if self.sampling.pooling == "mean":
            return 0
        if self.sampling.prompt_logprobs is not None:
            return min(self.sampling.score_from, len(self.tokens)) - 1
        return len(self.tokens) - 1

    @property
    def planned_len(self) -> int:
        """Length once every planned step has been applied."""
        return len(self.tokens) + self.unseen

    @property
    def uncomputed(self) -> int:
        """Positions that the next step could compute: 1 for a decode, more for a prefill."""
        return self.planned_len - self.computed

    @property
    def fork_len(self) -> int:
        """How much of its prompt it can have from a sibling."""
        return min(self.prompt_len, self.reusable_len)

    @property
    def rank(self) -> tuple[int, float, int]:
        """Its place within its tenant."""
        return (-self.priority, self.deadline, self.number)

    def finish_reason(self, token: int) -> FinishReason | None:
        """Why the sequence ends with its newest token, if it does."""
        if token in self.stop_ids:
            return "stop"
        return "length" if len(self.tokens) >= self.end_len else None
