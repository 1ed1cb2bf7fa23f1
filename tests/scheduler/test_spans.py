"""What a collector is told of a request, and what it isn't."""

import asyncio
import struct
import subprocess
import sys
from contextlib import suppress

import msgspec
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from protocol.errors import ServiceError
from protocol.openai import Answer, answer
from protocol.prefill import EmbeddingRequest
from protocol.replies import Cancelled, Failed, Result, Terminal
from protocol.request import Message, Request
from scheduler.config import ConfigError, TracingConfig
from scheduler.generation import Generation
from scheduler.journal.entry import Entry, Listener
from scheduler.journal.sqlite import SqliteJournal
from scheduler.prefill import EmbeddingPrefill
from scheduler.sources import load
from scheduler.tracing import NoTracing, tracing
from tests.collector import PHASES, Collector, attributes
from tests.scheduler.test_recovery import Process, entry, leave

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
SECRET = "nobody else may read this"
NOW = 9.0


def generation(begun: float | None = 2.0, first: float | None = 5.0, tokens: int = 3, **asked: object) -> Generation:
    """Accepted at 1; it has just ended, at 9."""
    entry = Entry(
        id="alice/r1",
        model="tiny",
        request=Request(**({"prompt": SECRET} | asked)),
        prompt=[5, 6],
        seed=7,
        accepted_at=0.0,
        listeners=[Listener("there", None, TRACEPARENT)],
    )
    generation = Generation(entry, 1.0, tokenizer=None, choices=[])
    generation.started_at, generation.first_token_at, generation.completion_tokens = begun, first, tokens
    return generation


def result(generation: Generation) -> Result:
    data = answer(chat=False, request_id="r1", created=0, model="tiny", answers=[Answer(SECRET, "length")], usage=None)
    return Result("r1", data, generation.timings(NOW), 0)


CANCELLED = Cancelled("r1", 3)


async def record(collector: Collector, generation: Generation, reply: Terminal, *, lost: bool = False) -> None:
    async def deliver() -> None:
        if lost:
            raise ConnectionError

    async with tracing(TracingConfig(collector.endpoint), "main", lambda: NOW) as spans:
        delivered = asyncio.create_task(deliver())
        spans.ended(generation, reply, delivered)
        with suppress(ConnectionError):
            await delivered


async def test_it_is_told_what_was_asked_for_and_used_but_not_what_was_said(collector):
    asked = generation(max_tokens=3, temperature=0.5, top_p=0.9, top_k=5, seed=7, stop=[SECRET])
    await record(collector, asked, result(asked))
    (root,) = collector.roots()
    assert root.name == "text_completion tiny"
    told = attributes(root)
    assert [value.string_value for value in told.pop("gen_ai.response.finish_reasons").values] == ["length"]
    assert told == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tokenbus",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 5,
        "gen_ai.request.seed": 7,
        "gen_ai.response.id": "r1",
        "gen_ai.response.model": "tiny",
        "gen_ai.usage.input_tokens": 2,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 3,
        "tokenbus.tenant": "alice",
        "tokenbus.outcome": "result",
        "tokenbus.attempt": 1,
    }
    (export,) = collector.exports
    assert SECRET.encode() not in export.SerializeToString()
    resource = {pair.key: pair.value.string_value for pair in export.resource_spans[0].resource.attributes}
    assert (resource["service.name"], resource["service.instance.id"]) == ("tokenbus", "main")


async def test_an_embedding_has_no_parameters_of_sampling(collector):
    entry = msgspec.structs.replace(generation().entry, request=EmbeddingRequest(input=SECRET))
    run = EmbeddingPrefill(entry=entry, accepted_at=1.0, lengths={entry.id: 2}, started_at=2.0)
    run.pool(entry.id, 1, struct.pack("=2d", 3, 4))
    run.complete()
    await record(collector, run, run.result(NOW))
    (root,) = collector.roots()
    assert root.name == "embeddings tiny"
    told = attributes(root)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (2, 0)
    assert (told["gen_ai.operation.name"], told["tokenbus.outcome"]) == ("embeddings", "result")
    assert not [name for name in told if "temperature" in name or "finish" in name]
    assert {span.name for span in collector.within(root)} == {"queue", "prefill", "publish"}


async def test_a_chat_is_told_from_a_completion(collector):
    await record(collector, generation(prompt=None, messages=[Message("user", SECRET)]), CANCELLED)
    (root,) = collector.roots()
    assert (root.name, attributes(root)["gen_ai.operation.name"]) == ("chat tiny", "chat")


@pytest.mark.parametrize(
    ("begun", "first", "tokens", "expected"),
    [
        (None, None, 0, {"queue": 8}),
        (2.0, None, 0, {"queue": 1, "prefill": 7}),
        (2.0, 5.0, 3, {"queue": 1, "prefill": 3, "decode": 4}),
        # An earlier process gave the first tokens.
        (2.0, None, 3, {"queue": 1, "decode": 7}),
    ],
)
async def test_a_request_is_in_one_phase_at_a_time(collector, begun, first, tokens, expected):
    await record(collector, generation(begun, first, tokens), CANCELLED)
    (root,) = collector.roots()
    seconds = {
        span.name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 for span in collector.within(root)
    }
    assert seconds == expected | {"publish": 0}


async def test_a_failure_is_marked_as_one_and_a_cancellation_is_not(collector):
    await record(collector, generation(), Failed("r1", ServiceError("quarantined", SECRET).body))
    await record(collector, generation(), CANCELLED)
    failed, cancelled = collector.roots()
    assert (failed.status.code, failed.status.message) == (Status.STATUS_CODE_ERROR, "quarantined")
    assert attributes(failed)["error.type"] == "quarantined"
    assert cancelled.status.code == Status.STATUS_CODE_UNSET
    assert attributes(cancelled)["tokenbus.outcome"] == "cancelled"


async def test_an_answer_that_the_broker_does_not_have_is_marked(collector):
    await record(collector, generation(), CANCELLED, lost=True)
    marked = [span.name for span in collector.spans if span.status.code == Status.STATUS_CODE_ERROR]
    assert marked == ["publish"]


async def test_without_a_span_of_its_sender_it_begins_a_trace(collector):
    alone = generation()
    alone.entry.listeners = [Listener("there")]
    await record(collector, alone, CANCELLED)
    (root,) = collector.roots()
    assert root.parent_span_id == b""
    assert [span.name for span in collector.within(root)] == PHASES


async def test_a_collector_that_is_away_is_no_trouble(caplog):
    absent = Collector()
    absent.endpoint = "http://127.0.0.1:9/v1/traces"
    await record(absent, generation(), CANCELLED)
    assert "opentelemetry" in {record.name.partition(".")[0] for record in caplog.records}


async def test_the_journal_keeps_the_senders_span(tmp_path):
    entry = generation().entry
    async with SqliteJournal(tmp_path / "journal", retention_s=60, max_bytes=1 << 20) as journal:
        await journal.accept([entry])
    async with SqliteJournal(tmp_path / "journal", retention_s=60, max_bytes=1 << 20) as journal:
        (found,) = journal.unfinished()
    assert found.listeners == entry.listeners


async def test_the_same_request_from_another_span_is_answered_once(tmp_path):
    one = entry("a")
    await leave(tmp_path / "journal", one)
    async with Process(tmp_path / "journal", fatal="a") as process:
        await process.worker.reached.wait()
        await process.egress.join(one.id, Listener(one.listeners[0].topic, None, TRACEPARENT))
        process.worker.release.set()
        await process.settle()
        assert len(process.broker.terminal("a")) == 1


def test_journals_from_before_are_read():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(["there", b"x"]), type=Listener) == Listener("there", b"x")


async def test_off_nothing_of_it_is_imported():
    async with tracing(TracingConfig(), "main", lambda: NOW) as off:
        assert isinstance(off, NoTracing)
    script = "import sys, scheduler.service; assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", script], check=True, timeout=60)


async def test_without_its_packages_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    monkeypatch.delitem(sys.modules, "scheduler.spans", raising=False)
    with pytest.raises(ConfigError, match=r"tokenbus\[tracing\]"):
        async with tracing(TracingConfig("http://localhost:4318/v1/traces"), "main", lambda: NOW):
            pass


@pytest.mark.parametrize(
    "endpoint", ["localhost:4318", "ftp://x/y", "http://", "http://[", "http://user:secret@host/v1/traces"]
)
def test_an_endpoint_that_cannot_be_is_refused_and_its_secret_not_told(endpoint):
    with pytest.raises(ConfigError, match=r"^tracing\.endpoint: ") as refused:
        load(flags={"tracing.endpoint": endpoint})
    assert "secret" not in str(refused.value)
