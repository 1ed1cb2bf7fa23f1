"""What the batching policy promises, case by case; test_histories.py holds it under random histories."""

import pytest

from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher, CapacityError
from scheduler.core.blocks import BlockPool, OutOfBlocks
from scheduler.core.sequence import Sequence, State

EOS = 2


def make(*, running: int = 4, budget: int = 16, blocks: int = 32, size: int = 4, longest: int = 128) -> Batcher:
    return Batcher(Limits(running, budget, longest), BlockPool(blocks, size))


def sequence(id: str, prompt: int, max_tokens: int = 8) -> Sequence:
    return Sequence(id, list(range(10, 10 + prompt)), max_tokens=max_tokens, stop_ids=frozenset({EOS}))


def step(batcher: Batcher, token: int = 7):
    plan = batcher.plan()
    assert plan is not None
    return plan, batcher.apply(plan.step, [token] * plan.num_sampled)


def test_prompts_and_decodes_share_one_budget_and_decodes_come_first():
    batcher = make(budget=8)
    batcher.submit(sequence("a", 6))
    step(batcher)
    batcher.submit(sequence("b", 20))
    plan, _ = step(batcher)
    assert plan.decodes == [0]
    assert [(row.slot, row.length) for row in plan.rows] == [(1, 7)]


def test_long_prompt_is_cut_into_chunks_and_samples_only_at_its_end():
    batcher = make(budget=8)
    batcher.submit(sequence("a", 20))
    plans = [step(batcher)[0] for _ in range(3)]
    chunks = [plan.rows[0] for plan in plans]
    assert [(chunk.start, chunk.length, chunk.sample) for chunk in chunks] == [
        (0, 8, False),
        (8, 8, False),
        (16, 4, True),
    ]
    assert [admission.tokens for plan in plans for admission in plan.admissions] == [list(range(10, 30))]


def test_what_generates_nothing_ends_with_its_prompt_and_samples_nothing():
    batcher = make(budget=8, blocks=7)
    batcher.submit(sequence("a", 20, max_tokens=0))
    batcher.submit(sequence("b", 4, max_tokens=0))
    plans = []
    for ended in ([], [], ["a", "b"]):
        plan = batcher.plan()
        draft = batcher.draft_of(plan)
        plans.append(plan)
        assert batcher.apply(plan.step, []) == []
        assert [one.id for one in draft.prefills] == ended
    assert [[(row.start, row.length, row.sample) for row in plan.rows] for plan in plans] == [
        [(0, 8, False)],
        [(8, 8, False)],
        [(16, 4, False), (0, 4, False)],
    ]
    assert batcher.pool.num_free == batcher.pool.num_blocks
    assert batcher.plan() is None
    assert batcher.queue.served("") == 24, "only input is charged"


def test_what_generates_nothing_is_taken_out_while_its_last_step_runs():
    batcher = make()
    batcher.submit(sequence("a", 4, max_tokens=0))
    plan = batcher.plan()
    draft = batcher.draft_of(plan)
    assert batcher.plan() is None, "there is nothing left to compute of it"
    batcher.end("a")
    batcher.submit(sequence("a", 4, max_tokens=0))
    batcher.apply(plan.step, [])
    assert draft.prefills == [], "the new one of that name hasn't run"
    assert len(batcher) == 1


def test_what_generates_nothing_is_computed_again_after_its_last_step_failed():
    batcher = make(budget=8)
    batcher.submit(sequence("a", 12, max_tokens=0))
    step(batcher)
    assert [row.start for row in batcher.plan().rows] == [8]
    batcher.fail(lost=False)
    plan, _ = step(batcher)
    assert [(row.start, row.length) for row in plan.rows] == [(8, 4)]
    assert len(batcher) == 0


def test_eos_frees_blocks_and_slot_in_that_iteration_and_a_waiting_one_is_in_the_next_step():
    batcher = make(running=1, budget=8, blocks=4)
    batcher.submit(sequence("a", 5))
    batcher.submit(sequence("b", 5))
    step(batcher)
    assert batcher.num_waiting == 1
    plan = batcher.plan()
    (event,) = batcher.apply(plan.step, [EOS])
    assert (event.id, event.finish) == ("a", "stop")
    assert batcher.pool.num_free == batcher.pool.num_blocks
    following = batcher.plan()
    assert batcher.draft_of(following).ids == ("b",)
    assert following.admissions[0].slot == following.rows[0].slot == 0


def test_length_ends_after_max_tokens():
    batcher = make()
    batcher.submit(sequence("a", 3, max_tokens=2))
    assert step(batcher)[1][0].finish is None
    assert step(batcher)[1][0].finish == "length"
    assert batcher.plan() is None
    assert "a" not in batcher


def test_youngest_is_preempted_when_blocks_run_out_and_goes_on_later_with_all_its_tokens():
    batcher = make(blocks=4, size=4, longest=16)
    old, young = sequence("old", 7, 9), sequence("young", 4, 8)
    batcher.submit(old)
    batcher.submit(young)
    while not batcher.counters.preemptions:
        step(batcher)
    assert young.state is State.WAITING
    assert young.blocks == []
    kept = list(young.tokens)
    while old.state is not State.ENDED:
        step(batcher)
    plan = batcher.plan()
    assert batcher.draft_of(plan).ids == ("young",)
    assert plan.admissions[0].tokens == kept
    assert old.output == [7] * 9


def test_late_token_of_a_step_planned_ahead_is_dropped_and_counted():
    batcher = make()
    batcher.submit(sequence("a", 3))
    first = batcher.plan()
    ahead = batcher.plan()
    assert (ahead.decodes, ahead.rows) == ([0], [])
    assert batcher.apply(first.step, [EOS])[0].finish == "stop"
    assert batcher.apply(ahead.step, [9]) == []
    assert batcher.counters.late_tokens == 1


def test_cancel_frees_at_once_in_every_state():
    batcher = make(running=1)
    for id in ("running", "waiting"):
        batcher.submit(sequence(id, 5))
    step(batcher)
    assert batcher.end("waiting").state is State.ENDED
    assert batcher.end("running").output == [7]
    assert batcher.end("running") is None
    assert len(batcher) == 0
    assert batcher.pool.num_free == batcher.pool.num_blocks


def test_restart_computes_everything_again():
    batcher = make()
    batcher.submit(sequence("a", 3))
    batcher.submit(sequence("b", 3))
    step(batcher)
    lost = batcher.plan()
    batcher.restart()
    again = batcher.plan()
    assert batcher.draft_of(again).ids == ("a", "b")
    assert [admission.tokens for admission in again.admissions] == [[10, 11, 12, 7]] * 2
    assert [(row.start, row.length) for row in again.rows] == [(0, 4)] * 2
    with pytest.raises(ValueError, match=f"result of step {lost.step}"):
        batcher.apply(lost.step, [1, 1])


def trial(batcher: Batcher, poison: str, *, lost: bool) -> list[list[str]]:
    """Step until the poisonous one is alone; who was in each step."""
    steps = []
    while True:
        plan = batcher.plan()
        ids = list(batcher.draft_of(plan).ids)
        steps.append(ids)
        if poison not in ids:
            batcher.apply(plan.step, [7] * plan.num_sampled)
        elif len(batcher.fail(lost=lost)) == 1:
            return steps


@pytest.mark.parametrize("lost", [False, True])
def test_a_failing_step_is_halved_down_to_its_culprit_and_the_others_repeat_it(lost):
    batcher = make(running=8, budget=64)
    for id in "abcdefgh":
        batcher.submit(sequence(id, 3))
    step(batcher)
    batcher.submit(sequence("late", 3))
    steps = trial(batcher, "f", lost=lost)
    halves = [list(ids) for ids in ("abcdefgh", "abcd", "efgh", "ef", "e", "f")]
    assert steps == halves
    assert batcher.end("f").failures == 4
    plan = batcher.plan()
    assert batcher.draft_of(plan).ids == ("g", "h")
    batcher.apply(plan.step, [7, 7])
    plan = batcher.plan()
    assert sorted(batcher.draft_of(plan).ids) == ["a", "b", "c", "d", "e", "g", "h", "late"]
    if not lost:
        assert batcher.draft_of(plan).tokens == 7 * 1 + 3, "nobody's KV had to be computed again"


def test_a_step_that_fails_once_costs_nobody_anything():
    batcher = make()
    one, other = sequence("a", 3), sequence("b", 3)
    batcher.submit(one)
    batcher.submit(other)
    step(batcher)
    batcher.plan()
    assert batcher.fail(lost=False) == [one, other]
    for name in ("a", "b"):
        plan = batcher.plan()
        assert batcher.draft_of(plan).ids == (name,)
        assert [(row.start, row.length) for row in plan.rows] == [(3, 1)], "computed from where it was"
        assert [admission.tokens[3:] for admission in plan.admissions] == [[7]], "told anew"
        batcher.apply(plan.step, [7])
    assert (one.failures, other.failures) == (0, 0)
    assert batcher.draft_of(batcher.plan()).ids == ("a", "b")


def test_those_who_are_not_on_trial_make_room_for_those_who_are():
    batcher = make(running=4, budget=16, blocks=4, size=4, longest=16)
    batcher.submit(sequence("a", 4, 12))
    batcher.submit(sequence("b", 4, 12))
    while not batcher.counters.preemptions:
        step(batcher)
    batcher.plan()
    batcher.fail(lost=True)
    assert trial(batcher, "b", lost=False)[-1] == ["b"]


def test_refuses_what_could_never_finish():
    batcher = make(blocks=2, size=4)
    with pytest.raises(CapacityError, match="8 is the most"):
        batcher.submit(sequence("a", 5, 4))
    batcher.submit(sequence("a", 4, 4))
    with pytest.raises(ValueError, match="here already"):
        batcher.submit(sequence("a", 4, 4))


def test_results_out_of_turn_are_refused():
    batcher = make()
    batcher.submit(sequence("a", 3))
    plan = batcher.plan()
    for step_number, tokens in ((plan.step + 1, [1]), (plan.step, []), (plan.step, [1, 2])):
        with pytest.raises(ValueError, match="was due"):
            batcher.apply(step_number, tokens)


def test_limits_leave_no_decode_out():
    with pytest.raises(ValueError, match="at least max_running"):
        Limits(8, 4, 100)


def test_pool_never_hands_out_twice_nor_takes_back_twice():
    pool = BlockPool(3, 4)
    one, other = sequence("a", 3), sequence("b", 3)
    pool.grow(one, 2)
    with pytest.raises(OutOfBlocks):
        pool.grow(other, 2)
    pool.free(one.blocks)
    with pytest.raises(ValueError, match="free already"):
        pool.free(one.blocks[:1])
    pool.grow(other, 3)
    assert sorted(other.blocks) == [0, 1, 2]
