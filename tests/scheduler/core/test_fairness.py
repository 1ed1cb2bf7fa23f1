"""The Virtual Token Counter: what it charges, whom it serves next, and the bound it keeps."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher
from scheduler.core.blocks import BlockPool
from scheduler.core.fairness import FairQueue, Price, service_gap_bound
from scheduler.core.policies.fair import Fair
from scheduler.core.sequence import Sequence


def sequence(tenant: str, id: str, prompt: int = 4, max_tokens: int = 4) -> Sequence:
    return Sequence(f"{tenant}/{id}", [1] * prompt, max_tokens=max_tokens, tenant=tenant)


def admitted(queue: FairQueue, count: int) -> list[str]:
    order = []
    for _ in range(count):
        head = queue.head()
        queue.admit(head)
        order.append(head.id)
    return order


def test_the_least_served_tenant_is_next_and_within_it_the_first_to_come():
    queue = FairQueue()
    for id in "123":
        queue.push(sequence("a", id, prompt=10))
    for id in "12":
        queue.push(sequence("b", id, prompt=25))
    assert admitted(queue, 5) == ["a/1", "b/1", "a/2", "a/3", "b/2"]
    assert queue.head() is None
    assert (queue.counter("a"), queue.counter("b")) == (30, 50)


def test_output_is_charged_as_it_comes_and_weights_divide_it():
    queue = FairQueue({"a": 4.0}, Price(input=1, output=2))
    a, b = sequence("a", "1", prompt=8), sequence("b", "1", prompt=8)
    queue.push(a)
    queue.push(b)
    for each in (a, b):
        queue.admit(each)
        for _ in range(4):
            queue.charge_output({each.tenant: 1})
    assert (queue.counter("a"), queue.counter("b")) == (4, 16)


def test_idleness_earns_no_credit():
    queue = FairQueue()
    for id in "12345":
        queue.push(sequence("busy", id, prompt=100))
    admitted(queue, 3)
    queue.push(sequence("late", "1"))
    assert queue.counter("late") == queue.counter("busy") == 300
    admitted(queue, 3)
    queue.push(sequence("later", "1"))
    assert queue.counter("later") == queue.counter("busy"), "nobody waits: that of the last who did"


def test_who_was_preempted_is_first_of_its_tenant_and_pays_its_prompt_once():
    queue = FairQueue()
    first, second = sequence("a", "1", prompt=10), sequence("a", "2", prompt=10)
    queue.push(first)
    queue.push(second)
    queue.admit(first)
    queue.put_back(first)
    assert queue.head() is first
    queue.admit(first)
    assert queue.counter("a") == 10


def test_a_tenant_whose_last_waiting_one_is_cancelled_is_out():
    queue = FairQueue()
    a, b = sequence("a", "1"), sequence("b", "1")
    queue.push(a)
    queue.push(b)
    queue.remove(a)
    assert list(queue) == [b]
    assert admitted(queue, 1) == ["b/1"]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    weights=st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=2, max_size=4),
    running=st.integers(1, 6),
    extra=st.integers(0, 12),
    blocks=st.integers(6, 20),
)
def test_backlogged_tenants_never_differ_by_more_than_the_bound(data, weights, running, extra, blocks):
    """Over any interval: the difference of two tenants' service moves within a band as wide as the bound."""
    tenants = [f"t{number}" for number in range(len(weights))]
    price = Price()
    batcher = Batcher(
        Limits(running, running + extra, 4 * blocks),
        BlockPool(blocks, 4),
        Fair(dict(zip(tenants, weights, strict=True))),
    )
    # Drawn once a tenant and once a request: some tenants' requests are all alike, which is what an attacker would send.
    shape = st.tuples(st.integers(1, 12), st.integers(1, 4 * blocks - 12))
    shapes = {tenant: data.draw(st.lists(shape, min_size=1, max_size=4), label=tenant) for tenant in tenants}
    sent = dict.fromkeys(tenants, 0)
    service = dict.fromkeys(tenants, 0.0)
    seen: dict[tuple[str, str], tuple[float, float]] = {}
    lightest = min(weights)
    # Within the bound at every admission; a step adds a token for everyone who runs.
    bound = (service_gap_bound(price, 12, 4 * blocks) + 2 * price.output * running) / lightest
    for _ in range(250):
        for tenant in tenants:  # always something waiting
            while sum(waiting.tenant == tenant for waiting in batcher.queue) < 2:
                sent[tenant] += 1
                prompt, output = shapes[tenant][sent[tenant] % len(shapes[tenant])]
                batcher.submit(sequence(tenant, str(sent[tenant]), prompt, output))
        plan = batcher.plan()
        batcher.apply(plan.step, [7] * plan.num_sampled)
        service = {tenant: batcher.queue.counter(tenant) for tenant in tenants}
        for one in tenants:
            for other in tenants:
                gap = service[one] - service[other]
                low, high = seen.get((one, other), (gap, gap))
                seen[one, other] = low, high = min(low, gap), max(high, gap)
                assert high - low <= bound


def test_one_tenant_with_a_hundred_requests_does_not_hold_up_another():
    batcher = Batcher(Limits(2, 16, 64), BlockPool(32, 4))
    for number in range(100):
        batcher.submit(sequence("many", str(number), prompt=8, max_tokens=4))
    for _ in range(20):
        plan = batcher.plan()
        batcher.apply(plan.step, [7] * plan.num_sampled)
    batcher.submit(sequence("few", "1", prompt=8, max_tokens=4))
    seen = set()
    for _ in range(5):  # as soon as one of the two places is free
        plan = batcher.plan()
        seen |= set(batcher.draft_of(plan).ids)
        batcher.apply(plan.step, [7] * plan.num_sampled)
    assert "few/1" in seen


def test_the_bound_is_the_papers():
    assert service_gap_bound(Price(1, 2), longest_prompt=1000, kv_tokens=200) == 2000
    assert service_gap_bound(Price(1, 2), longest_prompt=100, kv_tokens=200) == 800


@pytest.mark.parametrize("tenants", [1, 3])
def test_nobody_waits_while_there_is_room(tenants):
    batcher = Batcher(Limits(4, 64, 64), BlockPool(64, 4))
    for number in range(4):
        batcher.submit(sequence(f"t{number % tenants}", str(number)))
    assert len(batcher.plan().rows) == 4


def test_charges_are_told_once_in_units_whatever_the_weight():
    queue = FairQueue({"a": 4.0}, Price(1, 2))
    for tenant in "ab":
        queue.push(sequence(tenant, "1", 10))
        queue.admit(queue.head())
    queue.charge_output({"a": 3})
    assert queue.take_charges() == {"a": 16, "b": 10}
    assert queue.take_charges() == {}
    queue.charge_output({"b": 1})
    assert queue.take_charges() == {"b": 2}


def test_the_backlog_holds_the_counters_of_those_who_wait():
    queue = FairQueue({"a": 2.0}, Price(1, 2))
    assert queue.backlog() == {}
    for tenant, id in ("a1", "a2", "b1"):
        queue.push(sequence(tenant, id, 10))
    queue.admit(queue.head_of("a"))
    queue.charge_output({"a": 1, "b": 2})
    assert queue.backlog() == {"a": 6, "b": 4}
    queue.admit(queue.head_of("b"))
    assert queue.backlog() == {"a": 6}
