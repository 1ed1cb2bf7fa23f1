"""Replicas that tell each other what they served: the gap between tenants stays bounded over all of them."""

from collections import Counter

import pytest

from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher
from scheduler.core.blocks import BlockPool
from scheduler.core.fairness import service_gap_bound
from scheduler.core.sequence import Sequence

LIMITS = Limits(max_running=4, max_batch_tokens=32, max_model_len=64)
BLOCKS, BLOCK_SIZE = 32, 8
#: Service units that one step gives at most: a token for each decode, the rest of the budget for prompts.
MOST_PER_STEP = 2 * LIMITS.max_running + (LIMITS.max_batch_tokens - LIMITS.max_running)
#: Which tenants have something waiting at each replica, all the time.
WAITING = (("alice", "bob"), ("alice",))
STEPS = 4000


class Replica:
    def __init__(self, tenants: tuple[str, ...]) -> None:
        self.batcher = Batcher(LIMITS, BlockPool(BLOCKS, BLOCK_SIZE))
        self.tenants = tenants
        self.asked = 0
        self.told: Counter[str] = Counter()

    def step(self) -> None:
        waiting = Counter(sequence.tenant for sequence in self.batcher.queue)
        for tenant in self.tenants:
            for _ in range(3 - waiting[tenant]):
                self.asked += 1
                prompt = [1] * (5 + 7 * self.asked % 20)
                length = 3 + 11 * self.asked % 30
                self.batcher.submit(Sequence(f"{tenant}/{self.asked}", prompt, max_tokens=length, tenant=tenant))
        plan = self.batcher.plan()
        self.batcher.apply(plan.step, [9] * plan.num_sampled)

    def served(self, tenant: str) -> float:
        return self.batcher.queue.served(tenant)

    def news(self) -> dict[str, float]:
        """What it served since it was asked before."""
        now = Counter({tenant: self.served(tenant) for tenant in self.tenants})
        new = {tenant: now[tenant] - self.told[tenant] for tenant in now}
        self.told = now
        return new


def largest_gap(exchange_every: int) -> float:
    """Service units by which the tenants differ, over any span of time."""
    replicas = [Replica(tenants) for tenants in WAITING]
    least = most = 0.0
    for step in range(1, STEPS + 1):
        for replica in replicas:
            replica.step()
        if step % exchange_every == 0:
            news = [replica.news() for replica in replicas]
            for number, replica in enumerate(replicas):
                for other, service in enumerate(news):
                    if other != number:
                        replica.batcher.queue.charge_elsewhere(service)
        difference = sum(replica.served("alice") - replica.served("bob") for replica in replicas)
        least, most = min(least, difference), max(most, difference)
    return most - least


@pytest.mark.parametrize("every", [1, 20, 100])
def test_the_gap_over_all_replicas_is_bounded_by_their_memory_and_what_they_serve_unheard(every):
    replicas = len(WAITING)
    price = Batcher(LIMITS, BlockPool(BLOCKS, BLOCK_SIZE)).queue.price
    bound = service_gap_bound(price, LIMITS.max_model_len, replicas * BLOCKS * BLOCK_SIZE)
    assert largest_gap(every) <= bound + 2 * (replicas - 1) * every * MOST_PER_STEP


def test_without_telling_each_other_it_grows_for_ever():
    price = Batcher(LIMITS, BlockPool(BLOCKS, BLOCK_SIZE)).queue.price
    bound = service_gap_bound(price, LIMITS.max_model_len, len(WAITING) * BLOCKS * BLOCK_SIZE)
    assert largest_gap(STEPS + 1) > 5 * bound


def test_service_elsewhere_counts_for_the_turn_and_not_as_our_own():
    queue = Batcher(LIMITS, BlockPool(BLOCKS, BLOCK_SIZE)).queue
    queue.push(Sequence("alice/1", [1], max_tokens=1, tenant="alice"))
    queue.push(Sequence("bob/1", [1], max_tokens=1, tenant="bob"))
    assert queue.head().tenant == "alice"
    queue.charge_elsewhere({"alice": 3.0, "carol": 5.0})
    assert queue.head().tenant == "bob"
    assert (queue.counter("alice"), queue.served("alice"), queue.highest) == (3.0, 0.0, 5.0)
