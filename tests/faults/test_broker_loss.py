"""The broker goes, by SIGTERM and by kill -9, with the shipped configuration; generation goes on meanwhile."""

import asyncio
import signal
import subprocess
from pathlib import Path

import pytest

from protocol.client import Client
from protocol.request import Request
from scheduler.mqtt.broker import EmbeddedBroker
from tests.faults.load import ask, requests, told
from tests.faults.service import ServiceProcess
from tests.security.conftest import Broker, make_broker, running_mosquitto

pytestmark = pytest.mark.timeout(180)

SHORT = Request(prompt=[5, 6, 7], max_tokens=4, temperature=0.0, ignore_eos=True)


def service_on(shipped: Broker, folder: Path, model: Path) -> ServiceProcess:
    address = shipped.by_certificate("_service")
    return ServiceProcess(
        folder,
        model,
        f"mqtts://127.0.0.1:{shipped.certificate_port}",
        broker__ca_file=address.ca_file,
        broker__cert_file=address.cert_file,
        broker__key_file=address.key_file,
    )


def tenant(shipped: Broker) -> Client:
    own = shipped.by_certificate("alice")
    url = f"mqtts://127.0.0.1:{shipped.certificate_port}"
    return Client(url, tenant="alice", ca_file=own.ca_file, cert_file=own.cert_file, key_file=own.key_file)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_no_accepted_request_is_lost_and_generation_goes_on(tmp_path, model, how):
    shipped = make_broker(tmp_path / "root")
    asked = requests(40, shortest=300, longest=600)
    begun = asyncio.Event()
    with running_mosquitto(shipped) as broker:
        async with service_on(shipped, tmp_path, model) as service, tenant(shipped) as client:
            expected = {id: told(result) for id, result in (await ask([client], asked, "reference-")).items()}
            asking = asyncio.create_task(ask([client], asked, on_chunk=begun.set), name="asking")
            await begun.wait()
            assert await generated_while(service, broker, how) > 0
            with running_mosquitto(shipped):
                async with asyncio.timeout(5):  # the promise: found again in under 5 s
                    while not (await service.checks())["broker"]:
                        await asyncio.sleep(0.05)
                results = await asking
                await service.settled()
                assert await service.stop(signal.SIGTERM) == 0
                assert service.rows() == {2: 2 * len(asked)}
    assert {id: told(result) for id, result in results.items()} == expected


async def generated_while(service: ServiceProcess, broker: subprocess.Popen[bytes], how: signal.Signals) -> float:
    """End the broker; how many tokens come out while it is away."""
    broker.send_signal(how)
    await asyncio.to_thread(broker.wait)
    async with asyncio.timeout(5):
        while (await service.checks())["broker"]:
            await asyncio.sleep(0.02)
    tokens = 'tokenbus_tokens_total{kind="generated"}'
    before = (await service.metrics())[tokens]
    while (after := (await service.metrics())[tokens]) == before:
        await asyncio.sleep(0.02)
    return after - before


async def test_what_the_broker_forgot_before_it_was_accepted_is_sent_again(tmp_path, model):
    """Without persistence a restart forgets everything: sessions, and requests that it had acknowledged to the sender."""
    async with (
        EmbeddedBroker(data_dir=tmp_path / "broker", settings=["persistence false"]) as broker,
        ServiceProcess(tmp_path, model, broker.url) as service,
    ):
        await service.stop(signal.SIGKILL)
        async with Client(broker.url, tenant="alice", accept_timeout_s=60) as client:
            acknowledged = watch_pubacks(client)
            asking = asyncio.create_task(client.complete(SHORT, model="tiny", request_id="lost"), name="asking")
            assert await acknowledged.get() == 0, "kept for the service's session"
            await broker.restart(signal.SIGKILL)
            await service.start()
            assert (await asking).usage.completion_tokens == 4
        metrics = await service.settled()
    assert not (tmp_path / "broker" / "mosquitto.db").exists()
    assert metrics["tokenbus_requests_accepted_total"] == 1


def watch_pubacks(client: Client) -> asyncio.Queue[int]:
    """The broker's answers to what the client publishes."""
    answers: asyncio.Queue[int] = asyncio.Queue()
    publish = client._transport.publish

    async def watched(*arguments, **named) -> int:
        answers.put_nowait(code := await publish(*arguments, **named))
        return code

    client._transport.publish = watched
    return answers
