"""Fixtures: a real Mosquitto, and connections to it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.transport import BrokerAddress
from scheduler.mqtt.broker import EmbeddedBroker


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    async with EmbeddedBroker(data_dir=tmp_path / "broker") as running:
        yield running


@pytest.fixture
def address(broker: EmbeddedBroker) -> BrokerAddress:
    return BrokerAddress.parse(broker.url)
