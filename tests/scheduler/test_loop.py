"""The loop with a worker that answers when it is told to: what is in its pipe when, and what becomes of that."""

import asyncio
import contextlib
from collections.abc import Callable

import pytest

from protocol.plan import StepFailure, StepPlan, StepResult, WorkerConfig
from scheduler.core.sequence import Sequence
from scheduler.loop import Engine, Patience, StepReport
from scheduler.worker import WorkerDied
from tests.leads import AtOnce, Never
from tests.scheduler.test_generation import INFO

CONFIG = WorkerConfig("", "auto", "cpu", "auto", None, INFO.block_size, INFO.num_blocks, 1, 8, 64, None)
TOKEN, EOS = 65, 2


class Worker:
    """In the worker process's place."""

    info = INFO
    pid = 0
    owes_since_s = 0.0

    def __init__(self) -> None:
        self.sent: list[StepPlan] = []
        self.alive = True
        self._answers: asyncio.Queue[StepResult | StepFailure | WorkerDied] = asyncio.Queue()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def launch(self) -> None:
        pass

    async def get_ready(self) -> None:
        pass

    def send(self, plan: StepPlan) -> None:
        self.sent.append(plan)

    async def receive(self) -> StepResult | StepFailure:
        answer = await self._answers.get()
        if isinstance(answer, WorkerDied):
            raise answer
        return answer

    async def ping(self) -> None:
        if not self.alive:
            raise WorkerDied("killed")

    def pass_(self, step: int, token: int = TOKEN, seconds: float = 0.01, waited_s: float = 0.0) -> None:
        (plan,) = [plan for plan in self.sent if plan.step == step]
        tokens = [token] * plan.num_sampled
        self._answers.put_nowait(StepResult(step, tokens, seconds, waited_s))

    def fail(self, step: int) -> None:
        self._answers.put_nowait(StepFailure(step, "an injected failure"))

    def die(self) -> None:
        self._answers.put_nowait(WorkerDied("killed"))


class Scene:
    """An engine at work; ``now`` is its clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lead=None, **patience: float) -> None:
        self.now = 0.0
        self.worker = Worker()
        self.next_worker = Worker()
        workers = iter((self.worker, self.next_worker))
        monkeypatch.setattr("scheduler.loop.Worker", lambda *_: next(workers))
        self.engine = Engine(CONFIG, Patience(**patience), clock=lambda: self.now, lead=lead or AtOnce())

    async def __aenter__(self):
        self._stack = await contextlib.AsyncExitStack().__aenter__()
        await self._stack.enter_async_context(self.engine)
        self._running = asyncio.create_task(self.engine.run())
        return self

    async def __aexit__(self, *_):
        self._running.cancel()
        await asyncio.wait({self._running})
        await self._stack.aclose()

    def submit(self, id: str, *, prompt: int = 3, tokens: int = 4) -> None:
        self.engine.submit(Sequence(id, list(range(5, 5 + prompt)), max_tokens=tokens, stop_ids=frozenset({EOS})))

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                assert not self._running.done()
                await asyncio.sleep(0)

    async def sent(self, count: int) -> StepPlan:
        """The last of so many plans in all, once they are sent; no more are."""
        await self.until(lambda: len(self.worker.sent) >= count)
        for _ in range(10):  # turns of the event loop in which one too many would come
            await asyncio.sleep(0)
        assert len(self.worker.sent) == count
        return self.worker.sent[-1]

    async def report(self) -> StepReport:
        async with asyncio.timeout(10):
            return await self.engine.reports.get()

    def check_empty(self) -> None:
        assert len(self.engine.batcher) == 0
        assert self.engine.batcher.pool.num_free == self.engine.batcher.pool.num_blocks


async def test_there_is_one_more_step_in_the_pipe_while_one_runs_and_none_that_isnt_needed(monkeypatch):
    async with Scene(monkeypatch) as scene:
        scene.submit("a", tokens=4)
        ahead = await scene.sent(2)
        assert scene.engine.reports.empty()
        assert (ahead.decodes, ahead.rows) == ([0], []), "the last token never left the device"
        for step, sent in ((0, 3), (1, 4), (2, 4), (3, 4)):
            scene.worker.pass_(step)
            assert (await scene.report()).step == step
            await scene.sent(sent)
        scene.check_empty()
        assert scene.engine.batcher.counters.late_tokens == 0


@pytest.mark.parametrize(("lead", "step"), [(Never(), 1), (AtOnce(), 2)])
async def test_an_arrival_joins_the_next_step_that_is_planned(monkeypatch, lead, step):
    async with Scene(monkeypatch, lead) as scene:
        scene.submit("a")
        await scene.sent(step)
        scene.submit("b")
        scene.worker.pass_(0)
        plan = await scene.sent(step + 1)
        assert [len(plan.decodes) + len(plan.rows) for plan in scene.worker.sent] == [1] * step + [2]
        assert plan.step == step


async def test_what_is_sampled_after_an_end_that_was_not_known_is_dropped_and_counted(monkeypatch):
    async with Scene(monkeypatch) as scene:
        scene.submit("a", tokens=9)
        await scene.sent(2)
        scene.worker.pass_(0, EOS)
        (event,) = (await scene.report()).events
        assert (event.token, event.finish) == (EOS, "stop")
        scene.submit("b", tokens=1)
        assert (await scene.sent(3)).rows[0].slot == 0, "in the place of the other one"
        scene.worker.pass_(1)
        late = await scene.report()
        assert (late.events, late.late_tokens) == ([], 1)
        scene.worker.pass_(2)
        assert [event.id for event in (await scene.report()).events] == ["b"]
        scene.check_empty()


async def test_a_cancel_wastes_a_token_for_each_step_in_flight(monkeypatch):
    async with Scene(monkeypatch) as scene:
        scene.submit("a", tokens=9)
        await scene.sent(2)
        assert scene.engine.end("a") is not None
        scene.worker.pass_(0)
        assert (await scene.report()).late_tokens == 1
        scene.worker.pass_(1)
        last = await scene.report()
        assert (last.events, last.late_tokens) == ([], 2)
        await scene.sent(2)
        scene.check_empty()


async def test_a_failure_with_another_step_in_flight_makes_both_void(monkeypatch):
    async with Scene(monkeypatch) as scene:
        scene.submit("a")
        await scene.sent(2)
        scene.submit("b", prompt=20)
        scene.worker.pass_(0)
        assert [event.id for event in (await scene.report()).events] == ["a"]
        both = await scene.sent(3)
        assert (both.decodes, [row.slot for row in both.rows]) == ([0], [1])
        scene.worker.fail(1)
        failed = await scene.report()
        assert (failed.step, failed.ok, failed.rows, failed.events) == (1, False, ("a",), [])
        assert list(failed.starts) == ["b"], "it was admitted with the step after, which nobody reports"
        await scene.until(lambda: len(scene.worker.sent) == 5)
        trial = scene.worker.sent[3]
        assert [(admission.slot, admission.tokens[3:]) for admission in trial.admissions] == [(0, [TOKEN])]
        assert [(row.slot, row.start, row.length) for row in trial.rows] == [(0, 3, 1)], "again, and alone"
        events = []
        while len(scene.engine.batcher):
            scene.worker.pass_(failed.step + 2 + len(events))
            events.append((await scene.report()).events)
            await asyncio.sleep(0)
        generated = [event.id for each in events for event in each]
        assert (generated.count("a"), generated.count("b")) == (3, 4)
        scene.check_empty()


async def test_a_death_with_another_step_in_flight_is_one_failure_and_all_is_computed_again(monkeypatch):
    async with Scene(monkeypatch) as scene:
        scene.submit("a")
        await scene.sent(2)
        scene.worker.pass_(0)
        await scene.report()
        await scene.sent(3)
        scene.worker.die()
        failed = await scene.report()
        assert (failed.step, failed.ok) == (1, False)
        scene.worker = scene.next_worker
        again = await scene.sent(2)
        assert [admission.tokens for admission in scene.worker.sent[0].admissions] == [[5, 6, 7, TOKEN]]
        assert [(row.start, row.length) for row in scene.worker.sent[0].rows] == [(0, 4)]
        assert (again.decodes, again.rows) == ([0], [])
        for plan in [*scene.worker.sent]:
            scene.worker.pass_(plan.step)
            assert (await scene.report()).worker_restarts == 1
        scene.worker.pass_((await scene.sent(3)).step)
        assert (await scene.report()).events[0].finish == "length"
        scene.check_empty()


async def test_the_one_at_fault_is_given_up_with_steps_in_flight(monkeypatch):
    async with Scene(monkeypatch, attempts=2) as scene:
        scene.submit("a")
        await scene.sent(2)
        scene.worker.fail(0)
        assert (await scene.report()).given_up == []
        await scene.sent(4)
        scene.worker.fail(2)
        (failure,) = (await scene.report()).given_up
        assert (failure.id, failure.crashed, failure.failures) == ("a", False, 2)
        await scene.sent(4)
        scene.check_empty()


async def test_a_report_tells_the_time_between_results_and_what_of_it_the_worker_waited(monkeypatch):
    async with Scene(monkeypatch) as scene:
        scene.now = 5.0
        scene.submit("a")
        await scene.sent(2)
        scene.now = 15.0
        scene.worker.pass_(0, seconds=9.0, waited_s=5.0)
        first = await scene.report()
        assert (first.seconds + first.gap_s, first.waited_s) == (10.0, 0.0), "it had waited for want of work"
        await scene.sent(3)
        scene.now = 23.0
        scene.worker.pass_(1, seconds=7.5, waited_s=0.25)
        second = await scene.report()
        assert (second.seconds + second.gap_s, second.waited_s) == (8.0, 0.25)


async def test_after_the_death_of_an_idle_worker_nothing_is_taken_from_the_prefix_cache(monkeypatch):
    async with Scene(monkeypatch, heartbeat_s=0.01) as scene:
        scene.submit("a", prompt=40, tokens=1)
        await scene.sent(1)
        scene.worker.pass_(0)
        await scene.report()
        scene.worker.alive = False
        await scene.until(lambda: scene.engine.worker_restarts == 1)
        scene.worker = scene.next_worker
        scene.submit("b", prompt=40, tokens=1)
        assert [(row.start, row.length) for row in (await scene.sent(1)).rows] == [(0, 40)]
