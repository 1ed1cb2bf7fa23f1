"""What the scheduler costs while it serves over MQTT: how long the worker waits for it, and what of a core its process uses.

The service runs in a process of its own; clients, broker, service and worker share the machine.
"""

import asyncio
import re
import socket
import tempfile
import time
import urllib.request
from pathlib import Path

import click
import msgspec

from benchmarks import cli
from benchmarks.process import cpu_s, serving
from benchmarks.workload import WorkItem, Workload, mixed
from protocol.client import Client
from protocol.request import Request
from scheduler.mqtt.broker import EmbeddedBroker

_ALIAS = "overhead"


class OverheadFigures(msgspec.Struct, frozen=True):
    """``waited_share``: the time the worker waited for steps by that which they took. ``cores``: CPU time of the scheduler's
    process, with all its threads, by time; the worker is another process."""

    output_tokens_per_s: float
    steps: int
    mean_rows: float
    mean_step_s: float
    mean_waited_s: float
    waited_share: float
    cores: float
    cpu_s_per_step: float


def _metrics(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", page.read().decode(), re.MULTILINE)}


async def _ask(client: Client, item: WorkItem) -> int:
    request = Request(
        prompt=item.prompt_token_ids, max_tokens=item.max_tokens, temperature=0.0, ignore_eos=True, stream=True
    )
    stream = client.stream(request, model=_ALIAS)
    async for _ in stream:
        pass
    return stream.result.usage.completion_tokens


async def measure(workload: Workload, model: str, batch: int) -> OverheadFigures:
    """All requests at once, after one that warms everything up."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    settings = {"model.alias": _ALIAS, "model.path": model, "engine.max_running": batch, "metrics.port": port}
    with tempfile.TemporaryDirectory() as name:
        async with (
            EmbeddedBroker(data_dir=Path(name) / "broker") as broker,
            serving(Path(name), broker.url, settings) as pid,
            Client(broker.url, tenant="alice") as client,
        ):
            await _ask(client, workload.requests[0])
            before, used_s, begun = await asyncio.to_thread(_metrics, port), cpu_s(pid), time.perf_counter()
            tokens = sum(await asyncio.gather(*(_ask(client, item) for item in workload.requests)))
            seconds, used_s = time.perf_counter() - begun, cpu_s(pid) - used_s
            after = await asyncio.to_thread(_metrics, port)
    grown = {name: after[name] - before[name] for name in after}
    steps = grown["tokenbus_step_seconds_count"]
    return OverheadFigures(
        output_tokens_per_s=tokens / seconds,
        steps=int(steps),
        mean_rows=grown["tokenbus_batch_rows_sum"] / steps,
        mean_step_s=grown["tokenbus_step_seconds_sum"] / steps,
        mean_waited_s=grown["tokenbus_step_gap_seconds_sum"] / steps,
        waited_share=grown["tokenbus_step_gap_seconds_sum"] / grown["tokenbus_step_seconds_sum"],
        cores=used_s / seconds,
        cpu_s_per_step=used_s / steps,
    )


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--batch", default=32, show_default=True, help="Requests, all at once.")
@click.option("--tokens", default=100, show_default=True, help="Output tokens of each.")
@click.option("--vocab", default=49152, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(model: str, batch: int, tokens: int, vocab: int, as_json: bool) -> None:
    """What the scheduler costs at a steady batch over MQTT."""
    workload = mixed(batch, prompt=(16, 64), output=(tokens, tokens), seed=5, vocab=vocab)
    cli.show(asyncio.run(measure(workload, model, batch)), as_json)


if __name__ == "__main__":
    main()
