"""Whose turn it is: of who has the least to do, and among equals rather of who holds the prompt."""

from scheduler.turns import Turns
from tests.scheduler.journals import entry

ONE = entry("alice/1")


def turns(number: int = 2, load: float = 0.0, cached: float = 0.0) -> Turns:
    return Turns(number, lambda: load, lambda _: cached)


def pauses(one: Turns, count: int = 2000) -> list[float]:
    return sorted(one.pause_s(ONE) for _ in range(count))


def test_who_is_alone_waits_for_nobody_and_speaks():
    alone = turns(load=7.0)
    assert (alone.pause_s(ONE), alone.over_after_s, alone.speaks) == (0.0, 0.0, True)


def test_the_oldest_speaks_and_when_it_is_gone_the_next():
    one = turns(number=2)
    one.hear({1: 0.0, 3: 0.0})
    assert not one.speaks
    one.hear({3: 0.0})
    assert one.speaks


def test_equals_take_as_much_each():
    a, b = turns(1), turns(2)
    for one in (a, b):
        one.hear({9: 0.0})
    won = sum(a.pause_s(ONE) < b.pause_s(ONE) for _ in range(4000))
    assert 1800 < won < 2200


def test_who_has_a_batch_more_than_the_least_loaded_comes_after_it():
    busy, idle = turns(load=3.0), turns(load=2.0)
    busy.hear({8: 2.0, 9: 5.0})
    idle.hear({8: 3.0, 9: 5.0})
    assert pauses(busy)[0] >= pauses(idle)[-1]


def test_nobody_waits_longer_than_the_time_after_which_all_had_their_turn():
    swamped = turns(load=1000.0)
    swamped.hear({9: 0.0})
    assert pauses(swamped)[-1] == swamped.over_after_s


def test_who_holds_most_of_the_prompt_comes_first_among_equals_and_not_before_who_has_less_to_do():
    holds, lacks = turns(cached=0.95), turns(cached=0.0)
    for one in (holds, lacks):
        one.hear({9: 0.0})
    won = sum(holds.pause_s(ONE) < lacks.pause_s(ONE) for _ in range(2000))
    assert won > 1900
    holds_but_busy = turns(load=1.0, cached=0.95)
    holds_but_busy.hear({9: 0.0})
    assert pauses(holds_but_busy)[0] >= pauses(lacks)[-1]
