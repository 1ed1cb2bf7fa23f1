"""The worker's side of the pipe: what it does in which order, and what it says of it. No model is needed for that."""

import io

import pytest

from protocol.plan import (
    HEADER_BYTES,
    Ping,
    Pong,
    Resume,
    StepFailure,
    StepPlan,
    StepResult,
    body_length,
    decode_reply,
    frame,
)
from workers import __main__ as worker
from workers.ranks import Ranks


class Runner:
    """Runs steps that compute nothing; fails those it is told to."""

    def __init__(self, *failing: int) -> None:
        self.failing = failing
        self.ran: list[int] = []

    def step(self, plan: StepPlan) -> StepResult:
        self.ran.append(plan.step)
        if plan.step in self.failing:
            raise RuntimeError("an injected failure")
        return StepResult(plan.step, [], 0.5)


def work(runner: Runner, *commands, pipe: type[io.BytesIO] = io.BytesIO) -> list:
    """Every reply to these commands."""
    replies = io.BytesIO()
    worker.work(runner, Ranks(1), pipe(b"".join(map(frame, commands))), replies)
    replies.seek(0)
    return [decode_reply(replies.read(body_length(header))) for header in iter(lambda: replies.read(HEADER_BYTES), b"")]


def plan(step: int) -> StepPlan:
    return StepPlan(step, [], [], [])


class Beside(Ranks):
    """There are others; leaving is noted."""

    def leave(self, status: int) -> None:
        raise SystemExit(status)


def test_a_rank_whose_step_fails_ends_without_an_answer():
    replies = io.BytesIO()
    with pytest.raises(SystemExit, match="1"):
        worker.work(Runner(0), Beside(2), io.BytesIO(frame(plan(0)) + frame(plan(1))), replies)
    assert replies.getvalue() == b""


def test_plans_made_before_a_failure_was_known_are_neither_executed_nor_answered():
    runner = Runner(1, 4)
    commands = [plan(0), plan(1), plan(2), plan(3), Resume(), plan(4), Ping(), plan(5), Resume(), plan(6)]
    replies = work(runner, *commands)
    assert runner.ran == [0, 1, 4, 6]
    assert [type(reply) for reply in replies] == [StepResult, StepFailure, StepFailure, Pong, StepResult]
    assert [reply.step for reply in replies if not isinstance(reply, Pong)] == [0, 1, 4, 6]
    assert replies[1].error == "RuntimeError: an injected failure"


def test_a_result_tells_how_long_the_plan_was_waited_for(monkeypatch):
    now = 0.0

    class Slow(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            nonlocal now
            now += 1.0
            return super().read(size)

    class Working(Runner):
        def step(self, plan: StepPlan) -> StepResult:
            nonlocal now
            now += 100.0
            return super().step(plan)

    monkeypatch.setattr(worker.time, "perf_counter", lambda: now)
    replies = work(Working(), plan(0), plan(1), pipe=Slow)
    assert [(reply.seconds, reply.waited_s) for reply in replies] == [(0.5, pytest.approx(2.0))] * 2
