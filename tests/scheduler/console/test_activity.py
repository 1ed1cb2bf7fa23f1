"""What the console shows, held against the batcher that it watches."""

import pytest

from scheduler.console.activity import MOST_ENDED, MOST_TENANTS, MOST_WAITING
from scheduler.console.rate import Rate
from scheduler.console.snapshot import Snapshot, decode, encode
from tests.scheduler.console.reports import Bench
from tests.scheduler.core.drive import make


def stages(snapshot: Snapshot, request_id: str) -> list[tuple[str, float, float | None]]:
    """The phases of one request, in seconds since the bench began."""
    (row,) = [row for row in snapshot.requests if row.request_id == request_id]
    return [
        (phase.stage, phase.since - 100, None if phase.until is None else phase.until - 100) for phase in row.phases
    ]


def test_a_request_waits_is_prefilled_in_chunks_and_decodes():
    bench = Bench(make(running=1, budget=4))
    bench.submit("alice/first", prompt=10, max_tokens=3)
    bench.submit("bob/second", prompt=4, max_tokens=1)
    bench.now += 5
    assert stages(bench.activity.snapshot({}), "first") == [("waiting", 0, None)]
    for _ in range(5):
        bench.step()
    first = [("waiting", 0, 5), ("prefill", 5, 8), ("decode", 8, 10)]
    assert stages(bench.activity.snapshot({}), "first") == first
    assert stages(bench.activity.snapshot({}), "second") == [("waiting", 0, None)]
    bench.step()
    snapshot = bench.activity.snapshot({})
    assert stages(snapshot, "second") == [("waiting", 0, 10), ("prefill", 10, 11), ("decode", 11, 11)]
    assert [(row.prompt_tokens, row.generated_tokens, row.outcome) for row in snapshot.requests] == [
        (4, 1, "length"),
        (10, 3, "length"),
    ]


def test_a_preemption_is_seen_and_so_is_what_is_computed_again():
    bench = Bench(make(running=2, budget=32, blocks=6, size=4))
    bench.submit("alice/one", prompt=8, max_tokens=12)
    bench.submit("bob/other", prompt=8, max_tokens=12)
    seen = set()
    while len(bench.batcher):
        bench.step()
        snapshot = bench.activity.snapshot({})
        running = {f"{row.tenant}/{row.request_id}" for row in snapshot.requests if row.outcome is None} & set(
            bench.batcher.running
        )
        shown = {
            f"{row.tenant}/{row.request_id}"
            for row in snapshot.requests
            if row.outcome is None and row.phases[-1].stage in {"prefill", "decode"}
        }
        assert shown == running
        assert (snapshot.running, snapshot.waiting) == (len(bench.batcher.running), bench.batcher.num_waiting)
        assert snapshot.preemptions == bench.batcher.counters.preemptions
        seen.add(tuple(row.phases[-1].stage for row in snapshot.requests if row.outcome is None))
    assert snapshot.preemptions >= 1
    assert any("preempted" in phases for phases in seen)
    kinds = {tuple(stage for stage, _, _ in stages(snapshot, name)) for name in ("one", "other")}
    assert ("waiting", "prefill", "decode", "preempted", "prefill", "decode") in kinds


def test_a_request_for_several_texts_is_one_request():
    bench = Bench(make(running=3, budget=32, blocks=12, size=4))
    bench.submit("alice/several", prompt=8, max_tokens=12, n=3)
    bench.submit("bob/other", prompt=8, max_tokens=20)
    while len(bench.batcher):
        bench.step()
        snapshot = bench.activity.snapshot({})
        (alice,) = [row for row in snapshot.tenants if row.tenant == "alice"]
        (row,) = [row for row in snapshot.requests if row.request_id == "several"]
        assert alice.running + alice.waiting == (row.outcome is None)
        assert alice.running or not any(id.startswith("alice/several") for id in bench.batcher.running)
    (row,) = [row for row in snapshot.requests if row.request_id == "several"]
    assert (row.prompt_tokens, row.generated_tokens, row.outcome) == (8, 36, "length")
    assert snapshot.preemptions > 0


def test_phases_follow_one_another_without_a_gap():
    bench = Bench(make(running=2, budget=32, blocks=6, size=4))
    for name in ("alice/one", "bob/other", "bob/third"):
        bench.submit(name, prompt=8, max_tokens=12)
    while len(bench.batcher):
        bench.step()
    for row in bench.activity.snapshot({}).requests:
        assert row.phases[0].since == 100
        assert [phase.until for phase in row.phases[:-1]] == [phase.since for phase in row.phases[1:]]


def test_tenants_are_told_apart_and_add_up():
    bench = Bench(make(running=2, budget=16, weights={"bob": 2.0}))
    for number in range(3):
        bench.submit(f"alice/{number}", prompt=4)
        bench.submit(f"bob/{number}", prompt=4)
    bench.step()
    bench.step()
    snapshot = bench.activity.snapshot({})
    alice, bob = snapshot.tenants
    assert (alice.tenant, alice.weight, bob.tenant, bob.weight) == ("alice", 1.0, "bob", 2.0)
    assert alice.running + bob.running == snapshot.running == 2
    assert alice.waiting + bob.waiting == snapshot.waiting == 4
    assert [row.service for row in snapshot.tenants] == [bench.batcher.queue.served(name) for name in ("alice", "bob")]
    assert alice.tokens_per_s + bob.tokens_per_s == snapshot.decode_tokens_per_s == pytest.approx(4 / 5)
    assert snapshot.prefill_tokens_per_s == pytest.approx(8 / 5)
    assert (snapshot.steps_per_s, snapshot.rows, snapshot.step_s) == (pytest.approx(2 / 5), 2, 1.0)


def test_a_request_that_ends_while_it_waits_leaves_the_queue():
    bench = Bench(make(running=1))
    bench.submit("alice/one", prompt=4)
    bench.batcher.end("alice/one")
    bench.activity.end("alice/one", "cancelled", bench.now + 1)
    snapshot = bench.activity.snapshot({})
    assert (snapshot.running, snapshot.waiting, snapshot.num_tenants) == (0, 0, 0)
    assert stages(snapshot, "one") == [("waiting", 0, 1)]
    assert snapshot.requests[0].outcome == "cancelled"


def test_a_snapshot_stays_small_and_survives_the_wire():
    bench = Bench(make(running=4, budget=64, blocks=4096))
    for number in range(200):
        bench.submit(f"tenant{number}/x", prompt=4, max_tokens=1)
    while len(bench.batcher) > 100:
        bench.step()
    bench.submit("tenant0/y", prompt=4, max_tokens=1)
    snapshot = bench.activity.snapshot({"worker": True})
    assert len(snapshot.tenants) == MOST_TENANTS
    assert snapshot.num_tenants == 101
    assert len(snapshot.requests) == MOST_ENDED + MOST_WAITING + snapshot.running
    assert decode(encode(snapshot)) == snapshot


def test_rates_forget():
    rate = Rate(window_s=5)
    rate.add(10, 0.0)
    rate.add(20, 3.0)
    assert rate.per_s(4.9) == 6
    assert rate.per_s(5.0) == 4
    assert rate.per_s(8.0) == 0
