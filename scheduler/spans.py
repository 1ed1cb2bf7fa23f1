"""The spans of a request: one for all of it, and within that ``queue``, ``prefill``, ``decode`` and ``publish``.

They are made when it has ended, from times that its generation has anyway: no step does anything for them. Names and attributes
are those of https://opentelemetry.io/docs/specs/semconv/gen-ai/; neither prompts nor answers are among them.
"""

import asyncio
import time
from collections.abc import Callable
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from protocol.kinds import AnyRequest
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.replies import Failed, Result, Terminal
from protocol.request import Request
from protocol.trace import TRACEPARENT
from scheduler.generation import Generation
from scheduler.kinds import Run

#: For one batch of spans; what a collector doesn't take in this time is dropped.
_EXPORT_S = 2.0

#: Name, begin and end, in seconds.
_Phase = tuple[str, float, float]


class Spans:
    """Sends them in batches, from a thread of its own; when the collector is away they are dropped, and that is logged.

    Sampling and headers are set by OpenTelemetry's own variables (OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS).
    """

    def __init__(self, endpoint: str, replica: str, now: Callable[[], float]) -> None:
        resource = Resource.create(
            {"service.name": "tokenbus", "service.version": version("tokenbus"), "service.instance.id": replica}
        )
        self._now = now
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tokenbus")
        self._propagator = TraceContextTextMapPropagator()

    def close(self) -> None:
        """Send what is left; blocks."""
        self._provider.shutdown()

    def ended(self, run: Run, reply: Terminal, delivered: asyncio.Task[None]) -> None:
        """See ``Tracing``."""
        ended_at = self._now()
        delivered.add_done_callback(lambda task: self._record(run, reply, ended_at, task))

    def _record(self, run: Run, reply: Terminal, ended_at: float, delivered: asyncio.Task[None]) -> None:
        now = self._now()
        epoch_ns = time.time_ns() - int(now * 1e9)

        def unix_ns(seconds: float) -> int:
            return epoch_ns + int(seconds * 1e9)

        operation = _operation(run.entry.request)
        request = self._tracer.start_span(
            f"{operation} {run.entry.model}",
            self._parent(run),
            SpanKind.SERVER,
            {"gen_ai.operation.name": operation, **_attributes(run, reply)},
            start_time=unix_ns(run.accepted_at),
        )
        if request.is_recording():  # else the sender, or OTEL_TRACES_SAMPLER, didn't want this one
            if isinstance(reply, Failed):
                request.set_status(StatusCode.ERROR, reply.error.code)
            within = set_span_in_context(request, Context())
            for name, begin, end in _phases(run, ended_at):
                self._tracer.start_span(name, within, start_time=unix_ns(begin)).end(unix_ns(end))
            publish = self._tracer.start_span("publish", within, SpanKind.PRODUCER, start_time=unix_ns(ended_at))
            if delivered.cancelled() or delivered.exception() is not None:
                publish.set_status(StatusCode.ERROR, "the broker doesn't have the answer")
            publish.end(unix_ns(now))
        request.end(unix_ns(now))

    def _parent(self, run: Run) -> Context:
        """The span that the first of those who hear the answer sent the request in, or none."""
        traceparent = run.entry.listeners[0].traceparent
        if traceparent is None:
            return Context()
        return self._propagator.extract({TRACEPARENT: traceparent}, Context())


def _phases(run: Run, ended_at: float) -> list[_Phase]:
    """One after the other. What an earlier process had begun to decode is all ``decode``, its prompt computed again included."""
    begun, first = run.started_at, run.first_token_at
    if begun is None:
        return [("queue", run.accepted_at, ended_at)]
    queue: _Phase = ("queue", run.accepted_at, begun)
    if first is None:
        return [queue, ("decode" if run.completion_tokens else "prefill", begun, ended_at)]
    return [queue, ("prefill", begun, first), ("decode", first, ended_at)]


def _attributes(run: Run, reply: Terminal) -> dict[str, AttributeValue]:
    """Those that are known."""
    entry = run.entry
    attributes: dict[str, AttributeValue | None] = {
        "gen_ai.provider.name": "tokenbus",
        "gen_ai.request.model": entry.model,
        **(_sampling(run.request, reply) if isinstance(run, Generation) else {}),
        "gen_ai.response.id": entry.request_id,
        "gen_ai.response.model": entry.model,
        "gen_ai.usage.input_tokens": len(entry.prompt),
        "gen_ai.usage.cache_read.input_tokens": run.cached_tokens,
        "gen_ai.usage.output_tokens": run.completion_tokens,
        "error.type": reply.error.code if isinstance(reply, Failed) else None,
        "tokenbus.tenant": entry.tenant,
        "tokenbus.outcome": str(type(reply).__struct_config__.tag),
        "tokenbus.attempt": entry.attempt,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _sampling(request: Request, reply: Terminal) -> dict[str, AttributeValue | None]:
    """What only a generation has."""
    return {
        "gen_ai.request.max_tokens": request.output_limit,
        "gen_ai.request.temperature": request.temperature,
        "gen_ai.request.top_p": request.top_p,
        "gen_ai.request.top_k": request.top_k,
        "gen_ai.request.seed": request.seed,
        "gen_ai.request.choice.count": request.n if request.n > 1 else None,
        "gen_ai.response.finish_reasons": (
            [str(choice.finish_reason) for choice in reply.choices] if isinstance(reply, Result) else None
        ),
    }


def _operation(request: AnyRequest) -> str:
    match request:
        case EmbeddingRequest():
            return "embeddings"
        case ScoreRequest():
            return "score"
        case _:
            return "chat" if request.is_chat else "text_completion"
