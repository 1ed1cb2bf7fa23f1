"""The service while its worker is away, and when it never comes back."""

import asyncio
import os
import signal
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

from protocol.client import Client
from protocol.errors import RequestError
from protocol.request import Request
from scheduler import service
from scheduler.config import BrokerConfig, Config, EngineConfig, JournalConfig, MetricsConfig, ModelConfig
from scheduler.worker import WorkerRefused
from tests.workers.models import servable

pytestmark = pytest.mark.timeout(120)

LONG = Request(prompt=[5, 6, 7], max_tokens=2000, temperature=0.0, ignore_eos=True, stream=True)
SHORT = Request(prompt=[5, 6, 7], max_tokens=4, temperature=0.0, ignore_eos=True)


@pytest_asyncio.fixture
async def config(tmp_path: Path) -> Config:
    folder = servable(tmp_path / "model")
    return Config(
        model=ModelConfig(alias="tiny", path=str(folder), threads=1),
        engine=EngineConfig(block_size=8, num_blocks=600),
        broker=BrokerConfig(data_dir=str(tmp_path / "broker")),
        metrics=MetricsConfig(port=0),
    )


async def test_requests_that_come_while_it_is_away_are_served_when_it_is_back(config):
    async with service.running(config) as running, Client(running.broker_url, tenant="alice") as client:
        expected = (await client.complete(SHORT, model="tiny")).text
        os.kill(running.engine.worker_pid, signal.SIGKILL)
        async for chunk in client.stream(LONG, model="tiny"):
            del chunk
            break  # the step that met the dead worker has been run again
        os.kill(running.engine.worker_pid, signal.SIGKILL)
        answers = await asyncio.gather(*(client.complete(SHORT, model="tiny") for _ in range(5)))
        assert {answer.text for answer in answers} == {expected}
        assert running.engine.worker_restarts == 2


async def test_ids_beyond_the_models_vocabulary_never_reach_a_batch(config):
    async with service.running(config) as running, Client(running.broker_url, tenant="alice") as client:
        with pytest.raises(RequestError, match=r"prompt\[1\]: must be a token id below 97"):
            await client.complete(Request(prompt=[5, 97]), model="tiny")


async def test_a_worker_that_never_comes_back_ends_the_service_and_without_a_journal_every_request_hears_of_it(config):
    config = msgspec.structs.replace(config, journal=JournalConfig(path="off"))
    with pytest.RaisesGroup(pytest.RaisesExc(WorkerRefused, match="config.json"), flatten_subgroups=True):
        async with service.running(config) as running:
            client = await Client(running.broker_url, tenant="alice").__aenter__()
            begun = asyncio.Event()
            told = asyncio.create_task(_outcome(client, begun), name="told")
            await begun.wait()
            (Path(config.model.path) / "config.json").unlink()
            os.kill(running.engine.worker_pid, signal.SIGKILL)
            await asyncio.Event().wait()
    assert await told == "unavailable"
    # The embedded broker is gone with the service, so the client's goodbye can only be cut short.
    await client.__aexit__(None, None, None)


async def _outcome(client: Client, begun: asyncio.Event) -> str:
    try:
        async for _ in client.stream(LONG, model="tiny"):
            begun.set()
    except RequestError as error:
        return error.code
    return "done"
