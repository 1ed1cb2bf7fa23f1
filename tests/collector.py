"""What tests ask of the spans that a collector was sent."""

from collections.abc import AsyncIterator

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from benchmarks import collector as benchmarked
from benchmarks.collector import collecting

#: In the order they are gone through.
PHASES = ["queue", "prefill", "decode", "publish"]


class Collector(benchmarked.Collector):
    """One that is asked which spans belong together."""

    def roots(self) -> list[Span]:
        """The spans of whole requests."""
        return [span for span in self.spans if span.kind == Span.SPAN_KIND_SERVER]

    def within(self, root: Span) -> list[Span]:
        found = [span for span in self.spans if span.parent_span_id == root.span_id]
        return sorted(found, key=lambda span: PHASES.index(span.name))


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    async with collecting(Collector()) as listening:
        yield listening


def attributes(span: Span) -> dict[str, object]:
    values = ((pair.key, pair.value) for pair in span.attributes)
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values}
