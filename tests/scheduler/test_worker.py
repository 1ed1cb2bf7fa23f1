"""The worker process seen from the scheduler: several plans in its pipe, how long each may take, and what a failure does."""

import asyncio
import os
import signal
from types import SimpleNamespace

import pytest

from protocol import plan
from protocol.plan import Admission, Row, Sampling, StepFailure, StepPlan, StepResult
from scheduler.config import Config, EngineConfig, ModelConfig
from scheduler.worker import Worker, WorkerDied
from tests.workers.models import save, tiny

GOOD = [Row(0, 0, 3, [0], True)]
NO_SUCH_SLOT = [Row(99, 0, 3, [0], True)]


def step(number: int, rows: list[Row]) -> StepPlan:
    return StepPlan(number, [Admission(0, [5, 6, 7], Sampling(), 3)], [], rows)


class Pipe:
    """In the process's place: its output is what a test feeds."""

    def __init__(self) -> None:
        self.stdout = asyncio.StreamReader()
        self.stdin = SimpleNamespace(write=lambda _: None)
        self.killed = False

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("scheduler.worker.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


async def test_each_of_two_plans_has_its_time_from_when_the_worker_could_begin_it(clock):
    worker = Worker(Config().worker(), patience_s=60)
    worker._process = pipe = Pipe()
    worker.send(step(0, GOOD))
    clock.now = 40
    worker.send(step(1, GOOD))
    assert worker.owes_since_s == 40
    clock.now = 50
    pipe.stdout.feed_data(plan.frame(StepResult(0, [8], 0.1)))
    assert (await worker.receive()).step == 0
    assert worker.owes_since_s == 0
    clock.now = 105
    waiting = asyncio.create_task(worker.receive())
    await asyncio.sleep(0)
    pipe.stdout.feed_data(plan.frame(StepResult(1, [9], 0.1)))
    assert (await waiting).step == 1
    assert worker.owes_since_s == 0
    worker.send(step(2, GOOD))
    clock.now = 166
    with pytest.raises(WorkerDied, match="no answer within 60 s"):
        await worker.receive()
    assert pipe.killed


async def test_receiving_can_be_broken_off_anywhere_in_an_answer():
    answer = plan.frame(StepResult(0, [8], 0.1))
    for cut in range(len(answer)):
        worker = Worker(Config().worker(), patience_s=60)
        worker._process = pipe = Pipe()
        worker.send(step(0, GOOD))
        waiting = asyncio.create_task(worker.receive())
        pipe.stdout.feed_data(answer[:cut])
        for _ in range(5):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        pipe.stdout.feed_data(answer[cut:])
        assert (await worker.receive()).tokens == [8]


async def test_a_real_one_skips_what_follows_a_failure_and_goes_on_with_what_comes_after(tmp_path):
    model = ModelConfig(path=str(save(tiny("llama"), tmp_path)), threads=1)
    config = Config(model=model, engine=EngineConfig(block_size=8, num_blocks=8))
    async with Worker(config.worker(), patience_s=60) as worker:
        worker.send(step(0, GOOD))
        expected = await worker.receive()
        assert isinstance(expected, StepResult)
        worker.send(step(1, NO_SUCH_SLOT))
        worker.send(step(2, GOOD))
        failed = await worker.receive()
        assert isinstance(failed, StepFailure)
        assert (failed.step, worker.owes_since_s) == (1, 0)
        worker.send(step(3, GOOD))
        result = await worker.receive()
        assert (result.step, result.tokens) == (3, expected.tokens)
        await worker.ping()
        os.kill(worker.pid, signal.SIGKILL)
        worker.send(step(4, GOOD))
        worker.send(step(5, GOOD))
        with pytest.raises(WorkerDied, match="ended with status -9"):
            await worker.receive()


async def test_a_worker_that_still_loads_leaves_at_once():
    worker = Worker(Config().worker(), patience_s=60)
    await worker.launch()
    await worker.__aexit__(None, None, None)
    assert worker._process.returncode == -signal.SIGKILL
