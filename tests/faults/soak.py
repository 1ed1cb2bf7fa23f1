"""Mixed load for minutes while broker, worker and service are killed at random: ``python -m tests.faults.soak --minutes 20``."""

import asyncio
import itertools
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import click
import msgspec
import psutil

from protocol.client import Client, RequestCancelled
from protocol.errors import RequestError
from protocol.request import Request
from scheduler.mqtt.broker import EmbeddedBroker
from tests.faults.load import ask, requests, told
from tests.faults.service import ServiceProcess
from tests.workers.models import servable

TENANTS = ("alice", "bob", "carol", "dave")
ASKING_AT_ONCE = 6
FAULTS = ("worker", "broker term", "service", "broker kill")
INVALID = Request(prompt=[5, 10_000])


class SoakFigures(msgspec.Struct, frozen=True):
    """``rss_mb`` are medians over a minute: of the service and of its worker, after a quarter of the time and at the end.

    From that quarter on the service isn't killed any more (in a long run), so that its memory is that of one process.
    """

    minutes: float
    outcomes: dict[str, int]
    faults: dict[str, int]
    wrong_texts: int
    lost: int
    service_rss_mb: tuple[float, float]
    worker_rss_mb: tuple[float, float]


class Soak:
    """One run; everything random comes from ``seed``."""

    def __init__(self, service: ServiceProcess, broker: EmbeddedBroker, minutes: float, seed: int) -> None:
        self.service = service
        self.broker = broker
        self.seconds = 60 * minutes
        self.draw = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.wrong = 0
        self.asked = 0
        self.memory: list[tuple[float, float, float]] = []

    async def run(self) -> SoakFigures:
        self.pool = requests(40, shortest=20, longest=300)
        async with asyncio.TaskGroup() as group:
            clients = [Client(self.broker.url, tenant=name, accept_timeout_s=120) for name in TENANTS]
            for client in clients:
                await client.__aenter__()
            self.expected = {id: told(result) for id, result in (await ask(clients, self.pool, "reference-")).items()}
            self.begun = time.monotonic()
            watching = group.create_task(self._watch_memory(), name="memory")
            asking = [
                group.create_task(self._ask_on(client, random.Random(number)), name=f"{client.tenant} {number}")
                for client in clients
                for number in range(ASKING_AT_ONCE)
            ]
            await self._break_things()
            await asyncio.wait(asking)
            watching.cancel()
            await self.service.settled()
            for client in clients:
                await client.__aexit__(None, None, None)
        early, late = (self._memory_around(at) for at in (self.seconds / 4 + 60, self.seconds))
        return SoakFigures(
            minutes=self.seconds / 60,
            outcomes=dict(self.outcomes),
            faults=dict(self.faults),
            wrong_texts=self.wrong,
            lost=self.asked - self.outcomes.total(),
            service_rss_mb=(early[0], late[0]),
            worker_rss_mb=(early[1], late[1]),
        )

    @property
    def _over(self) -> bool:
        return time.monotonic() - self.begun > self.seconds

    async def _ask_on(self, client: Client, draw: random.Random) -> None:
        while not self._over:
            self.asked += 1
            self.outcomes[await self._ask_one(client, draw)] += 1

    async def _ask_one(self, client: Client, draw: random.Random) -> str:
        kind = draw.choices(("whole", "cancelled", "invalid"), (85, 12, 3))[0]
        id = draw.choice(list(self.pool))
        stream = client.stream(INVALID if kind == "invalid" else self.pool[id], model="tiny")
        texts: defaultdict[int, str] = defaultdict(str)
        left = draw.randint(1, 4)
        try:
            async for chunk in stream:
                texts[chunk.index] += chunk.text
                left -= 1
                if kind == "cancelled" and left == 0:
                    await client.cancel(stream.request_id)
        except RequestCancelled:
            return "cancelled"
        except RequestError as error:
            return error.code
        self.wrong += texts != self.expected[id] or texts != told(stream.result)
        return stream.result.finish_reason

    async def _break_things(self) -> None:
        """One fault after the other, each kind in turn; then time to get over the last one."""
        pause_s = min(20.0, self.seconds / (2 * len(FAULTS)))
        turn = itertools.cycle(FAULTS)
        while time.monotonic() - self.begun + 2 * pause_s < self.seconds:
            await asyncio.sleep(pause_s * self.draw.uniform(0.5, 1.5))
            what = next(turn)
            if what == "service" and time.monotonic() - self.begun > max(self.seconds / 4, 60):
                continue
            self.faults[what] += 1
            if what == "worker":
                os.kill(self.service.worker_pid, signal.SIGKILL)
            elif what == "service":
                await self.service.stop(signal.SIGKILL)
                await self.service.start()
            else:
                await self.broker.restart(signal.SIGTERM if what == "broker term" else signal.SIGKILL)
            await self.service.until_ready()

    async def _watch_memory(self) -> None:
        while True:
            try:
                service = psutil.Process(self.service.process.pid)
                (worker,) = service.children()
                sizes = [process.memory_info().rss / 1e6 for process in (service, worker)]
                if time.time() - max(service.create_time(), worker.create_time()) > 15:  # done with loading
                    self.memory.append((time.monotonic() - self.begun, *sizes))
            except (psutil.Error, ValueError):
                pass  # one of them is dead just now
            await asyncio.sleep(1)

    def _memory_around(self, at: float) -> tuple[float, float]:
        near = [sample for sample in self.memory if at - 60 <= sample[0] <= at + 30] or [(0.0, 0.0, 0.0)]
        return statistics.median(sample[1] for sample in near), statistics.median(sample[2] for sample in near)


async def run(folder: Path, model: Path, minutes: float, seed: int = 1) -> SoakFigures:
    async with (
        EmbeddedBroker(data_dir=folder / "broker") as broker,
        ServiceProcess(folder, model, broker.url) as service,
    ):
        return await Soak(service, broker, minutes, seed).run()


@click.command()
@click.option("--minutes", default=20.0, show_default=True)
@click.option("--seed", default=1, show_default=True)
def main(minutes: float, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(run(Path(folder), servable(Path(folder) / "model"), minutes, seed))
    print(msgspec.json.format(msgspec.json.encode(figures)).decode())


if __name__ == "__main__":
    main()
