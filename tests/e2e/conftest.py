"""One real service for the module: Mosquitto, a worker with the demo model, everything between."""

import contextlib
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from protocol.transport import BrokerAddress, Transport
from scheduler import service
from scheduler.config import BrokerConfig, Config, EngineConfig, MetricsConfig
from scheduler.service import Service

#: A system message that the service computes once for all tenants.
SHARED = "You answer in the fewest words that will do, in English, and say so when you don't know. " * 4


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    config = Config(
        engine=EngineConfig(max_running=8, max_batch_tokens=64, kv_memory_mb=512, shared_prefixes=[SHARED]),
        broker=BrokerConfig(data_dir=str(tmp_path_factory.mktemp("broker"))),
        metrics=MetricsConfig(port=0),
    )
    async with service.running(config) as service_:
        yield service_


@contextlib.asynccontextmanager
async def tenant(running: Service, name: str) -> AsyncIterator[Transport]:
    """A bare MQTT client that hears everything its tenant is told."""
    address = BrokerAddress.parse(running.broker_url)
    async with Transport(address, subscriptions=[(f"tokenbus/v1/{name}/out/#", 1)]) as transport:
        yield transport
