"""The baselines do what their papers say, behind the same interface."""

import pytest

from scheduler.core import policies
from tests.scheduler.core.drive import EOS, first_tokens, make, sequence, step


@pytest.mark.parametrize("name", policies.NAMES)
def test_every_policy_serves_everything_it_takes(name):
    batcher = make(name, blocks=40)
    for number in range(20):
        batcher.submit(sequence(f"t{number % 3}/{number}", 3 + number, 1 + number % 7))
    done = {}
    while len(batcher):
        for event in step(batcher)[1]:
            done[event.id] = done.get(event.id, 0) + 1
    assert done == {f"t{number % 3}/{number}": 1 + number % 7 for number in range(20)}
    assert batcher.pool.num_free == batcher.pool.num_blocks


def test_static_lets_nobody_in_before_the_last_has_ended():
    batcher = make("static", running=2)
    for number, length in enumerate((1, 5, 1)):
        batcher.submit(sequence(f"a/{number}", 4, length))
    assert first_tokens(batcher, 6) == {"a/0": 0, "a/1": 0, "a/2": 5}


def test_orca_lets_in_at_once_but_reserves_for_the_longest_output():
    batcher = make("orca", running=4, blocks=12)
    for number, length in enumerate((1, 9, 20)):
        batcher.submit(sequence(f"a/{number}", 12, length))
    assert first_tokens(batcher, 2) == {"a/0": 0, "a/1": 0}, "a/2 would need 8 of the 6 blocks that are left"
    assert len(batcher.running["a/1"].blocks) == 6


def test_prefill_first_stalls_decodes_while_prompts_come_in():
    batcher = make("prefill_first", budget=8, running=8)
    batcher.submit(sequence("a/1", 8))
    step(batcher)
    batcher.submit(sequence("a/2", 20))
    batcher.submit(sequence("a/3", 4))
    assert step(batcher)[0] == {"a/2": 20}, "longer than the budget: alone"
    assert step(batcher)[0] == {"a/3": 4}
    assert step(batcher)[0] == dict.fromkeys(("a/1", "a/2", "a/3"), 1)


def test_chunked_never_stalls_a_decode():
    batcher = make("chunked", budget=8, running=8)
    batcher.submit(sequence("a/1", 8))
    step(batcher)
    batcher.submit(sequence("b/2", 20))
    batcher.submit(sequence("c/3", 4))
    assert step(batcher)[0] == {"a/1": 1, "b/2": 7}
    assert step(batcher)[0] == {"a/1": 1, "b/2": 7}
    assert step(batcher)[0] == {"a/1": 1, "b/2": 6, "c/3": 1}


def test_first_come_first_served_lets_a_flood_take_everything():
    """What fairness is for; the counters are kept here too, so that it shows."""
    gaps = {}
    for name in ("chunked", "fair"):
        batcher = make(name, running=4, blocks=16, longest=16)
        for number in range(400):
            batcher.submit(sequence(f"flood/{number}", 4, 4))
        for number in range(40):
            batcher.submit(sequence(f"victim/{number}", 4, 4))
        for _ in range(100):
            step(batcher)
        gaps[name] = batcher.queue.served("flood") - batcher.queue.served("victim")
    bound = 2 * 2 * 16 * 4
    assert gaps["fair"] <= bound < gaps["chunked"]


def test_eos_is_the_end_under_every_policy():
    for name in policies.NAMES:
        batcher = make(name)
        batcher.submit(sequence("a/1", 4))
        assert step(batcher, EOS)[1][0].finish == "stop"
        assert not len(batcher)
