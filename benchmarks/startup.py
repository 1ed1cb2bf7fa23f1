"""From starting ``tokenbus serve`` to the first token of a prompt over MQTT: a fresh process with a cached model, as on a laptop.

The parts are timed in processes of their own, one after the other; worker and service start side by side, so a start takes less
than the sum of both.
"""

import asyncio
import json
import os
import signal
import socket
import statistics
import sys
import tempfile
import time

import click
import msgspec

from benchmarks import cli
from protocol.client import Client
from protocol.request import Message, Request
from scheduler.worker import ENVIRONMENT
from workers.weights import DEMO, demo_model

_UP_S = 120.0
_POLL_S = 0.005


class StartFigures(msgspec.Struct, frozen=True):
    """Seconds since the process was started, until its broker took a connection, the service said that it is online, and the
    first token of a prompt that was sent then came."""

    broker_s: float
    online_s: float
    first_token_s: float


class StartupFigures(msgspec.Struct, frozen=True):
    """Medians of the rounds, and the slowest one; seconds of the ``worker``'s parts and the ``service``'s."""

    rounds: int
    median: StartFigures
    slowest_first_token_s: float
    worker: dict[str, float]
    service: dict[str, float]


async def start(model: str, prompt: str) -> StartFigures:
    """One start, with an embedded broker and a data directory of its own."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model.path": model,
            "broker.port": port,
            "broker.data_dir": folder,
            "metrics.port": 0,
            "service.log_level": "warning",
        }
        arguments = [f"--set={name}={value}" for name, value in settings.items()]
        begun = time.perf_counter()
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "scheduler.cli", "serve", *arguments)
        try:
            async with asyncio.timeout(_UP_S):
                return await _first_token(port, prompt, begun)
        finally:
            process.send_signal(signal.SIGTERM)
            await process.wait()


async def _first_token(port: int, prompt: str, begun: float) -> StartFigures:
    while not _takes_connections(port):  # noqa: ASYNC110 - another process's affair
        await asyncio.sleep(_POLL_S)
    broker_s = time.perf_counter() - begun
    async with Client(f"mqtt://127.0.0.1:{port}", tenant="one") as client:
        status = await client.wait_online()
        online_s = time.perf_counter() - begun
        assert status.model is not None
        request = Request(messages=[Message("user", prompt)], max_tokens=8, temperature=0.0, stream=True)
        times = [time.perf_counter() async for _ in client.stream(request, model=status.model)]
    return StartFigures(broker_s, online_s, times[0] - begun)


def _takes_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


async def _parts(process: str, path: str) -> dict[str, float]:
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.startup_parts", process, path),
        stdout=asyncio.subprocess.PIPE,
        env=ENVIRONMENT | os.environ,
    )
    output, _ = await child.communicate()
    if child.returncode:
        raise RuntimeError(f"timing the parts of the {process} ended with status {child.returncode}")
    parts: dict[str, float] = json.loads(output)
    return parts


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


async def measure(model: str, prompt: str, rounds: int) -> StartupFigures:
    """After one start that fills caches, so many of everything."""
    path = str(demo_model() if model == DEMO else model)
    await start(model, prompt)
    starts = [await start(model, prompt) for _ in range(rounds)]
    median = _medians([msgspec.structs.asdict(each) for each in starts])
    return StartupFigures(
        rounds=rounds,
        median=StartFigures(**median),
        slowest_first_token_s=max(each.first_token_s for each in starts),
        worker=_medians([await _parts("worker", path) for _ in range(rounds)]),
        service=_medians([await _parts("service", path) for _ in range(rounds)]),
    )


@click.command()
@click.option("--model", default=DEMO, show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--prompt", default="Why is the sky blue?", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(model: str, prompt: str, rounds: int, as_json: bool) -> None:
    """From the start of a process to its first token."""
    cli.show(asyncio.run(measure(model, prompt, rounds)), as_json)


if __name__ == "__main__":
    main()
