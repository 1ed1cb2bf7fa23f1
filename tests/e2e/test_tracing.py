"""A collector hears of every request that a service answers, as a child of the span that its client was in."""

import asyncio

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from protocol.client import Client
from protocol.request import Request
from scheduler import service
from scheduler.config import BrokerConfig, Config, EngineConfig, MetricsConfig, ModelConfig, TracingConfig
from tests.collector import PHASES, attributes
from tests.workers.models import servable

pytestmark = pytest.mark.timeout(60)

UNSAMPLED = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"


@pytest.fixture
def config(broker, collector, tmp_path) -> Config:
    return Config(
        model=ModelConfig(alias="tiny", path=str(servable(tmp_path / "model")), attention="reference", threads=1),
        engine=EngineConfig(max_running=2, block_size=8, num_blocks=100),
        broker=BrokerConfig(url=broker.url, data_dir=str(tmp_path / "data")),
        metrics=MetricsConfig(port=0),
        tracing=TracingConfig(collector.endpoint),
    )


async def test_every_request_is_one_trace_below_its_clients_span(collector, config, broker):
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("client")
    request = Request(prompt=[5, 6, 7], max_tokens=3, ignore_eos=True)
    sent = {}

    async def ask(client: Client, id: str) -> None:
        carrier: dict[str, str] = {}
        with tracer.start_as_current_span("ask") as span:
            TraceContextTextMapPropagator().inject(carrier)
            sent[id] = span.get_span_context()
            await client.complete(request, model="tiny", request_id=id, traceparent=carrier["traceparent"])

    async with service.running(config), Client(broker.url, tenant="alice") as client, asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(ask(client, f"r{number}"))
        group.create_task(client.complete(request, model="tiny", traceparent=UNSAMPLED))

    roots = {attributes(span)["gen_ai.response.id"]: span for span in collector.roots()}
    assert len(collector.roots()) == len(sent)
    assert len(collector.spans) == len(sent) * (1 + len(PHASES))
    for id, parent in sent.items():
        root = roots[id]
        assert root.trace_id == parent.trace_id.to_bytes(16, "big")
        assert root.parent_span_id == parent.span_id.to_bytes(8, "big")
        within = collector.within(root)
        assert [span.name for span in within] == PHASES
        assert {span.trace_id for span in within} == {root.trace_id}
        borders = [root.start_time_unix_nano, *(span.end_time_unix_nano for span in within)]
        assert borders == sorted(borders)
        assert borders[-1] == root.end_time_unix_nano
        assert [span.start_time_unix_nano for span in within] == borders[:-1]
