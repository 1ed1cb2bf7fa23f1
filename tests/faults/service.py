"""A service in processes of its own, to be killed, and what must hold of it afterwards."""

import asyncio
import json
import os
import re
import signal
import socket
import sqlite3
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import psutil

from protocol import replies, topics
from protocol.replies import TERMINAL, Chunk, Reply
from protocol.transport import BrokerAddress, Transport

INJECT = Path(__file__).parent / "inject"
POISON = 96
_UP_S = 120.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def totals(page: str) -> dict[str, float]:
    """The samples of a page of metrics by name and labels, summed over the tenants and tiers."""
    sums: Counter[str] = Counter()
    for line in page.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            name = re.sub(r',?(tenant|tier)="[^"]*"', "", name).replace("{,", "{").replace("{}", "")
            sums[name] += float(value)
    return sums


class ServiceProcess:
    """``tokenbus serve`` on a tiny model. What it logs is in ``log``; ``config`` may hold more settings.

    ``module`` is run with the arguments of ``tokenbus``.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        broker_url: str,
        *,
        fault: str | None = None,
        module: str = "scheduler.cli",
        **settings: object,
    ):
        self.folder = folder
        self.module = module
        self.log = folder / "service.log"
        self.journal = folder / "journal.sqlite3"
        self.config = folder / "tokenbus.toml"
        self.config.touch()
        self.http = f"http://127.0.0.1:{free_port()}"
        self._settings = {
            "model.alias": "tiny",
            "model.path": model,
            "model.threads": 1,
            "engine.block_size": 8,
            "engine.num_blocks": 600,
            "engine.max_running": 16,
            "broker.url": broker_url,
            "broker.data_dir": folder,
            "metrics.port": self.http.rpartition(":")[2],
            **{name.replace("__", "."): value for name, value in settings.items()},
        }
        self._environment = dict(os.environ)
        if fault is not None:
            self._environment |= {"FAULT": fault, "FAULT_FILE": str(folder / "struck"), "PYTHONPATH": str(INJECT)}
            self._environment["PYTHONPATH"] += os.pathsep + str(Path(__file__).parents[2])

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        if self.process.returncode is None:
            await self.stop(signal.SIGKILL)

    async def start(self, *, wait: bool = True) -> None:
        arguments = [f"--config={self.config}", *(f"--set={name}={value}" for name, value in self._settings.items())]
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", self.module, "serve", *arguments, stderr=log, env=self._environment
            )
        if wait:
            await self.until_ready()

    async def stop(self, how: signal.Signals) -> int:
        """Send it a signal and wait for its end; returns the exit status."""
        self.process.send_signal(how)
        return await self.process.wait()

    async def until_logged(self, text: str) -> None:
        async with asyncio.timeout(30):
            while text not in self.log.read_text():
                await asyncio.sleep(0.02)

    @property
    def worker_pid(self) -> int:
        (worker,) = psutil.Process(self.process.pid).children()
        return worker.pid

    @property
    def rank_pids(self) -> list[int]:
        """Of the processes beside the worker that share its model."""
        return [process.pid for process in psutil.Process(self.worker_pid).children()]

    async def until_ready(self) -> None:
        async with asyncio.timeout(_UP_S):
            while (await self.ask("/readyz"))[0] != 200:
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.05)

    async def ask(self, path: str) -> tuple[int, str]:
        """Status and body of an HTTP answer; 0 when there is none."""

        def get() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(self.http + path, timeout=5) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read().decode()
            except (urllib.error.URLError, OSError):
                return 0, ""

        return await asyncio.to_thread(get)

    async def checks(self) -> dict[str, bool]:
        return json.loads((await self.ask("/readyz"))[1])["checks"]

    async def metrics(self) -> dict[str, float]:
        """By name and labels, summed over the tenants and tiers."""
        _, page = await self.ask("/metrics")
        return totals(page)

    async def has_accepted(self, count: int) -> None:
        """Wait until so many requests have been."""
        async with asyncio.timeout(30):
            while (await self.metrics()).get("tokenbus_requests_accepted_total") != count:
                await asyncio.sleep(0.02)

    async def settled(self) -> dict[str, float]:
        """Wait until nothing is under way; then all blocks are free and what was accepted is what has ended."""
        quiet = (
            "tokenbus_outstanding_requests",
            "tokenbus_undelivered_messages",
            'tokenbus_unacknowledged_messages{by="broker"}',
            'tokenbus_unacknowledged_messages{by="service"}',
            "tokenbus_journal_waiting_writes",
        )
        async with asyncio.timeout(30):
            metrics = await self.metrics()
            while not metrics or any(metrics[name] for name in quiet):  # a busy machine may leave us without an answer
                await asyncio.sleep(0.05)
                metrics = await self.metrics()
        ended = sum(value for name, value in metrics.items() if name.startswith("tokenbus_requests_total{"))
        assert metrics["tokenbus_requests_accepted_total"] == ended
        assert metrics["tokenbus_kv_blocks_free"] == metrics["tokenbus_kv_blocks"] > 0
        return metrics

    def rows(self) -> Counter[int]:
        """Journalled requests by state, once the process has ended."""
        with sqlite3.connect(self.journal) as database:
            states = Counter(state for (state,) in database.execute("SELECT state FROM requests"))
        database.close()
        return states


class Ear:
    """Hears everything that tenants are told, as the broker sends it."""

    def __init__(self, url: str, *tenants: str) -> None:
        self._transport = Transport(
            BrokerAddress.parse(url),
            subscriptions=[(topics.out(tenant, "#"), 1) for tenant in tenants],
            identifier=f"ear-{os.getpid()}-{id(self)}",
            session_expiry_s=300,
        )
        self.heard: dict[str, list[Reply]] = {}

    async def __aenter__(self):
        await self._transport.__aenter__()
        self._task = asyncio.create_task(self._listen(), name="ear")
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        await asyncio.wait({self._task})
        await self._transport.__aexit__()

    async def _listen(self) -> None:
        async for incoming in self._transport.messages():
            self._transport.acknowledge(incoming)
            reply = replies.decode_reply(incoming.payload)
            self.heard.setdefault(reply.request_id, []).append(reply)

    def terminal(self, id: str) -> list[Reply]:
        return [reply for reply in self.heard[id] if isinstance(reply, TERMINAL)]

    def pieces(self, id: str) -> dict[int, Chunk]:
        """Chunks by number: one that came twice must have been the same."""
        pieces: dict[int, Chunk] = {}
        for reply in self.heard[id]:
            if isinstance(reply, Chunk):
                first = pieces.setdefault(reply.seq, reply)
                assert (first.index, first.text) == (reply.index, reply.text)
        return pieces
