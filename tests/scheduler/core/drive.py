"""Batchers and sequences for tests, and steps through a worker that always samples the same token."""

from scheduler.core import policies
from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher, TokenEvent
from scheduler.core.blocks import BlockPool
from scheduler.core.sequence import Sequence
from scheduler.core.speculation import Speculation

EOS = 2
TOKEN = 7


def make(
    policy: str = "fair",
    *,
    running: int = 4,
    budget: int = 16,
    blocks: int = 32,
    size: int = 4,
    longest: int = 128,
    cache: bool = False,
    weights: dict[str, float] | None = None,
    speculation: Speculation | None = None,
) -> Batcher:
    pool = BlockPool(blocks, size, prefix_cache=cache)
    return Batcher(Limits(running, budget, longest), pool, policies.create(policy, weights), speculation)


def sequence(id: str, prompt: int | list[int], max_tokens: int = 8, **keywords) -> Sequence:
    """Of the tenant named before the slash, if there is one."""
    tokens = list(range(10, 10 + prompt)) if isinstance(prompt, int) else prompt
    return Sequence(
        id, tokens, max_tokens=max_tokens, stop_ids=frozenset({EOS}), tenant=id.rpartition("/")[0], **keywords
    )


def step(batcher: Batcher, token: int = TOKEN) -> tuple[dict[str, int], list[TokenEvent]]:
    """Plan and apply; how many tokens were computed of whom, and what came out."""
    plan = batcher.plan()
    assert plan is not None
    lengths = dict(
        zip(batcher.draft_of(plan).ids, [1] * len(plan.decodes) + [row.length for row in plan.rows], strict=True)
    )
    return lengths, batcher.apply(plan.step, [token] * plan.num_sampled)


def first_tokens(batcher: Batcher, steps: int) -> dict[str, int]:
    """In which step each sequence's first token came."""
    first: dict[str, int] = {}
    for number in range(steps):
        for event in step(batcher)[1]:
            first.setdefault(event.id, number)
    return first
