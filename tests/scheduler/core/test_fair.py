"""What our policy promises beyond the order between tenants: nothing in anybody's way, victims by service, no inversion."""

import pytest

from scheduler.core.sequence import State
from tests.scheduler.core.drive import first_tokens, make, sequence, step


def test_a_very_long_prompt_stalls_neither_others_first_tokens_nor_any_decode():
    batcher = make(running=8, budget=32, blocks=512, longest=2000)
    batcher.submit(sequence("a/decoding", 4, 200))
    step(batcher)
    batcher.submit(sequence("b/long", 1600))
    step(batcher)
    for number in range(40):
        batcher.submit(sequence(f"c/{number}", 10, 1))
        rows, events = step(batcher)
        assert rows["a/decoding"] == 1
        assert rows["b/long"] >= 8, "and it goes on itself"
        assert f"c/{number}" in {event.id for event in events}


def test_several_long_prompts_of_others_leave_a_newcomer_its_part():
    batcher = make(running=8, budget=32, blocks=2048, longest=2000)
    for tenant in "abcde":
        batcher.submit(sequence(f"{tenant}/long", 1200))
    for _ in range(5):
        step(batcher)
    batcher.submit(sequence("z/short", 8, 1))
    assert "z/short" in first_tokens(batcher, 2)


def test_without_contention_a_prompt_gets_the_whole_budget():
    batcher = make(running=8, budget=32, blocks=512, longest=2000)
    batcher.submit(sequence("a/1", 100))
    batcher.submit(sequence("a/2", 100))
    assert [step(batcher)[0] for _ in range(3)] == [{"a/1": 32}] * 3
    assert step(batcher)[0] == {"a/1": 4, "a/2": 28}


def test_every_long_prompt_ends_while_short_ones_keep_coming():
    batcher = make(running=8, budget=16, blocks=512, longest=2000)
    for tenant in "abc":
        batcher.submit(sequence(f"{tenant}/long", 200, 1))
    first = {}
    for number in range(200):
        for index in range(3):
            batcher.submit(sequence(f"t{index}/{number}", 8, 1))
        for event in step(batcher)[1]:
            first.setdefault(event.id, number)
    assert {"a/long", "b/long", "c/long"} <= set(first)


def test_a_prompt_that_finds_no_room_lets_others_pass_but_not_for_ever():
    batcher = make(running=8, budget=32, blocks=32, longest=128)
    for number in range(4):
        batcher.submit(sequence(f"a/{number}", 16, 8))
    step(batcher)
    batcher.submit(sequence("b/big", 100, 8))  # 25 of 32 blocks
    for number in range(100):
        batcher.submit(sequence(f"c/{number}", 4, 4))
    first = first_tokens(batcher, 60)
    assert first["c/0"] < first["b/big"], "nobody waits for nothing"
    passed = sum(4 + 2 * 4 for number in range(100) if first.get(f"c/{number}", 1000) < first["b/big"])
    assert passed <= 100 + 8 * (4 + 2 * 4), "others get what the prompt is worth, and those that ran already end"


def test_the_victim_is_of_the_most_served_tenant_then_of_low_priority_then_the_youngest():
    batcher = make(running=4, budget=16, blocks=8, size=4, longest=32)
    batcher.submit(sequence("rich/old", 4, 28))
    step(batcher)
    batcher.submit(sequence("rich/low", 4, 20, priority=-1))
    batcher.submit(sequence("poor/young", 4, 20))
    for _ in range(2):
        step(batcher)
    victims = []
    while len(victims) < 2:
        before = set(batcher.running)
        step(batcher)
        victims += before - set(batcher.running)
    assert victims == ["rich/low", "rich/old"]


@pytest.mark.parametrize("short_of", ["blocks", "slots"])
def test_low_priority_work_does_not_block_the_same_tenants_high_priority_arrival(short_of):
    """The inversion: what runs holds everything, and the urgent one would wait until it ends."""
    sizes = {"blocks": 8, "running": 4} if short_of == "blocks" else {"blocks": 64, "running": 2}
    batcher = make(budget=16, size=4, longest=64, **sizes)
    for number in range(2):
        batcher.submit(sequence(f"a/batch{number}", 12, 20, priority=-5))
    step(batcher)
    step(batcher)
    step(batcher)
    batcher.submit(sequence("a/urgent", 8, 2, priority=5))
    assert "a/urgent" in step(batcher)[0]
    assert batcher.counters.preemptions == 1, "no more than needed"


def test_without_priorities_the_same_arrival_waits():
    batcher = make(running=2, budget=16, blocks=64)
    for number in range(2):
        batcher.submit(sequence(f"a/batch{number}", 12, 20))
    for _ in range(3):
        step(batcher)
    batcher.submit(sequence("a/urgent", 8, 2))
    assert "a/urgent" not in step(batcher)[0]
    assert batcher.counters.preemptions == 0


def test_a_prompt_of_high_priority_comes_before_the_same_tenants_long_one():
    batcher = make(running=4, budget=16, blocks=128, longest=400)
    batcher.submit(sequence("a/long", 300, 2))
    step(batcher)
    batcher.submit(sequence("a/urgent", 12, 2, priority=1))
    assert step(batcher)[0]["a/urgent"] == 12


def test_priority_never_buys_service_from_another_tenant():
    batcher = make(running=2, budget=16, blocks=64)
    batcher.submit(sequence("modest/1", 4, 30))
    batcher.submit(sequence("meek/1", 4, 30))
    step(batcher)
    batcher.submit(sequence("pushy/1", 4, 2, priority=100))
    rows, _ = step(batcher)
    assert set(rows) == {"modest/1", "meek/1"}
    assert batcher.counters.preemptions == 0


def test_within_a_tenant_priority_then_deadline_then_arrival():
    batcher = make(running=1, budget=16)
    batcher.submit(sequence("a/running", 4, 2))
    step(batcher)
    for id, keywords in {
        "late": {"deadline": 90.0},
        "never": {},
        "soon": {"deadline": 10.0},
        "low": {"priority": -1, "deadline": 1.0},
        "high": {"priority": 1},
        "never2": {},
    }.items():
        batcher.submit(sequence(f"a/{id}", 4, 1, **keywords))
    order = [event.id for _ in range(8) if len(batcher) for event in step(batcher)[1] if event.id != "a/running"]
    assert order == ["a/high", "a/soon", "a/late", "a/never", "a/never2", "a/low"]


def test_who_is_owed_more_than_the_bound_gets_room():
    """One tenant's long outputs hold every slot; the other's turn comes before they end, by preemption."""
    batcher = make(running=4, budget=16, blocks=24, size=4, longest=90)
    for number in range(4):
        batcher.submit(sequence(f"a/{number}", 4, 20 * (number + 1)))
    step(batcher)
    batcher.submit(sequence("b/whole", 80, 4))  # 20 of 24 blocks
    while batcher.queue.head() is not None and len(batcher.running) < 4 + 1:
        step(batcher)
        gap = batcher.queue.counter("a") - batcher.queue.counter("b")
        assert gap <= 2 * 24 * 4 + 2 * 4, "output price times KV tokens, and one step"
        if "b/whole" in batcher.running:
            break
    assert batcher.running["b/whole"].state is State.RUNNING


def test_a_flood_gives_way_to_a_tenant_of_which_nothing_runs():
    batcher = make(running=4, budget=16, blocks=64)
    for number in range(20):
        batcher.submit(sequence(f"flood/{number}", 4, 60))
    for _ in range(3):
        step(batcher)
    batcher.submit(sequence("one/1", 6, 4))
    batcher.submit(sequence("one/2", 6, 4))
    assert "one/1" in {event.id for _ in range(2) for event in step(batcher)[1]}
    assert batcher.counters.preemptions == 1
    for _ in range(2):
        step(batcher)
    assert batcher.counters.preemptions == 1, "the second waits its turn: something of its tenant runs"


def test_nobody_gives_way_who_has_only_one_running():
    batcher = make(running=2, budget=16, blocks=64)
    for tenant in "abc":
        batcher.submit(sequence(f"{tenant}/1", 4, 10))
    for _ in range(8):
        step(batcher)
    assert batcher.counters.preemptions == 0


def test_room_that_was_made_for_an_urgent_one_isnt_anothers():
    batcher = make(running=2, budget=16, blocks=64)
    for number in range(2):
        batcher.submit(sequence(f"a/batch{number}", 12, 20, priority=-5))
    for _ in range(3):
        step(batcher)
    batcher.submit(sequence("b/1", 4, 30))
    batcher.submit(sequence("b/2", 4, 30))
    step(batcher)
    batcher.submit(sequence("a/urgent", 8, 2, priority=5))
    assert "a/urgent" in step(batcher)[0]
