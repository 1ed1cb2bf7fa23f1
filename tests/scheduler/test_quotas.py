"""What a tenant may use: limits are exact, waits are exact, and nothing is paid that wasn't let in."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import BadRequest, Busy
from protocol.request import Message, Request
from scheduler.admission import Admission, Bounds
from scheduler.journal.entry import Entry
from scheduler.quotas import Quota
from tests.scheduler.test_admission import Clock, request


class Desk:
    """An admission with a clock, and quotas by tenant (``alice`` unless named)."""

    def __init__(self, quota: Quota | None = None, **quotas: Quota) -> None:
        self.clock = Clock()
        self.quotas = {"alice": quota or Quota(1000), **quotas}
        self.admission = Admission(self.bounds(), self.clock)

    def bounds(self, in_all: int = 10_000) -> Bounds:
        return Bounds(in_all, 4_000_000, 4, lambda tenant: self.quotas.get(tenant, Quota(1000)))

    def enter(self, entry: Entry) -> bool:
        try:
            self.admission.enter(entry)
        except Busy:
            return False
        return True

    def let_in(self, entry: Entry) -> int:
        """How many of these at once, up to fifty."""
        return next((count for count in range(50) if not self.enter(entry)), 50)

    def refusal(self, entry: Entry) -> Busy:
        with pytest.raises(Busy) as caught:
            self.admission.enter(entry)
        assert caught.value.code == "rate_limited"
        return caught.value

    def wait_ms(self, entry: Entry) -> int:
        wait = self.refusal(entry).body.retry_after_ms
        assert wait is not None
        return wait


ONE = request("alice")


@pytest.mark.parametrize(("rate", "burst", "wait"), [(4.0, 4, 250), (1.6, 1, 250), (1.0, 1, 1000), (0.1, 1, 10_000)])
def test_requests_per_second_with_a_second_of_them_at_once(rate, burst, wait):
    desk = Desk(Quota(1000, requests_per_s=rate))
    assert desk.let_in(ONE) == burst
    assert desk.let_in(request("bob")) == 50
    assert desk.wait_ms(ONE) == wait
    assert desk.refusal(ONE).body.message == f"your limit is {rate:g} requests per second"
    desk.clock.now += 3600
    assert desk.let_in(ONE) == burst


def test_tokens_per_minute_count_the_prompt_at_once_and_the_answer_as_it_comes():
    desk = Desk(Quota(1000, tokens_per_min=600))
    long = request("alice", 250)
    assert desk.let_in(long) == 2
    assert desk.wait_ms(long) == 15_000  # 100 are left, 10 a second come
    for _ in range(300):
        desk.admission.generated(long)
    assert desk.wait_ms(long) == 45_000  # 200 in debt
    assert desk.wait_ms(ONE) == 20_100
    assert desk.refusal(ONE).body.message == "your limit is 600 tokens per minute, prompts and answers together"
    desk.clock.now += 20.1
    assert desk.let_in(ONE) == 1


def test_a_prompt_over_a_whole_minute_needs_a_full_bucket_and_is_paid_in_full():
    desk = Desk(Quota(1000, tokens_per_min=60))
    huge = request("alice", 300)
    assert desk.let_in(huge) == 1
    assert desk.wait_ms(huge) == 300_000
    desk.clock.now += 300
    assert desk.let_in(huge) == 1


def test_the_longest_wait_is_told_and_its_limit_named():
    desk = Desk(Quota(1000, requests_per_s=1, tokens_per_min=60))
    assert desk.let_in(request("alice", 40)) == 1
    error = desk.refusal(request("alice", 30)).body
    assert (error.retry_after_ms, "tokens per minute" in error.message) == (10_000, True)
    error = desk.refusal(request("alice", 10)).body
    assert (error.retry_after_ms, "requests per second" in error.message) == (1000, True)


@given(
    requests_per_s=st.none() | st.floats(1e-5, 1e6),
    tokens_per_min=st.none() | st.integers(1, 10**9),
    moves=st.lists(st.tuples(st.floats(0, 100), st.integers(1, 500), st.integers(0, 50)), max_size=20),
)
def test_the_wait_told_is_exact_to_the_millisecond(requests_per_s, tokens_per_min, moves):
    desk = Desk(Quota(1000, requests_per_s=requests_per_s, tokens_per_min=tokens_per_min))
    for pause, tokens, answer in moves:
        desk.clock.now += pause
        asked = request("alice", tokens)
        try:
            desk.admission.enter(asked)
        except Busy as error:
            refused_at, wait_ms = desk.clock.now, error.body.retry_after_ms
            rounding = 4 * math.ulp(refused_at + wait_ms / 1000)
            desk.clock.now = refused_at + max(wait_ms - 1, 0) / 1000 - rounding
            assert not desk.enter(asked)
            desk.clock.now = refused_at + wait_ms / 1000 + rounding
            desk.admission.enter(asked)
        for _ in range(answer):
            desk.admission.generated(asked)


def context(prompt: int, **given) -> Entry:
    entry = request("alice", prompt)
    entry.request = Request(**given)
    return entry


def test_the_context_is_the_prompt_and_what_is_asked_for_and_over_it_waiting_is_no_use():
    desk = Desk(Quota(1000, max_context=100))
    for fitting in (context(60, max_tokens=40), context(60, max_completion_tokens=40), context(100)):
        desk.admission.enter(fitting)
    for prompt, fields, asked in (
        (61, {"max_tokens": 40}, "prompt: 61 prompt tokens and max_tokens = 40 are"),
        (101, {}, "prompt: 101 prompt tokens are"),
        (101, {"messages": [Message("user", "?")]}, "messages: 101 prompt tokens are"),
    ):
        with pytest.raises(BadRequest) as caught:
            desk.admission.enter(context(prompt, **fields))
        body = caught.value.body
        assert (body.code, body.retry_after_ms) == ("context_length_exceeded", None)
        assert body.message == f"{asked} over your limit of 100 tokens"


def test_who_is_refused_for_any_reason_has_paid_nothing():
    desk = Desk(Quota(1, requests_per_s=2, tokens_per_min=100, max_context=60), bob=Quota(1000))
    desk.admission.enter(request("alice", 10))
    for refused in (request("alice", 10), request("alice", 60)):
        desk.refusal(refused)
    with pytest.raises(BadRequest):
        desk.admission.enter(request("alice", 61))
    with pytest.raises(Busy, match="too many"):
        desk.admission.enter(request("bob"), journal_full=True)
    desk.admission.leave(request("alice", 10))
    desk.admission.enter(request("alice", 60))


def test_what_turned_out_to_be_known_has_cost_nothing():
    desk = Desk(Quota(1000, requests_per_s=1, tokens_per_min=60))
    for _ in range(5):
        desk.admission.enter(request("alice", 60))
        desk.admission.undo(request("alice", 60))
    assert desk.let_in(request("alice", 60)) == 1
    assert desk.admission.outstanding == 1


def test_what_was_accepted_before_is_not_paid_again_but_its_further_tokens_are():
    desk = Desk(Quota(1000, requests_per_s=1, tokens_per_min=60))
    recovered = request("alice", 60)
    for _ in range(3):
        desk.admission.enter_anyway(recovered)
    desk.admission.generated(recovered)
    assert desk.wait_ms(request("alice", 60)) == 1000
    assert desk.let_in(request("alice", 59)) == 1


def test_new_bounds_hold_for_the_next_request_and_what_is_used_up_remains_so():
    desk = Desk(Quota(1000, requests_per_s=4, tokens_per_min=600))
    asked = request("alice", 100)
    assert desk.let_in(asked) == 4
    assert desk.wait_ms(asked) == 250

    desk.quotas["alice"] = Quota(1000, requests_per_s=5, tokens_per_min=60_000)
    desk.admission.rebound(desk.bounds())
    assert desk.let_in(asked) == 1
    desk.quotas["alice"] = Quota(1000, tokens_per_min=60)
    desk.admission.rebound(desk.bounds())
    assert desk.wait_ms(asked) == 500_000
    desk.quotas["alice"] = Quota(1000, requests_per_s=1)
    desk.admission.rebound(desk.bounds())
    assert desk.let_in(asked) == 1

    desk.quotas["alice"] = Quota(6)
    desk.admission.rebound(desk.bounds())
    assert "6 requests of yours are outstanding" in desk.refusal(asked).body.message
    desk.quotas["alice"] = Quota(7)
    desk.admission.rebound(desk.bounds(in_all=6))
    with pytest.raises(Busy, match="too many requests"):
        desk.admission.enter(asked)
    for _ in range(6):
        desk.admission.leave(asked)
    assert desk.admission.outstanding == 0


def test_tenants_that_went_away_are_forgotten_once_there_is_nothing_to_remember():
    desk = Desk()
    desk.quotas = {f"t{number}": Quota(1, requests_per_s=1) for number in range(3000)}
    for tenant in desk.quotas:
        desk.clock.now += 0.1
        desk.admission.enter(request(tenant))
        desk.admission.leave(request(tenant))
    assert 10 <= len(desk.admission._accounts) < 25, "those of the last second, and those not looked at yet"


@given(moves=st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0, 2), st.booleans()), max_size=60))
def test_to_be_forgotten_changes_nothing(moves):
    quota = Quota(2, requests_per_s=1.5)
    desk, remembering = (Desk(**dict.fromkeys("abcdef", quota)) for _ in range(2))
    remembering.admission._forget_some = lambda: None
    inside: list[str] = []
    for tenant, pause, ends in moves:
        for each in (desk, remembering):
            each.clock.now += pause
        entered = desk.enter(request(tenant))
        assert entered == remembering.enter(request(tenant))
        inside += [tenant] * entered
        if ends and inside:
            gone = inside.pop(0)
            for each in (desk, remembering):
                each.admission.leave(request(gone))
