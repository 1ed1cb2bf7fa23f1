"""Who is refused for coming too late: what counts as ahead, and how far off the estimate is on a service of virtual time.

Its worker takes a fixed time for a step and some for each token. There the estimate is held to a quarter while a seat is free,
since only the number of a prompt's steps isn't known to it; behind a queue to a factor of two, since it takes the others for
alike and their output limits for what they generate.
"""

import asyncio
import contextlib
import random
from collections import deque
from types import SimpleNamespace

import pytest

from protocol.errors import DeadlineUnreachable
from protocol.plan import Pong, StepPlan, StepResult, Work, WorkerConfig
from protocol.request import Request
from scheduler.core.batcher import TokenEvent
from scheduler.core.policies.fair import Fair
from scheduler.generation import Generation, sequences_for
from scheduler.journal.entry import Entry
from scheduler.loop import Engine, StepReport
from scheduler.outlook import Outlook
from tests.scheduler.test_generation import INFO
from tests.scheduler.test_text import byte_tokenizer

FIXED_S, TOKEN_S = 0.010, 0.001
SEATS = 8
CONFIG = WorkerConfig("", "auto", "cpu", "auto", None, INFO.block_size, INFO.num_blocks, 1, SEATS, 64, None)
WEIGHTS = {"heavy": 3.0}


def weight(tenant: str) -> float:
    return WEIGHTS.get(tenant, 1.0)


def entry(
    id: str, prompt: int = 10, output: int | None = 20, *, priority: int = 0, late: bool = False, n: int = 1
) -> Entry:
    """One with ``late`` is to be refused when it can't be done at once."""
    request = Request(prompt="x", max_tokens=output, priority=priority, refuse_late=late, n=n)
    return Entry(
        id=id,
        model="tiny",
        request=request,
        prompt=[65] * prompt,
        seed=1,
        accepted_at=0.0,
        listeners=[],
        expires_at=0.0 if late else None,
    )


def report(*ids: str, tokens: int = 8, ok: bool = True) -> StepReport:
    """A step of a fixed and a known time in which each of these sequences got a token."""
    return StepReport(
        step=0,
        at=0.0,
        seconds=TOKEN_S * tokens,
        gap_s=FIXED_S,
        waited_s=0.0,
        rows=ids,
        prefill_tokens=tokens,
        decode_tokens=0,
        work=Work(1, tokens, tokens, tokens),
        running=0,
        waiting=0,
        kv_usage=0.0,
        preemptions=0,
        recomputed_tokens=0,
        late_tokens=0,
        cached_tokens=0,
        rejected_tokens=0,
        worker_restarts=0,
        ok=ok,
        events=[TokenEvent(id, 65, None) for id in ids],
    )


def warm(seats: int = 1) -> Outlook:
    """One that knows the pace."""
    outlook = Outlook(seats, weight)
    for tokens in (1, 8, 64):
        outlook.observe(report(tokens=tokens))
    return outlook


def estimate_s(outlook: Outlook, id: str, prompt: int = 10, output: int | None = 20, before=(), **given) -> float:
    with pytest.raises(DeadlineUnreachable) as caught:
        outlook.check(entry(id, prompt, output, late=True, **given), 0.0, before)
    assert caught.value.body.estimate_ms is not None
    return caught.value.body.estimate_ms / 1000


# What counts


def test_only_who_asks_for_it_is_refused_and_only_when_it_would_be_late():
    outlook = warm()
    needed_s = estimate_s(outlook, "alice/a")
    asked = entry("alice/a", late=True)
    asked.expires_at = 100.0
    outlook.check(asked, 100.0 - needed_s - 0.001)
    with pytest.raises(DeadlineUnreachable) as caught:
        outlook.check(asked, 100.0 - needed_s + 0.010)
    assert caught.value.code == "deadline_unreachable"
    silent = entry("alice/a")
    silent.expires_at = 100.0
    outlook.check(silent, 99.999)


def test_before_the_first_step_nobody_is_refused_and_a_failed_one_tells_nothing():
    outlook = Outlook(1, weight)
    outlook.check(entry("alice/a", late=True), 0.0)
    outlook.observe(report(ok=False))
    outlook.check(entry("alice/a", late=True), 0.0)


def test_the_own_tenants_requests_of_the_same_or_a_higher_priority_are_ahead():
    outlook = warm()
    idle_s = estimate_s(outlook, "alice/new", priority=5)
    for other, priority in (("alice/less", 4), ("bob/more", 9)):
        outlook.begin(entry(other, 100, 100, priority=priority))
    outlook.end("bob/more")
    assert estimate_s(outlook, "alice/new", priority=5) == pytest.approx(idle_s, abs=0.001)
    waits = []
    for number, priority in enumerate((5, 6, 100)):
        outlook.begin(entry(f"alice/{number}", 100, 100, priority=priority))
        waits.append(estimate_s(outlook, "alice/new", priority=5))
    assert idle_s < waits[0] < waits[1] < waits[2]


def test_a_tenant_has_its_weights_share_among_those_with_something_outstanding():
    def wait_s(*others: str, tenant: str) -> float:
        outlook = warm()
        outlook.begin(entry(f"{tenant}/first", 100, 100))
        alone_s = estimate_s(outlook, f"{tenant}/new", 1, 1) - FIXED_S - TOKEN_S
        for name in others:
            outlook.begin(entry(f"{name}/any", 1, 1))
        return (estimate_s(outlook, f"{tenant}/new", 1, 1) - FIXED_S - TOKEN_S) / alone_s

    assert wait_s("b", "c", tenant="a") == pytest.approx(3, rel=0.01)
    assert wait_s("heavy", tenant="a") == pytest.approx(4, rel=0.01)
    assert wait_s("a", tenant="heavy") == pytest.approx(4 / 3, rel=0.01)


def test_what_is_generated_is_no_longer_ahead_and_what_has_ended_neither():
    outlook = warm()
    idle_s = estimate_s(outlook, "alice/new")
    outlook.begin(entry("alice/a", 50, 10))
    waits = [estimate_s(outlook, "alice/new")]
    for _ in range(10):
        outlook.observe(report("alice/a", "alice/ended long ago"))
        waits.append(estimate_s(outlook, "alice/new"))
    assert waits[0] - waits[1] > 5 * (waits[1] - waits[2]) > 0, "the first token ends the prompt"
    assert waits == sorted(waits, reverse=True)
    assert waits[-1] == pytest.approx(idle_s, abs=0.001)
    outlook.end("alice/a")
    assert estimate_s(outlook, "alice/new") == pytest.approx(idle_s, abs=0.001)


def test_what_comes_in_the_same_moment_counts_as_if_it_had_begun():
    begun, about_to = warm(), warm()
    others = [entry("alice/a", 30, 30), entry("bob/b"), entry("alice/less", priority=-1), entry("alice/c", 5, 50)]
    for one in others:
        begun.begin(one)
    assert estimate_s(about_to, "alice/new", before=others) == estimate_s(begun, "alice/new")


def test_who_gives_no_limit_counts_by_what_others_generated_who_gave_none():
    outlook = warm()
    for number in range(60):
        outlook.begin(entry(f"alice/{number}", output=None))
        for _ in range(40):
            outlook.observe(report(f"alice/{number}"))
        outlook.end(f"alice/{number}")
    outlook.begin(entry("alice/unlimited", output=None))
    unlimited_s = estimate_s(outlook, "alice/new", output=None)
    outlook.end("alice/unlimited")
    outlook.begin(entry("alice/limited", output=40))
    assert estimate_s(outlook, "alice/new", output=1) == pytest.approx(unlimited_s, rel=0.05)


def test_what_an_earlier_process_generated_is_to_be_computed_and_not_to_be_generated():
    outlook, expected = warm(), warm()
    outlook.begin(entry("alice/a", 10, 100), generated=70)
    expected.begin(entry("alice/a", 80, 30))
    assert estimate_s(outlook, "alice/new") == estimate_s(expected, "alice/new")


def test_choices_of_one_request_count_as_its_sequences_over_one_prompt():
    several, apart = warm(seats=2), warm(seats=2)
    several.begin(entry("alice/a", 50, 10, n=4))
    for number in range(4):
        apart.begin(entry(f"alice/{number}", 50 if number == 0 else 0, 10))
    assert estimate_s(several, "alice/new") == estimate_s(apart, "alice/new")
    for step in range(10):
        several.observe(report(*(f"alice/a#{index}" if index else "alice/a" for index in range(4))))
        apart.observe(report(*(f"alice/{number}" for number in range(4))))
        assert estimate_s(several, "alice/new") == estimate_s(apart, "alice/new"), f"after {step + 1} tokens of each"
    several.end("alice/a")
    assert estimate_s(several, "alice/new") == pytest.approx(estimate_s(warm(seats=2), "alice/new"), rel=0.01)


def test_choices_run_beside_each_other_as_far_as_there_are_seats():
    alone_s, beside_s, in_turns_s = (estimate_s(warm(seats=4), "alice/new", n=n) for n in (1, 4, 8))
    assert alone_s < beside_s < 1.5 * alone_s
    assert in_turns_s > 1.8 * beside_s


# How far off it is


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """In the worker process's place: a step takes its time on the clock, and every token is the same."""

    info = INFO
    pid = 0
    owes_since_s = 0.0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.sent: deque[StepPlan] = deque()

    async def launch(self):
        pass

    async def get_ready(self):
        pass

    async def __aexit__(self, *_):
        pass

    async def ping(self) -> Pong:
        return Pong()

    def send(self, plan: StepPlan) -> None:
        self.sent.append(plan)

    async def receive(self) -> StepResult:
        plan = self.sent.popleft()
        seconds = FIXED_S + TOKEN_S * (len(plan.decodes) + sum(row.length for row in plan.rows))
        self.clock.now += seconds
        return StepResult(plan.step, [65] * plan.num_sampled, seconds)


class Service:
    """An engine in virtual time, and its outlook."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.outlook = Outlook(SEATS, weight)

    async def __aenter__(self):
        self._stack = await contextlib.AsyncExitStack().__aenter__()
        self.engine = Engine(CONFIG, policy=Fair(WEIGHTS), clock=self.clock)
        self.engine._worker = Worker(self.clock)
        await self._stack.enter_async_context(self.engine)
        self._running = asyncio.create_task(self.engine.run())
        return self

    async def __aexit__(self, *_):
        self._running.cancel()
        await asyncio.wait({self._running})
        await self._stack.aclose()

    def begin(self, *entries: Entry) -> None:
        for one in entries:
            self.outlook.begin(one)
            chat = SimpleNamespace(backend=byte_tokenizer(), tool_parser=lambda *_: None)
            self.engine.submit(*sequences_for(Generation.of(one, chat, 0.0), INFO))

    async def until_done(self, id: str) -> float:
        """When it was."""
        while True:
            report = await self.engine.reports.get()
            self.outlook.observe(report)
            for event in report.events:
                if event.finish is not None:
                    self.outlook.end(event.id)
                if event.finish is not None and event.id == id:
                    return report.at

    async def warm_up(self) -> None:
        """Two requests, one after the other."""
        for number in range(2):
            self.begin(entry(f"warm/{number}", 20, 30))
            await self.until_done(f"warm/{number}")

    async def ratio(self, id: str, prompt: int, output: int) -> float:
        """The estimate by what it turns out to take."""
        estimated_s = estimate_s(self.outlook, id, prompt, output)
        begun = self.clock.now
        self.begin(entry(id, prompt, output))
        return estimated_s / (await self.until_done(id) - begun)


@pytest.mark.parametrize(("prompt", "output"), [(1, 1), (1, 200), (50, 50), (300, 1), (300, 300), (900, 10)])
async def test_on_an_idle_warm_service_it_is_right_within_a_quarter(prompt, output):
    async with Service() as service:
        await service.warm_up()
        ratio = await service.ratio("alice/a", prompt, output)
        assert 0.8 < ratio < 1.25


@pytest.mark.parametrize("waiting", [4, 12, 40])
@pytest.mark.parametrize("seed", range(5))
async def test_behind_requests_of_every_length_it_is_right_within_a_factor_of_two(waiting, seed):
    draw = random.Random(seed)
    async with Service() as service:
        await service.warm_up()
        service.begin(*(entry(f"alice/{n}", draw.randint(1, 100), draw.randint(10, 100)) for n in range(waiting)))
        ratio = await service.ratio("alice/a", 20, 40)
        assert 0.5 < ratio < 2


@pytest.mark.parametrize("tenant", ["light", "heavy"])
async def test_beside_another_tenant_that_keeps_asking_it_is_right_within_a_factor_of_two(tenant):
    async with Service() as service:
        await service.warm_up()
        for name, count in (("light", 40), ("heavy", 120)):  # as much as keeps both at it to the end
            service.begin(*(entry(f"{name}/{n}", 50, 50) for n in range(count)))
        ratio = await service.ratio(f"{tenant}/a", 50, 50)
        assert 0.5 < ratio < 2
