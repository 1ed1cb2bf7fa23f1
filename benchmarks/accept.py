"""How fast requests are accepted: publishers send as fast as they can, until the last `accepted` has come.

The service runs in a process of its own, as it would; publishers, broker, service and worker share the machine.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import click
import msgspec

from benchmarks import cli
from benchmarks.process import serving
from protocol import replies, topics
from protocol.replies import Accepted
from protocol.request import Request, encode_request
from protocol.transport import BrokerAddress, Transport
from scheduler.mqtt.broker import EmbeddedBroker


class AcceptFigures(msgspec.Struct, frozen=True):
    """Medians over the rounds, which alternate between a journal on disk and none."""

    publishers: int
    requests: int
    rounds: int
    accepts_per_s: float
    journal_off_accepts_per_s: float
    share_of_journal_off: float


async def _publisher(url: str, tenant: str, count: int, go: asyncio.Event, ready: asyncio.Semaphore) -> float:
    """Publish everything as fast as the broker takes it; returns when the last one was accepted."""
    body = encode_request(
        Request(prompt=[5, 6, 7, 8, 9, 10, 11, 12], max_tokens=1000, temperature=0.0, ignore_eos=True)
    )
    waiting = {f"r{number}" for number in range(count)}
    address = BrokerAddress.parse(url)
    async with (
        Transport(address, subscriptions=[(topics.out(tenant, "+"), 1)]) as transport,
        asyncio.TaskGroup() as group,
    ):
        ready.release()
        await go.wait()
        for id in waiting:
            topic = topics.request(tenant, "accept", id)
            group.create_task(transport.publish(topic, body), name=f"publish {id}")
        async for incoming in transport.messages():
            transport.acknowledge(incoming)
            reply = replies.decode_reply(incoming.payload)
            if isinstance(reply, Accepted):
                waiting.discard(reply.request_id)
                if not waiting:
                    break
        return time.perf_counter()


async def _round(model: str, publishers: int, requests: int, *, journal: bool) -> float:
    """Accepted requests per second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings: dict[str, object] = {
            "model.alias": "accept",
            "model.path": model,
            "model.threads": 1,
            "engine.max_running": 1,
            "limits.outstanding": publishers * requests,
            "limits.outstanding_per_tenant": requests,
        }
        if not journal:
            settings["journal.path"] = "off"
        async with (
            EmbeddedBroker(data_dir=folder / "broker") as broker,
            serving(folder, broker.url, settings),
            asyncio.TaskGroup() as group,
        ):
            go, ready = asyncio.Event(), asyncio.Semaphore(0)
            tasks = [
                group.create_task(_publisher(broker.url, f"t{number}", requests, go, ready), name=f"publisher {number}")
                for number in range(publishers)
            ]
            for _ in tasks:
                await ready.acquire()
            begun = time.perf_counter()
            go.set()
            ends = await asyncio.gather(*tasks)
        return publishers * requests / (max(ends) - begun)


async def measure(model: str, publishers: int, requests: int, rounds: int) -> AcceptFigures:
    """Alternate a service with a journal and one without."""
    pairs = [
        (
            await _round(model, publishers, requests, journal=True),
            await _round(model, publishers, requests, journal=False),
        )
        for _ in range(rounds)
    ]
    return AcceptFigures(
        publishers=publishers,
        requests=publishers * requests,
        rounds=rounds,
        accepts_per_s=statistics.median(on for on, _ in pairs),
        journal_off_accepts_per_s=statistics.median(off for _, off in pairs),
        share_of_journal_off=statistics.median(on / off for on, off in pairs),
    )


@click.command()
@click.option("--publishers", default=16, show_default=True)
@click.option("--requests", default=250, show_default=True, help="Of each publisher.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--model", default="smollm2", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(publishers: int, requests: int, rounds: int, model: str, as_json: bool) -> None:
    """Accepted requests per second."""
    cli.show(asyncio.run(measure(model, publishers, requests, rounds)), as_json)


if __name__ == "__main__":
    main()
