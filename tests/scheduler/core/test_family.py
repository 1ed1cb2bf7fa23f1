"""Several texts from one prompt: computed once, its blocks shared, what a text writes copied first; whoever ends or fails."""

import pytest

from protocol.plan import Sampling
from scheduler.core import policies
from scheduler.core.batcher import Batcher, CapacityError
from scheduler.core.draft import Draft
from scheduler.core.sequence import Sequence, State
from tests.scheduler.core.drive import EOS, TOKEN, make, sequence


def family(batcher: Batcher, count: int, prompt: int = 18, max_tokens: int = 8, **keywords) -> list[Sequence]:
    """Submit so many sequences of tenant a with one prompt."""
    members = [sequence(f"a/{number}", prompt, max_tokens, **keywords) for number in range(count)]
    batcher.submit(*members)
    return members


def step(batcher: Batcher) -> Draft:
    plan = batcher.plan()
    assert plan is not None
    draft = batcher.draft_of(plan)
    batcher.apply(plan.step, [TOKEN] * plan.num_sampled)
    return draft


def finish(batcher: Batcher) -> list[Draft]:
    """Until all have ended."""
    drafts = []
    while len(batcher):
        drafts.append(step(batcher))
    assert batcher.pool.num_free == batcher.pool.num_blocks
    return drafts


def prefilled(*drafts: Draft) -> int:
    """Tokens of prompts that were computed."""
    return sum(draft.prefilled for draft in drafts)


@pytest.mark.parametrize("policy", ["fair", "chunked", "orca"])
@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 16, 18])
def test_eight_texts_compute_their_prompt_once_and_share_what_it_fills(prompt, cache, policy):
    batcher = make(policy, running=8, budget=32, blocks=64, cache=cache)
    members = family(batcher, 8, prompt)
    first = step(batcher)
    assert [member.state for member in members] == [State.RUNNING] + [State.WAITING] * 7
    second = step(batcher)
    assert [len(member.output) for member in members] == [2] + [1] * 7
    assert prefilled(first, second) == prompt + 7, "the last token by each, for its logits"
    full = (prompt - 1) // 4
    assert len({tuple(member.blocks[:full]) for member in members}) == 1
    own = [block for member in members for block in member.blocks[full:]]
    assert len(set(own)) == len(own)
    copies = [(members[0].blocks[full], member.blocks[full]) for member in members[1:]]
    assert sorted(second.copies) == (sorted(copies) if (prompt - 1) % 4 else []), "no full block is copied"
    assert prefilled(*finish(batcher)) == 0
    counters = batcher.counters
    assert counters.cached_tokens + counters.forked_tokens == 7 * (prompt - 1)
    assert cache or not counters.cached_tokens
    assert batcher.queue.served("a") == prompt + 2 * 8 * 8, "the prompt is charged once, each token of every text"


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("running", [1, 2, 3])
def test_more_texts_than_slots_take_turns_at_one_prompt(running, cache):
    batcher = make(running=running, budget=32, blocks=64, cache=cache)
    family(batcher, 8)
    assert prefilled(*finish(batcher)) == 18 + 7


@pytest.mark.parametrize("cache", [False, True])
def test_who_ends_at_once_leaves_the_prompt_to_the_others(cache):
    batcher = make(running=8, budget=32, cache=cache)
    family(batcher, 8, max_tokens=1)
    first, second = finish(batcher)
    assert (prefilled(first), prefilled(second)) == (18, 7)


def test_what_is_shared_needs_no_room_of_its_own():
    batcher = make(running=8, budget=32, blocks=5 + 8 + 8)
    members = family(batcher, 8, prompt=20, max_tokens=4)
    step(batcher)
    step(batcher)
    assert all(member.state is State.RUNNING for member in members), "eight prompts of their own would fill 40 blocks"
    finish(batcher)
    assert batcher.counters.preemptions == 0


def test_the_prompt_is_given_up_where_others_need_the_room():
    batcher = make(running=1, budget=32, blocks=7)
    family(batcher, 3, prompt=9, max_tokens=4)
    first = step(batcher)
    batcher.submit(sequence("b/1", 16, 8))
    assert prefilled(first, *finish(batcher)) == 16 + 9 + 9 + 1, (
        "b's turn came after the first text, and it needed all the blocks"
    )


def test_others_of_the_tenant_wait_behind_the_texts_of_an_earlier_request():
    batcher = make(running=2, budget=32)
    family(batcher, 4)
    batcher.submit(sequence("a/later", 4, 8))
    seen = []
    for draft in finish(batcher):
        seen += [id for id in draft.ids if id not in seen]
    assert seen == ["a/0", "a/later", "a/1", "a/2", "a/3"], "only while the prompt was being computed was there room"


def test_a_text_that_was_preempted_forks_again():
    batcher = make(running=4, budget=32, blocks=10, longest=40)
    members = family(batcher, 4, prompt=18, max_tokens=12)
    drafts = finish(batcher)
    assert batcher.counters.preemptions > 0
    assert prefilled(*drafts) < 18 + 3 + 12 * batcher.counters.preemptions, "its own tokens only"
    assert [len(member.output) for member in members] == [12] * 4


def test_a_step_that_failed_may_have_copied_nothing():
    batcher = make(running=4, budget=32)
    members = family(batcher, 3)
    step(batcher)
    batcher.plan()
    batcher.fail(lost=False)
    assert [member.state for member in members] == [State.RUNNING, State.WAITING, State.WAITING]
    drafts = finish(batcher)
    assert sum(len(draft.copies) for draft in drafts) == 2
    assert prefilled(*drafts) == 2


def test_after_a_worker_is_lost_one_of_them_computes_the_prompt_again():
    batcher = make(running=4, budget=64)
    members = family(batcher, 4)
    for _ in range(3):
        step(batcher)
    batcher.restart()
    assert prefilled(*finish(batcher)) == 18 + sum((3, 2, 2, 2)), "and each what it had written"
    assert [member.output for member in members] == [[TOKEN] * 8] * 4


def test_a_text_can_be_taken_out_whatever_it_is_doing():
    batcher = make(running=2, budget=8)
    members = family(batcher, 4)
    step(batcher)
    assert batcher.end("a/3").state is State.ENDED, "while it waits for the prompt"
    assert batcher.end("a/0").state is State.ENDED, "while it computes it"
    while members[1].state is State.WAITING or not members[1].output:
        step(batcher)
    batcher.end("a/2")
    assert batcher.end("a/1").output
    assert len(batcher) == 0
    assert batcher.pool.num_free == batcher.pool.num_blocks


def test_one_token_that_ends_a_text_ends_no_other():
    batcher = make(running=4, budget=32)
    members = family(batcher, 3)
    step(batcher)
    plan = batcher.plan()
    batcher.apply(plan.step, [EOS, TOKEN, TOKEN])
    assert [member.state for member in members] == [State.ENDED, State.RUNNING, State.RUNNING]
    finish(batcher)


def test_only_who_scores_the_prompt_computes_all_of_it():
    batcher = make(running=4, budget=32, cache=True)
    scoring = sequence("a/0", 18, 2, sampling=Sampling(prompt_logprobs=0))
    batcher.submit(scoring, sequence("a/1", 18, 2), sequence("a/2", 18, 2))
    assert prefilled(*finish(batcher)) == 18 + 2


@pytest.mark.parametrize("policy", policies.NAMES)
def test_what_siblings_share_is_found_by_later_requests(policy):
    batcher = make(policy, running=4, budget=32, cache=True)
    family(batcher, 3)
    finish(batcher)
    batcher.submit(sequence("a/later", 18, 2))
    assert prefilled(*finish(batcher)) == 2


def test_every_text_is_found_by_who_goes_on_from_it():
    batcher = make(running=4, budget=32, blocks=64, cache=True)
    members = family(batcher, 3, max_tokens=16)
    while len(batcher):
        plan = batcher.plan()
        batcher.apply(plan.step, [100 + sampler.slot for sampler in batcher.draft_of(plan).samplers])
    assert len({tuple(member.tokens) for member in members}) == 3
    for member in members:
        turn = sequence("a/turn", [*member.tokens, 5], 1)
        assert batcher.pool.cached_len(turn) == (len(member.tokens) - 1) // 4 * 4


def test_all_are_refused_or_none():
    batcher = make(blocks=4, size=4)
    batcher.submit(sequence("a/1", 4, 4))
    with pytest.raises(ValueError, match="a/1 is here already"):
        family(batcher, 3, prompt=4, max_tokens=4)
    with pytest.raises(CapacityError):
        batcher.submit(sequence("b/1", 16, 1), sequence("b/2", 16, 1))
    assert len(batcher) == 1
