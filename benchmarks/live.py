"""A whole service for one run: its own broker, journal, worker and data directory, gone afterwards."""

import contextlib
import tempfile
from collections.abc import AsyncIterator

import msgspec

from scheduler import service
from scheduler.config import BrokerConfig, Config, MetricsConfig
from scheduler.service import Service


@contextlib.asynccontextmanager
async def serving(settings: Config) -> AsyncIterator[Service]:
    """Up inside the block. Raises what ``service.running`` raises."""
    with tempfile.TemporaryDirectory() as data_dir:
        settings = msgspec.structs.replace(
            settings, broker=BrokerConfig(data_dir=data_dir), metrics=MetricsConfig(port=0)
        )
        async with service.running(settings) as running:
            yield running


def tokens(running: Service, kind: str) -> int:
    """How many there were so far, of all tenants: ``prefill`` and ``decode`` computed, ``generated`` out."""
    families = [*running.metrics.tokens.collect(), *running.metrics.computed.collect()]
    samples = (sample for family in families for sample in family.samples)
    return int(sum(sample.value for sample in samples if sample.labels["kind"] == kind))
