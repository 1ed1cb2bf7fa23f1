"""Drafts: how many are worth it, what is planned for them while nobody knows how many are right, and what stays of them."""

import pytest

from protocol.plan import Verdict, Verification
from scheduler.core.batcher import Batcher
from scheduler.core.speculation import Speculation
from tests.scheduler.core.drive import EOS, TOKEN, make, sequence


def decoding(count: int = 1, *, max_tokens: int = 60, **keywords) -> Batcher:
    """A batcher whose sequences, of six tokens, have their first token."""
    speculation = Speculation(keywords.pop("max_draft", 3), keywords.pop("cheap", 16))
    batcher = make(**{"budget": 32, "blocks": 64, "speculation": speculation, **keywords})
    for number in range(count):
        batcher.submit(sequence(f"t/{number}", 6, max_tokens))
    plan = batcher.plan()
    batcher.apply(plan.step, [TOKEN] * plan.num_sampled)
    return batcher


def verify(batcher: Batcher, *tokens: int):
    """Plan and apply a step of one verification that leaves these tokens; what was planned, and what came of it."""
    plan = batcher.plan()
    (verification,) = plan.verifications
    return verification, batcher.apply(plan.step, [], [Verdict(verification.drafts, list(tokens))])


def test_the_better_the_guesses_and_the_smaller_the_step_the_more_is_drafted():
    speculation = Speculation(7, 16)
    one = sequence("a", 5, 100)
    one.told = True

    def drafts(tokens: int) -> int:
        others = [sequence(str(number), 5) for number in range(tokens - 1)]
        return speculation.shares([one, *others], 256).get(one, 0)

    drafted = {}
    for acceptance in (0.1, 0.5, 0.8, 1.0):
        one.acceptance = acceptance
        drafted[acceptance] = [drafts(tokens) for tokens in (1, 4, 8, 15, 16, 64)]
    assert drafted == {
        0.1: [1, 0, 0, 0, 0, 0],
        0.5: [2, 1, 0, 0, 0, 0],
        0.8: [5, 3, 2, 0, 0, 0],
        1.0: [7, 7, 7, 1, 0, 0],
    }


def test_guesses_are_judged_one_by_one():
    speculation = Speculation(7, 16)
    one = sequence("a", 5)
    speculation.observe(one, Verdict(0, [7]))
    assert one.acceptance == 0.5, "nothing was guessed"
    speculation.observe(one, Verdict(2, [7, 7, 7]))
    assert one.acceptance == 1 - 0.5 * 0.75**2
    one.acceptance = 0.5
    speculation.observe(one, Verdict(4, [7, 7]))
    assert one.acceptance == (1 - 0.5 * 0.75) * 0.75, "one was right, one was wrong, two were never tried"


def test_who_gave_up_drafting_tries_again_now_and_then():
    batcher = decoding()
    batcher.running["t/0"].acceptance = 0.0
    drafting = []
    for _ in range(40):
        plan = batcher.plan()
        drafting += [batcher.running["t/0"].planned_len for _ in plan.verifications]
        batcher.apply(plan.step, [TOKEN] * plan.num_sampled, [Verdict(each.drafts, [9]) for each in plan.verifications])
        batcher.running["t/0"].acceptance = 0.0
    assert len(drafting) == 2


def test_nobody_drafts_while_a_prompt_is_computed_or_blocks_are_short():
    batcher = decoding(budget=8)
    batcher.submit(sequence("t/long", list(range(300, 330)), 4))
    plan = batcher.plan()  # who comes now wasn't there yet when it was decided
    batcher.apply(plan.step, [TOKEN] * plan.num_sampled, [Verdict(each.drafts, [7]) for each in plan.verifications])
    assert batcher.plan().verifications == []

    full = decoding(2, blocks=5, max_tokens=10)
    assert full.pool.num_free == 1
    assert full.plan().verifications == []


def test_nothing_is_drafted_beyond_the_last_token():
    batcher = decoding(max_tokens=5)
    batcher.running["t/0"].acceptance = 1.0
    verification, events = verify(batcher, 20, 21)
    # Token 11 ends it, so position 10 is never computed: 6 is its newest token's, 7 to 9 may be drafts.
    assert verification.drafts == 3
    assert [event.token for event in events] == [20, 21]
    plan = batcher.plan()
    assert [each.drafts for each in plan.verifications] == [1]
    assert batcher.plan() is None, "all that it may have is planned"
    (last,) = batcher.apply(plan.step, [], [Verdict(1, [22])])
    assert last.finish is None
    plan = batcher.plan()
    assert plan.decodes == [0]
    assert batcher.apply(plan.step, [23])[0].finish == "length"


def test_while_drafts_are_judged_the_next_step_is_planned_for_the_most_there_may_be():
    batcher = decoding(size=4)
    one = batcher.running["t/0"]
    one.acceptance = 1.0
    first = batcher.plan()
    assert first.verifications == [Verification(0, 3, one.blocks[2:])]
    assert (one.computed, one.unseen, one.drafted) == (10, 4, 3)
    one.acceptance = 0.0
    second = batcher.plan()
    assert second.decodes == [0], "within its blocks, wherever it stands"
    third = batcher.plan()
    fourth = batcher.plan()
    assert third.decodes == [0]
    assert fourth.verifications == [Verification(0, 0, one.blocks[3:])], "a row would have to say where it stands"
    batcher.apply(first.step, [], [Verdict(3, [20, 21])])
    assert (one.computed, one.unseen, one.drafted) == (11, 3, 0)
    assert len(one.tokens) == 9
    for plan in (second, third):
        batcher.apply(plan.step, [9])
    batcher.apply(fourth.step, [], [Verdict(0, [9])])
    assert one.computed == len(one.tokens) - 1 == 11


def test_fewer_drafts_than_asked_for_are_no_waste():
    batcher = decoding()
    plan = batcher.plan()
    draft = batcher.draft_of(plan)
    (verification,) = plan.verifications
    assert draft.tokens == 1 + verification.drafts > 2
    batcher.apply(plan.step, [], [Verdict(1, [20])])
    assert draft.tokens == draft.work.tokens == 2
    assert batcher.counters.rejected_tokens == 1


def test_a_stop_token_ends_it_there_and_only_what_came_out_is_charged():
    batcher = decoding()
    batcher.running["t/0"].acceptance = 1.0
    before = batcher.queue.counter("t")
    _, events = verify(batcher, 20, EOS, 21, 22)
    assert [(event.token, event.finish) for event in events] == [(20, None), (EOS, "stop")]
    assert batcher.queue.counter("t") - before == 2 * batcher.queue.price.output
    assert (batcher.counters.late_tokens, batcher.counters.rejected_tokens) == (2, 0)
    assert batcher.pool.num_free == batcher.pool.num_blocks


def test_the_prefix_cache_holds_accepted_tokens_only():
    batcher = decoding(cache=True, size=4)
    one = batcher.running["t/0"]
    one.acceptance = 1.0
    verify(batcher, 20)
    verify(batcher, 21, 22, 23)
    ahead = batcher.plan()
    batcher.end("t/0")
    batcher.apply(ahead.step, [], [Verdict(each.drafts, [9]) for each in ahead.verifications])
    # Seven tokens were known when the last drafts were judged, and of them the newest wasn't computed: one block of four.
    twin = sequence("t/twin", [*one.tokens, 50], 2)
    batcher.submit(twin)
    batcher.plan()
    assert twin.cached == 4


@pytest.mark.parametrize("lost", [False, True])
def test_a_step_that_failed_is_repeated_without_drafts(lost):
    batcher = decoding(2)
    text = {id: list(one.tokens) for id, one in batcher.running.items()}
    assert batcher.plan().verifications
    batcher.plan()
    batcher.fail(lost=lost)
    for one in [*batcher.running.values(), *batcher.queue]:
        assert (one.unseen, one.drafted, one.tokens) == (0, 0, text[one.id])
    seen = set()
    while len(seen) < 2:
        plan = batcher.plan()
        if not seen:
            assert plan.verifications == []
            assert {admission.slot for admission in plan.admissions} == {row.slot for row in plan.rows}
        seen |= set(batcher.draft_of(plan).ids)
        batcher.apply(plan.step, [9] * plan.num_sampled, [Verdict(each.drafts, [9]) for each in plan.verifications])


def test_a_result_without_its_verdicts_is_refused():
    batcher = decoding()
    plan = batcher.plan()
    with pytest.raises(ValueError, match="0 and 1 was due"):
        batcher.apply(plan.step, [])


def test_drafts_that_could_need_two_blocks_at_once_are_refused():
    with pytest.raises(ValueError, match="4 drafts are too many for blocks of 4"):
        decoding(max_draft=4, size=4)
