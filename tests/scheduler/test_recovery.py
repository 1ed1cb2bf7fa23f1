"""What an earlier process accepted: taken up with suspects first and alone, told its end, or given up, and never twice."""

import asyncio
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import msgspec

from protocol import replies
from protocol.plan import Pong, StepPlan, StepResult, WorkerConfig
from protocol.replies import Accepted, Chunk, Expired, Failed, Quarantined, Result
from protocol.request import Request
from scheduler.admission import Admission, Bounds
from scheduler.console.activity import Activity
from scheduler.journal.entry import Entry, Listener, Piece
from scheduler.journal.sqlite import SqliteJournal
from scheduler.loop import Engine
from scheduler.metrics.series import Metrics
from scheduler.mqtt.delivery import Delivery
from scheduler.mqtt.egress import Egress
from scheduler.outlook import Outlook
from scheduler.quotas import Quota
from scheduler.recovery import Recovery
from scheduler.tracing import NoTracing
from tests.leads import Never
from tests.scheduler.test_generation import INFO
from tests.scheduler.test_text import byte_tokenizer

ATTEMPTS = 3
TENANT = "tokenbus/v1/alice"
TOKENIZER = byte_tokenizer()
(LETTER,) = TOKENIZER.encode("x").ids
CONFIG = WorkerConfig("", "auto", "cpu", "auto", None, INFO.block_size, INFO.num_blocks, 1, 8, 64, None)


class Broker:
    """In the transport's place: keeps what is published."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes]] = []

    async def publish(self, topic: str, payload: bytes, *, correlation: bytes | None = None) -> None:
        self.published.append((topic, payload))

    def publish_nowait(self, topic: str, payload: bytes, *, correlation: bytes | None = None) -> bool:
        self.published.append((topic, payload))
        return True

    def told(self, name: str) -> list[replies.Reply]:
        return [replies.decode_reply(payload) for topic, payload in self.published if topic == f"{TENANT}/out/{name}"]

    def chunks(self, name: str) -> list[Chunk]:
        return [reply for reply in self.told(name) if isinstance(reply, Chunk)]

    def terminal(self, name: str) -> list[replies.Terminal]:
        return [reply for reply in self.told(name) if isinstance(reply, replies.TERMINAL)]


class Journal(SqliteJournal):
    """One that says which trials are on disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, retention_s=3600, max_bytes=2**30)
        self.on_trial: set[str] = set()

    async def trial(self, id: str, *, begins: bool) -> None:
        await super().trial(id, begins=begins)
        (self.on_trial.add if begins else self.on_trial.discard)(id.partition("/")[2])


@dataclass
class Seen:
    """One step as the worker saw it: who was in it, whose trials were on disk by then, and what each slot was given."""

    names: list[str]
    on_trial: set[str]
    given: list[list[int]]


@dataclass
class Worker:
    """In the worker process's place: every token is the same letter. It answers to a step with ``fatal`` in it when released."""

    journal: Journal
    fatal: str | None = None
    info = INFO
    pid = 0
    owes_since_s = 0.0
    steps: list[Seen] = field(default_factory=list)
    sent: deque[tuple[StepPlan, bool]] = field(default_factory=deque)
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    release: asyncio.Event = field(default_factory=asyncio.Event)

    async def launch(self):
        pass

    async def get_ready(self):
        pass

    async def __aexit__(self, *_):
        pass

    async def ping(self) -> Pong:
        return Pong()

    def send(self, plan: StepPlan) -> None:
        names = [id.partition("/")[2] for id in self.engine.batcher.draft_of(plan).ids]
        self.steps.append(Seen(names, set(self.journal.on_trial), [admission.tokens for admission in plan.admissions]))
        self.sent.append((plan, self.fatal in names))

    async def receive(self) -> StepResult:
        plan, fatal = self.sent[0]
        if fatal:
            self.reached.set()
            await self.release.wait()
        await asyncio.sleep(0)  # a real one takes time, in which others have their turn
        self.sent.popleft()
        return StepResult(plan.step, [LETTER] * plan.num_sampled, 0.001)


class Process:
    """One process of a service, from the journal to the replies; only the broker and the worker are made up."""

    def __init__(self, path: Path, *, model: str = "tiny", fatal: str | None = None) -> None:
        self.broker = Broker()
        self._path = path
        self._model = model
        self._fatal = fatal

    async def __aenter__(self):
        self._stack = await contextlib.AsyncExitStack().__aenter__()
        enter = self._stack.enter_async_context
        self.journal = await enter(Journal(self._path))
        self.engine = Engine(CONFIG, lead=Never())
        self.worker = self.engine._worker = Worker(self.journal, self._fatal)
        self.worker.engine = await enter(self.engine)
        group = await enter(asyncio.TaskGroup())
        self.admission = Admission(Bounds(100, 10_000, 16, lambda _: Quota(100)), self.engine.now)
        self.metrics = Metrics()
        self.delivery = Delivery(self.broker, self.journal, group, self.metrics)
        chat = SimpleNamespace(backend=TOKENIZER, tool_parser=lambda *_: None)
        self.outlook = Outlook(8, lambda _: 1.0)
        self.egress = Egress(
            self.delivery,
            self.journal,
            self.engine,
            chat,
            self.admission,
            self.outlook,
            self.metrics,
            Activity(self.engine, "tiny"),
            NoTracing(),
            0.001,
        )
        parts = (self.journal, self.engine, self.admission, self.delivery, self.egress)
        loops = (self.engine.run(), self.egress.run(), self.egress.flush_regularly(), self.egress.expire_overdue())
        self._tasks = [group.create_task(loop) for loop in loops]
        self.recovery = group.create_task(Recovery(*parts, model=self._model, attempts=ATTEMPTS).run())
        return self

    async def __aexit__(self, *_):
        for task in (*self._tasks, self.recovery):
            task.cancel()
        await self._stack.aclose()

    async def settle(self) -> None:
        """Until everything has ended and the broker knows."""
        async with asyncio.timeout(20):
            await self.recovery
            await self.egress.wait_empty()
            await self.delivery.wait_empty()
        assert self.admission.outstanding == 0


def entry(name: str, *, attempt: int = 1, tokens: int = 4, **given) -> Entry:
    """``attempt`` is how many processes took it up before."""
    return Entry(
        id=f"alice/{name}",
        model="tiny",
        request=Request(prompt=[65, 66], max_tokens=tokens, stream=True),
        prompt=[65, 66],
        seed=1,
        accepted_at=1000.0,
        listeners=[Listener(f"{TENANT}/out/{name}")],
        attempt=attempt,
        **given,
    )


async def leave(path: Path, *entries: Entry, ended: dict[str, bytes] | None = None) -> None:
    """What processes before this one left behind."""
    async with Journal(path) as journal:
        await journal.accept(entries)
        for one in entries:
            await journal.progress([(one.id, number, piece) for number, piece in enumerate(one.pieces)])
            for _ in range(one.trials):
                await journal.trial(one.id, begins=True)
        for name, reply in (ended or {}).items():
            await journal.end(f"alice/{name}", reply)


async def unfinished(path: Path) -> dict[str, tuple[int, int]]:
    """Attempt and trials of what is left to the next process. Opening it counts as one, too."""
    async with Journal(path) as journal:
        return {one.request_id: (one.attempt, one.trials) for one in journal.unfinished()}


async def test_an_ordinary_request_goes_on_after_its_journalled_tokens(path):
    await leave(path, entry("a", tokens=5, pieces=[Piece([LETTER]), Piece([LETTER, LETTER])]))
    async with Process(path) as process:
        await process.settle()
        first, *_ = process.worker.steps
        assert first.given == [[65, 66, LETTER, LETTER, LETTER]]
        assert len(process.worker.steps) == 2, "two tokens were missing"
        assert Accepted("a") in process.broker.told("a")
        chunks = process.broker.chunks("a")
        assert [chunk.seq for chunk in chunks] == list(range(1, 1 + len(chunks))), "the last one, which may be lost, on"
        assert chunks[0].text == "xx"
        (result,) = process.broker.terminal("a")
        assert (result.text, result.attempt, result.usage.completion_tokens) == ("xxxxx", 2, 5)
    assert await unfinished(path) == {}


async def test_nobody_is_a_suspect_before_it_was_taken_up_more_often_than_allowed(path):
    await leave(path, entry("a", attempt=ATTEMPTS - 1), entry("b"))
    async with Process(path) as process:
        await process.settle()
        assert process.worker.steps[0].names == ["a", "b"]
        assert not any(step.on_trial for step in process.worker.steps)


async def test_suspects_run_one_at_a_time_before_anyone_else_with_a_trial_counted(path):
    await leave(path, entry("plain"), entry("one", attempt=3), entry("other", attempt=7), entry("plain too", attempt=2))
    async with Process(path) as process:
        await process.settle()
        steps = process.worker.steps
        assert (steps[0].names, steps[0].on_trial) == (["one"], {"one"})
        second = next(step for step in steps if "other" in step.names)
        assert second.on_trial == {"other"}
        both_through = next(number for number, step in enumerate(steps) if "plain" in step.names)
        assert both_through > steps.index(second)
        assert all(len(step.names) == 1 for step in steps[:both_through]), (
            "nor is one that got through with the next one"
        )
        assert not any(step.on_trial for step in steps[both_through:])
        assert steps[both_through].names[-2:] == ["plain", "plain too"]
        attempts = {name: process.broker.terminal(name)[0].attempt for name in ("plain", "one", "other")}
        assert attempts == {"plain": 2, "one": 4, "other": 8}
    assert await unfinished(path) == {}


async def test_a_suspect_that_ends_at_once_does_not_hold_up_the_others(path):
    await leave(path, entry("one", attempt=3, tokens=1), entry("gone", attempt=3, tokens=5000), entry("plain"))
    async with Process(path) as process:
        await process.settle()
        assert [step.names for step in process.worker.steps[:2]] == [["one"], ["plain"]]
        (error,) = process.broker.terminal("gone")
        assert error.error.code == "context_length_exceeded"
        assert process.journal.on_trial == set()


async def test_a_request_that_takes_every_process_with_it_is_quarantined_and_nobody_else(path):
    await leave(path, entry("fatal", attempt=3), entry("innocent", attempt=3), entry("plain"))
    for count in range(1, ATTEMPTS + 1):
        async with Process(path, fatal="fatal") as process:
            await process.worker.reached.wait()
            assert [(step.names, step.on_trial) for step in process.worker.steps] == [(["fatal"], {"fatal"})]
        assert (await unfinished(path))["fatal"][1] == count
    async with Process(path, fatal="fatal") as process:
        await process.settle()
        assert not any("fatal" in step.names for step in process.worker.steps)
        (failed,) = process.broker.told("fatal")
        assert isinstance(failed, Failed)
        assert (failed.error.code, failed.error.type) == ("quarantined", "server_error")
        (dead,) = [payload for topic, payload in process.broker.published if topic == f"{TENANT}/dead/fatal"]
        told = msgspec.json.decode(dead, type=Quarantined)
        assert told == Quarantined("fatal", failed.error.message, ATTEMPTS)
        assert process.metrics.registry.get_sample_value("tokenbus_requests_quarantined_total") == 1
        assert "died 3 times" in told.reason
        assert [type(process.broker.terminal(name)[0]) for name in ("innocent", "plain")] == [Result, Result]
    assert await unfinished(path) == {}


async def test_a_model_that_is_no_longer_served_ends_its_requests(path):
    await leave(path, entry("a"), entry("suspect", attempt=9, trials=ATTEMPTS))
    async with Process(path, model="huge") as process:
        await process.settle()
        assert process.worker.steps == []
        for name, attempt in (("a", 2), ("suspect", 10)):
            (failed,) = process.broker.told(name)
            assert (failed.error.code, failed.error.param, failed.attempt) == ("model_not_found", "model", attempt)
            assert failed.error.message == "model: tiny is no longer served here, huge is"
    assert await unfinished(path) == {}


async def test_what_is_overdue_ends_as_expired_and_is_not_computed(path):
    overdue = entry("a", expires_at=1001.0, pieces=[Piece([LETTER]), Piece([LETTER, LETTER])])
    await leave(path, overdue, entry("suspect", attempt=3, expires_at=1001.0), entry("in time", expires_at=1e11))
    async with Process(path) as process:
        await process.settle()
        assert {name for step in process.worker.steps for name in step.names} == {"in time"}
        assert process.broker.told("a") == [Expired("a", 3, attempt=2)]
        assert process.broker.told("suspect") == [Expired("suspect", 0, attempt=4)]
        assert isinstance(process.broker.terminal("in time")[0], Result)
        assert process.journal.on_trial == set()
    assert await unfinished(path) == {}


async def test_a_suspect_that_passed_and_expires_during_the_next_ones_trial_is_not_run_again(path):
    due = time.time() + 1
    await leave(path, entry("first", attempt=3, tokens=900, expires_at=due), entry("fatal", attempt=3))
    async with Process(path, fatal="fatal") as process:
        await process.worker.reached.wait()
        while not process.broker.terminal("first"):
            await asyncio.sleep(0.01)
        assert time.time() >= due
        process.egress.cancel("alice/fatal")
        process.worker.release.set()
        await process.settle()
        assert len(process.engine.batcher) == 0
        assert [step.names for step in process.worker.steps][-2:] == [["first"], ["fatal"]]
        (expired,) = process.broker.terminal("first")
        assert isinstance(expired, Expired)
        assert 0 < expired.completion_tokens < 900
    assert await unfinished(path) == {}


async def test_an_end_that_may_not_have_arrived_is_told_again_with_the_higher_attempt(path):
    ends = {
        "cancelled": replies.Cancelled("cancelled", 3, attempt=1),
        "expired": Expired("expired", 3, attempt=1),
        "failed": Failed("failed", replies.ErrorBody("it failed", "internal"), attempt=4),
    }
    entries = [entry("cancelled"), entry("expired"), entry("failed", attempt=4)]
    for one in entries:
        one.listeners = [*one.listeners, Listener(f"{TENANT}/out/second-{one.request_id}")]
    await leave(path, *entries, ended={name: replies.encode(reply) for name, reply in ends.items()})
    async with Process(path, model="huge") as process:  # what has ended is told whatever is served
        await process.settle()
        assert process.worker.steps == []
        for name, reply in ends.items():
            expected = [msgspec.structs.replace(reply, attempt=reply.attempt + 1)]
            assert process.broker.told(name) == expected == process.broker.told(f"second-{name}")
    assert await unfinished(path) == {}


async def test_a_chunk_that_may_not_have_arrived_is_published_again(path):
    await leave(path, entry("a", pieces=[Piece([LETTER]), Piece([LETTER, LETTER])]))
    async with Process(path, fatal="a") as process:
        await process.worker.reached.wait()
        assert [(chunk.seq, chunk.text) for chunk in process.broker.chunks("a")] == [(1, "xx")]


async def test_of_choices_that_were_journalled_together_each_ones_chunk_is_published_again(path):
    pieces = [Piece([LETTER], choice=choice) for choice in (0, 1, 0, 1)]
    left = entry("a", pieces=pieces)
    left.request = msgspec.structs.replace(left.request, n=2, temperature=1.0)
    await leave(path, left)
    async with Process(path) as process:
        await process.settle()
        seqs = [chunk.seq for chunk in process.broker.chunks("a")]
        assert seqs == list(range(2, 2 + len(seqs)))
