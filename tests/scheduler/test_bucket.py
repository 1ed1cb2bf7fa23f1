"""The bucket's arithmetic, in fractions, so that exactly means exactly."""

from fractions import Fraction

from hypothesis import assume, given
from hypothesis import strategies as st

from scheduler.bucket import TokenBucket

positive = st.fractions(Fraction(1, 100), 100, max_denominator=100)
pauses = st.fractions(0, 20, max_denominator=60)
amounts = st.fractions(0, 50, max_denominator=10)
histories = st.lists(st.tuples(pauses, amounts), max_size=30)
buckets = st.builds(lambda rate, burst: TokenBucket(rate, burst, Fraction(0), Fraction(0)), positive, positive)


def used(bucket: TokenBucket, history: list[tuple[Fraction, Fraction]]) -> Fraction:
    """Take all of it, paid afterwards; returns when that was over."""
    now = Fraction(0)
    for pause, amount in history:
        now += pause
        bucket.take(amount, now)
    return now


@given(bucket=buckets, history=histories)
def test_over_any_window_no_more_is_let_in_than_the_burst_and_the_rate(bucket, history):
    now, let_in = Fraction(0), []
    for pause, wanted in history:
        now += pause
        amount = min(wanted, bucket.burst)
        if bucket.ready_at(amount) <= now:
            bucket.take(amount, now)
            let_in.append((now, amount))
    for first, (begin, _) in enumerate(let_in):
        total = Fraction(0)
        for end, amount in let_in[first:]:
            total += amount
            assert total <= bucket.burst + bucket.rate * (end - begin)


@given(bucket=buckets, history=histories)
def test_nobody_is_refused_what_the_burst_and_the_rate_allow(bucket, history):
    """The level, computed anew from all that was taken, decides; a request over the burst needs a full bucket."""
    level = bucket.burst
    now = Fraction(0)
    for pause, amount in history:
        now += pause
        level = min(bucket.burst, level + bucket.rate * pause)
        assert (bucket.ready_at(amount) <= now) == (level >= min(amount, bucket.burst))
        bucket.take(amount, now)
        level -= amount


@given(bucket=buckets, history=histories, amount=amounts)
def test_at_the_time_told_it_holds_enough_and_not_before(bucket, history, amount):
    now = used(bucket, history)
    ready_at = bucket.ready_at(amount)
    enough = min(amount, bucket.burst)
    assume(ready_at > now)
    assert bucket.burst - bucket.missing(ready_at) == enough
    assert bucket.burst - bucket.missing((now + ready_at) / 2) < enough


@given(bucket=buckets, history=histories)
def test_what_is_paid_afterwards_is_made_up_for_to_the_last_unit(bucket, history):
    """Whatever was taken, once the bucket is full again no more was used since the start than burst and rate allow."""
    now = used(bucket, history)
    taken = sum(amount for _, amount in history)
    assert bucket.missing(bucket.full_at()) == 0
    assert taken <= bucket.rate * max(now, bucket.full_at())


@given(bucket=buckets, history=histories, amount=amounts, pause=pauses, later=pauses)
def test_what_is_given_back_was_never_taken(bucket, history, amount, pause, later):
    now = used(bucket, history) + pause
    untouched = bucket.missing(now + later)
    bucket.take(amount, now)
    bucket.give_back(amount)
    assert bucket.missing(now + later) == untouched


@given(rate=st.floats(0.001, 1000), burst=st.integers(1, 1000), now=st.floats(0, 1e7))
def test_a_full_bucket_lets_its_whole_burst_in_at_once_in_floats_too(rate, burst, now):
    bucket = TokenBucket(rate, burst)
    for _ in range(burst):
        assert bucket.ready_at(1) <= now
        bucket.take(1, now)
    assert bucket.ready_at(1) > now
