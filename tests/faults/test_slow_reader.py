"""A tenant whose reader stops reading costs the service nothing, and no other tenant notices."""

import asyncio
import contextlib
import re
import signal

import psutil
import pytest

from protocol import topics
from protocol.request import Request, encode_request
from protocol.transport import NO_SUBSCRIBER, BrokerAddress, Transport
from tests.faults.neighbour import neighbour
from tests.faults.service import ServiceProcess

pytestmark = pytest.mark.timeout(180)

REQUESTS = 400
STREAM = encode_request(Request(prompt=[5, 6, 7], max_tokens=50, temperature=0.0, ignore_eos=True, stream=True))
MIB = 1 << 20


@contextlib.asynccontextmanager
async def reader(url: str, heard):
    """Everything that deaf is told, written to a file."""
    port = url.rpartition(":")[2]
    arguments = ["-V", "5", "-h", "127.0.0.1", "-p", port, "-q", "1", "-t", topics.out("deaf", "#"), "-F", "%t %q"]
    with heard.open("wb") as file:
        process = await asyncio.create_subprocess_exec("mosquitto_sub", *arguments, stdout=file)
    try:
        yield process
    finally:
        process.kill()
        await process.wait()


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def load(service: ServiceProcess, url: str, name: str) -> int:
    """Stream a lot to deaf, each token in a chunk of its own; returns the most memory the service had meanwhile."""

    async def publish(number: int) -> None:
        await sender.publish(topics.request("deaf", "tiny", f"{name}{number}"), STREAM, correlation=bytes(1024))

    async def watch() -> int:
        most = 0
        while not ended.is_set():
            most = max(most, psutil.Process(service.process.pid).memory_info().rss)
            await asyncio.sleep(0.05)
        return most

    ended = asyncio.Event()
    async with Transport(BrokerAddress.parse(url)) as sender, asyncio.TaskGroup() as group:
        watching = group.create_task(watch(), name="memory")
        async with neighbour(url):  # whose turn comes amid the streams
            await asyncio.gather(*map(publish, range(REQUESTS)))
        await service.settled()
        ended.set()
    return watching.result()


async def test_a_reader_that_stops_costs_the_service_no_memory_and_the_others_nothing(tmp_path, broker, model):
    heard = tmp_path / "heard"

    def results(name: str) -> int:
        """Messages at QoS 1: accepted, and the result."""
        return len(re.findall(rf"/{name}\d+ 1$", heard.read_text(), re.MULTILINE))

    async with (
        ServiceProcess(tmp_path, model, broker.url, service__flush_ms=1) as service,
        Transport(BrokerAddress.parse(broker.url)) as sender,
        reader(broker.url, heard) as deaf,
    ):
        while await sender.publish(topics.out("deaf", "hello"), b"") == NO_SUBSCRIBER:
            await asyncio.sleep(0.01)
        reading = await load(service, broker.url, "reading")
        await until(lambda: results("reading") == 2 * REQUESTS)
        deaf.send_signal(signal.SIGSTOP)
        size = heard.stat().st_size
        stopped = await load(service, broker.url, "stopped")
        assert heard.stat().st_size == size
        assert stopped < reading + 12 * MIB  # less than half of what was streamed
        deaf.send_signal(signal.SIGCONT)
        await until(lambda: results("stopped") == 2 * REQUESTS)
        await service.settled()
