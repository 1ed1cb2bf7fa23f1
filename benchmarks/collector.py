"""A collector's end of OTLP over HTTP."""

import contextlib
import gzip
from collections.abc import AsyncIterator
from typing import TypeVar

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """``exports`` are the requests that came to ``endpoint``."""

    endpoint: str

    def __init__(self) -> None:
        self.exports: list[ExportTraceServiceRequest] = []

    async def take(self, request: web.Request) -> web.Response:
        assert request.headers["Content-Type"] == "application/x-protobuf"
        body = await request.read()
        if body.startswith(b"\x1f\x8b"):
            body = gzip.decompress(body)
        self.exports.append(ExportTraceServiceRequest.FromString(body))
        return web.Response(content_type="application/x-protobuf")

    @property
    def spans(self) -> list[Span]:
        resources = (resource for export in self.exports for resource in export.resource_spans)
        return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


AnyCollector = TypeVar("AnyCollector", bound=Collector)


@contextlib.asynccontextmanager
async def collecting(collector: AnyCollector) -> AsyncIterator[AnyCollector]:
    """It listens on a free port of loopback inside the block."""
    application = web.Application()
    application.add_routes([web.post("/v1/traces", collector.take)])
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        collector.endpoint = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/traces"
        yield collector
    finally:
        await runner.cleanup()
