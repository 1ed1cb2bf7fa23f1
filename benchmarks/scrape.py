"""What a scrape costs when a thousand tenants are there, all of them waiting: over HTTP, as Prometheus asks."""

import asyncio
import statistics
import time
import urllib.request

import click
import msgspec

from benchmarks import cli
from scheduler.core.fairness import FairQueue
from scheduler.core.sequence import Sequence
from scheduler.http import HttpServer
from scheduler.metrics.fairness import FairnessCollector
from scheduler.metrics.series import Metrics

_TIERS = 8  # as many as there may be


class ScrapeFigures(msgspec.Struct, frozen=True):
    """Medians: ``scrape_s`` from the request to the whole answer, ``cpu_s`` of CPU time, which holds up the event loop."""

    tenants: int
    series: int
    bytes: int
    rounds: int
    scrape_s: float
    cpu_s: float
    longest_scrape_s: float


def crowded(tenants: int) -> Metrics:
    """The series of a service that so many named tenants have used, and wait for."""
    names = [f"tenant-{number}" for number in range(tenants)]
    metrics = Metrics({name: f"tier-{number % _TIERS}" for number, name in enumerate(names)})
    queue = FairQueue()
    metrics.registry.register(FairnessCollector(queue, metrics.labels, longest_prompt=8192, kv_tokens=65536))
    for number, name in enumerate(names):
        queue.push(Sequence(f"{name}/r", [1], max_tokens=1, tenant=name))
        queue.charge_output({name: number})
        metrics.of(name).ttft.observe(number / tenants)
    return metrics


async def measure(tenants: int, rounds: int) -> ScrapeFigures:
    """Scrape again and again."""
    metrics = crowded(tenants)
    scrape_s, cpu_s, page = [], [], b""
    async with HttpServer("127.0.0.1", 0, registry=metrics.registry, live=dict, ready=dict) as server:
        for _ in range(rounds):
            begun, used_s = time.perf_counter(), time.process_time()
            page = await asyncio.to_thread(_get, f"{server.url}/metrics")
            scrape_s.append(time.perf_counter() - begun)
            cpu_s.append(time.process_time() - used_s)
    return ScrapeFigures(
        tenants=tenants,
        series=sum(not line.startswith(b"#") for line in page.splitlines()),
        bytes=len(page),
        rounds=rounds,
        scrape_s=statistics.median(scrape_s),
        cpu_s=statistics.median(cpu_s),
        longest_scrape_s=max(scrape_s),
    )


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        body: bytes = answer.read()
        return body


@click.command()
@click.option("--tenants", default=1000, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(tenants: int, rounds: int, as_json: bool) -> None:
    """Seconds for a scrape."""
    cli.show(asyncio.run(measure(tenants, rounds)), as_json)


if __name__ == "__main__":
    main()
