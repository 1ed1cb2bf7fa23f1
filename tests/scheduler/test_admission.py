"""Who may send: bounds are exact, places balance, and who must wait is told for how long."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadRequest, Busy
from protocol.request import Request
from scheduler.admission import Admission, Bounds
from scheduler.journal.entry import Entry
from scheduler.quotas import Quota


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def request(tenant: str, tokens: int = 1) -> Entry:
    """One with a prompt of this many tokens."""
    return Entry(
        id=f"{tenant}/r",
        model="tiny",
        request=Request(),
        prompt=[5] * tokens,
        seed=1,
        accepted_at=1000.0,
        listeners=[],
    )


def admission(
    clock: Clock | None = None, *, per_tenant: int = 2, in_all: int = 3, prompt_tokens: int = 100
) -> Admission:
    return Admission(Bounds(in_all, prompt_tokens, 4, lambda _: Quota(per_tenant)), clock or Clock())


def refusal(asked: Admission, tenant: str = "late", tokens: int = 1, **named) -> Busy:
    before = asked.outstanding
    with pytest.raises(Busy) as caught:
        asked.enter(request(tenant, tokens), **named)
    assert asked.outstanding == before
    return caught.value


def test_a_tenant_is_held_to_its_own_bound():
    full = admission()
    full.enter(request("alice", 1))
    full.enter(request("alice", 1))
    assert refusal(full, "alice").code == "rate_limited"
    full.enter(request("bob", 1))
    full.leave(request("alice", 1))
    full.enter(request("alice", 1))


def test_all_together_are_held_to_theirs():
    full = admission()
    for tenant in ("alice", "bob", "carol"):
        full.enter(request(tenant, 1))
    assert refusal(full).code == "overloaded"
    full.release(request("bob", 1))
    full.enter(request("late", 1))


def test_prompt_tokens_are_bounded_to_the_last_one():
    full = admission(prompt_tokens=100)
    full.enter(request("alice", 60))
    full.enter(request("bob", 40))
    assert refusal(full, tokens=1).code == "overloaded"
    full.leave(request("bob", 40))
    assert refusal(full, tokens=41).code == "overloaded"
    full.enter(request("late", 40))


def test_a_prompt_over_the_bound_may_run_alone():
    empty = admission(prompt_tokens=100)
    empty.enter(request("alice", 5000))
    assert refusal(empty).code == "overloaded"
    empty.leave(request("alice", 5000))
    empty.enter(request("bob", 1))


def test_a_full_journal_lets_nobody_in():
    empty = admission()
    assert refusal(empty, journal_full=True).code == "overloaded"
    empty.enter(request("alice", 1), journal_full=False)


def test_what_was_accepted_before_is_let_in_over_every_bound_and_counts():
    taken = admission()
    for _ in range(5):
        taken.enter_anyway(request("alice", 1000))
    assert taken.outstanding == 5
    assert refusal(taken, "alice").code == "rate_limited"
    assert refusal(taken, "bob").code == "overloaded"


requests = st.tuples(st.sampled_from(["alice", "bob", "carol"]), st.integers(1, 60))


@given(
    moves=st.lists(
        st.tuples(st.sampled_from(["enter", "enter", "enter_anyway", "leave", "release", "undo"]), requests),
        max_size=40,
    )
)
def test_in_any_history_the_bounds_are_exact_and_places_balance(moves):
    counted = admission()
    inside: list[tuple[str, int]] = []
    for move, (tenant, tokens) in moves:
        if move in ("leave", "release", "undo"):
            if inside:
                getattr(counted, move)(request(*inside.pop(tokens % len(inside))))
            continue
        held = sum(tokens for _, tokens in inside)
        fits = (
            sum(other == tenant for other, _ in inside) < 2 and len(inside) < 3 and (not inside or held + tokens <= 100)
        )
        admitted = False
        with suppress(Busy):
            getattr(counted, move)(request(tenant, tokens))
            admitted = True
        assert admitted == (fits or move == "enter_anyway")
        inside += [(tenant, tokens)] * admitted
        assert counted.outstanding == len(inside)
    for one in inside:
        counted.leave(request(*one))
    assert counted.outstanding == 0
    for tenant in ("alice", "bob", "carol"):
        counted.enter(request(tenant, 33))  # nothing was left behind


def test_choices_are_bounded_and_each_holds_the_prompt_in_memory():
    counted = admission(in_all=9, per_tenant=9, prompt_tokens=100)
    for asked, field in ({"n": 5}, "n"), ({"n": 1, "best_of": 5}, "best_of"):
        entry = request("alice", 10)
        entry.request = Request(**asked)
        with pytest.raises(BadRequest, match="at most 4 here") as caught:
            counted.enter(entry)
        assert caught.value.body.param == field
    several = request("alice", 20)
    several.request = Request(n=2, best_of=4)
    counted.enter(several)
    assert counted.outstanding == 1, "it is one request"
    refusal(counted, "bob", 21)
    counted.enter(request("bob", 20))
    counted.leave(several)
    counted.enter(request("bob", 80))


def wait_after(*pauses: float) -> int:
    """``retry_after_ms`` once requests have ended, each so long after the one before."""
    clock = Clock()
    full = admission(clock, per_tenant=1, in_all=1)
    full.enter(request("alice", 1))
    for pause in pauses:
        clock.now += pause
        full.leave(request("alice", 1))
        full.enter(request("alice", 1))
    wait = refusal(full, "alice").body.retry_after_ms
    assert wait == refusal(full, "bob").body.retry_after_ms
    assert wait is not None
    return wait


@given(pauses=st.lists(st.floats(0, 1e6), max_size=50))
def test_the_wait_is_always_between_a_tenth_of_a_second_and_a_minute(pauses):
    assert 100 <= wait_after(*pauses) <= 60_000


def test_the_wait_is_a_second_before_anything_is_known():
    assert wait_after() == 1000


@pytest.mark.parametrize(("pause", "wait"), [(0.001, 100), (0.5, 500), (4.0, 4000), (3600.0, 60_000)])
def test_the_wait_follows_the_pace_of_ends(pause, wait):
    assert wait_after(*[pause] * 100) == pytest.approx(wait, rel=0.01)


def test_an_idle_hour_says_nothing_of_the_pace():
    clock = Clock()
    one = admission(clock, per_tenant=1, in_all=1)
    for _ in range(100):
        one.enter(request("alice", 1))
        clock.now += 0.5
        one.leave(request("alice", 1))
        clock.now += 3600
    one.enter(request("alice", 1))
    assert refusal(one, "alice").body.retry_after_ms == pytest.approx(500, rel=0.01)


def test_the_wait_grows_and_shrinks_with_the_pace_but_not_at_a_single_end():
    slow, fast = [10.0] * 50, [0.2] * 50
    assert wait_after(*slow) > wait_after(*slow, 0.2) > wait_after(*slow, *fast)
    assert 200 <= wait_after(*slow, *fast) < 300
    assert wait_after(*slow, 0.2) > 8000
