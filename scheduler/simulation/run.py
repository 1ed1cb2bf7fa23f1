"""The loop: arrivals in, plan, let the clock pass by what the step costs, give each row its token, apply, again."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from protocol.plan import StepPlan
from scheduler.budget import Budget
from scheduler.core import policies
from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher, CapacityError
from scheduler.core.blocks import BlockPool
from scheduler.core.fairness import Price, service_gap_bound
from scheduler.core.policies import PolicyName
from scheduler.core.sequence import Sequence
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.cost import CostModel
from scheduler.simulation.figures import Figures, TenantFigures
from scheduler.simulation.gap import ServiceGap
from scheduler.simulation.measure import Measure

#: Prompt tokens that no other request has are numbered from here on, those of a tenant's common prefix below it.
_OWN = 1 << 32

#: Told how many requests have ended, and the simulated seconds.
Watch = Callable[[int, float], None]


class Stuck(RuntimeError):
    """The policy has sequences and plans nothing: it would wait for ever."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is simulated. With ``prefix_tokens`` every prompt of a tenant begins with the same so many, and the cache is on."""

    policy: PolicyName
    cost: CostModel
    limits: Limits
    num_blocks: int
    block_size: int = 16
    weights: Mapping[str, float] = field(default_factory=dict)
    prefix_tokens: int = 0
    itl_target_s: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures, and the service gap over time: (seconds, how far the furthest two tenants that wait have got apart)."""

    figures: Figures
    gap_history: list[tuple[float, float]]


def run(arrivals: Iterator[Arrival], setup: Setup, watch: Watch = lambda _ended, _now: None) -> Outcome:
    """Simulate until everything that came has ended. Raises Stuck, or what ``arrivals`` does."""
    simulation = Simulation(arrivals, setup, Measure())
    simulation.finish(watch)
    return simulation.outcome()


class Simulation:
    """``measure`` may go on from an earlier simulation and is of both then; ``outcome`` is for one that had it from the start."""

    def __init__(self, arrivals: Iterator[Arrival], setup: Setup, measure: Measure) -> None:
        self._setup = setup
        self._arrivals = arrivals
        self._next = next(arrivals, None)
        self._price = Price()
        pool = BlockPool(setup.num_blocks, setup.block_size, prefix_cache=setup.prefix_tokens > 0)
        policy = policies.create(setup.policy, weights=setup.weights, price=self._price)
        self.batcher = Batcher(setup.limits, pool, policy)
        self.measure = measure
        self.gap = ServiceGap()
        self.now = 0.0
        self._budget = Budget(setup.itl_target_s)
        self._lengths = [0] * setup.limits.max_running

    def finish(self, watch: Watch) -> None:
        """Until everything that came has ended. Raises Stuck, or what ``arrivals`` does."""
        while self.advance():
            if self.measure.steps % 256 == 0:
                watch(self.measure.requests - len(self.batcher), self.now)

    def advance(self) -> bool:
        """One step, or a jump to the next arrival. False when all is over."""
        preemptions = self.batcher.counters.preemptions
        plan = self.batcher.plan(self._budget.tokens())
        if plan is not None:
            if plan.admissions or self.batcher.counters.preemptions > preemptions:
                self._observe()
            self._step(plan)
        elif self._next is not None:
            self.now = self._next.at
            self._let_in(self.now)
        elif len(self.batcher):
            raise Stuck(f"{self._setup.policy} leaves {len(self.batcher)} sequences for ever")
        else:
            return False
        return True

    def outcome(self) -> Outcome:
        return Outcome(self._figures(), self.gap.history)

    def _step(self, plan: StepPlan) -> None:
        work = self.batcher.draft_of(plan).work
        seconds = self._setup.cost.seconds(work)
        self._budget.observe(work.tokens, seconds)
        self.measure.stored(seconds, self.batcher.running.values(), self._setup.block_size)
        self._let_in(self.now + seconds)
        self.now += seconds
        events = self.batcher.apply(plan.step, self._positions(plan))
        self.measure.stepped(self.now, [event.id for event in events])
        self._observe()

    def _positions(self, plan: StepPlan) -> list[int]:
        """A token is the number of its position, so that a stop token can name the position where a request stops."""
        lengths = self._lengths
        for slot in plan.decodes:
            lengths[slot] += 1
        tokens = [lengths[slot] for slot in plan.decodes]
        for row in plan.rows:
            lengths[row.slot] = row.start + row.length
            if row.sample:
                tokens.append(lengths[row.slot])
        return tokens

    def _let_in(self, until: float) -> None:
        """Submit what comes until then: the batcher hears of it while a step runs."""
        begins_to_wait = False
        while self._next is not None and self._next.at <= until:
            begins_to_wait = begins_to_wait or not self.batcher.queue.waits(self._next.tenant)
            self._submit(self._next)
            self._next = next(self._arrivals, None)
        if begins_to_wait:
            self._observe()

    def _submit(self, arrival: Arrival) -> None:
        stop = arrival.prompt + arrival.output - 1
        sequence = Sequence(
            str(self.measure.requests),
            self._prompt(arrival),
            max_tokens=arrival.max_tokens,
            stop_ids=frozenset((stop,)) if arrival.max_tokens > arrival.output else frozenset(),
            tenant=arrival.tenant,
        )
        try:
            self.batcher.submit(sequence)
        except CapacityError:
            self.measure.refused += 1
            return
        if arrival.tenant not in self.measure.tenants:
            self.gap.watch(arrival.tenant)
        self.measure.came(arrival)

    def _prompt(self, arrival: Arrival) -> list[int]:
        common = min(self._setup.prefix_tokens, arrival.prompt)
        if not common:
            return [0] * arrival.prompt
        tenant = self.measure.tenants.get(arrival.tenant, len(self.measure.tenants))
        return [tenant] * common + [_OWN + self.measure.requests] * (arrival.prompt - common)

    def _observe(self) -> None:
        self.gap.observe(self.now, self.batcher.queue.served, self.batcher.queue.waits)

    def _figures(self) -> Figures:
        measure, queue = self.measure, self.batcher.queue
        seconds = self.now or 1.0
        lightest = min((self._setup.weights.get(tenant, 1.0) for tenant in measure.tenants), default=1.0)
        kv_tokens = self._setup.num_blocks * self._setup.block_size
        return Figures(
            policy=self._setup.policy,
            cost_model=self._setup.cost.name,
            requests=measure.requests,
            refused=measure.refused,
            seconds=self.now,
            steps=measure.steps,
            prompt_tokens=measure.prompt_tokens(),
            output_tokens=measure.output_tokens(),
            output_tokens_per_s=measure.output_tokens() / seconds,
            ttft_s=measure.ttft_s(),
            itl_s=measure.itl_s(),
            e2e_s=measure.e2e_s(),
            max_service_gap=self.gap.widest,
            service_gap_bound=service_gap_bound(self._price, measure.longest_prompt, kv_tokens) / lightest,
            service_gap_tenants=len(self.gap.tenants),
            kv_waste_ratio=measure.kv_waste_ratio,
            preemptions=self.batcher.counters.preemptions,
            tenants={
                name: TenantFigures(
                    requests=len(which),
                    output_tokens=measure.output_tokens(which, number),
                    output_tokens_per_s=measure.output_tokens(which, number) / seconds,
                    service=queue.served(name),
                    ttft_s=measure.ttft_s(which),
                    itl_s=measure.itl_s(number),
                    e2e_s=measure.e2e_s(which),
                )
                for name, number, which in measure.by_tenant()
            },
        )
