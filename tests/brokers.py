"""A real Mosquitto for a test, and what tests do with it."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.transport import BrokerAddress, Incoming, Transport
from scheduler.mqtt.broker import EmbeddedBroker


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[EmbeddedBroker]:
    async with EmbeddedBroker(data_dir=tmp_path / "broker") as running:
        yield running


@pytest.fixture
def address(broker: EmbeddedBroker) -> BrokerAddress:
    return BrokerAddress.parse(broker.url)


async def receive(transport: Transport) -> Incoming:
    async with asyncio.timeout(10):
        return await anext(transport.messages())


def send_signal(broker: EmbeddedBroker, how: signal.Signals) -> None:
    assert broker.pid is not None
    os.kill(broker.pid, how)
