"""The main job on embedded defaults: three tenants chat at once over a real broker; /metrics says how it went."""

import asyncio
import tempfile
import time
import urllib.request
from collections import defaultdict

import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from protocol.client import Client
from protocol.replies import Result
from protocol.request import Message, Request
from scheduler import service
from scheduler.config import Config

_QUESTIONS = {
    "alice": ("What is the capital of France, and what is it known for?", "Name three fruits and their colours."),
    "bob": ("Explain in two sentences why the sky is blue.", "Write a short poem about the sea."),
    "carol": ("Give me a simple recipe for pancakes.", "What does a bus driver do all day?"),
}
_MAX_TOKENS = 96


class Summary(msgspec.Struct, frozen=True):
    """Figures of one demo; the last four are scraped from the service's own /metrics."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    steps: int
    mean_batch: float
    mean_ttft_s: float
    mean_itl_s: float


async def run(config: Config, console: Console, *, as_json: bool) -> None:
    """Raises what the service raises when it can't start, or RequestError when an answer fails."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, console.status("starting broker, worker and scheduler"):
        if config.broker.data_dir is None:
            broker = msgspec.structs.replace(config.broker, data_dir=scratch)
            config = msgspec.structs.replace(config, broker=broker)
        async with service.running(config) as running:
            console.print(
                f"[bold]tokenbus[/] is up after {time.monotonic() - started:.1f} s: broker {running.broker_url}, "
                f"metrics {running.metrics_url}, console {running.console_url}"
            )
            begun = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                tenants = [
                    tasks.create_task(
                        _tenant(running.broker_url, config.model.alias, name, questions, console), name=name
                    )
                    for name, questions in _QUESTIONS.items()
                ]
            seconds = time.monotonic() - begun
            page = await asyncio.to_thread(_scrape, running.metrics_url)
    summary = _summarise([result for tenant in tenants for result in tenant.result()], seconds, page)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(summary)).decode())
    else:
        console.print(_table(summary))


async def _tenant(url: str, model: str, name: str, questions: tuple[str, ...], console: Console) -> list[Result]:
    async with Client(url, tenant=name) as client, asyncio.TaskGroup() as tasks:
        asked = [
            tasks.create_task(_ask(client, model, question, console), name=f"{name} {number}")
            for number, question in enumerate(questions)
        ]
    return [task.result() for task in asked]


async def _ask(client: Client, model: str, question: str, console: Console) -> Result:
    request = Request(messages=[Message("user", question)], max_tokens=_MAX_TOKENS, temperature=0.0, stream=True)
    stream = client.stream(request, model=model)
    pieces = 0
    async for _ in stream:
        pieces += 1
    console.print(f"\n[bold cyan]{client.tenant}[/] [dim]({pieces} chunks)[/] {question}", highlight=False)
    console.print(stream.result.text.strip(), style="green", highlight=False, markup=False)
    return stream.result


def _scrape(url: str) -> dict[str, float]:
    """Samples by name, summed over their labels."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - our own address on loopback
        page = answer.read().decode()
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            sums[sample.name] += sample.value
    return sums


def _summarise(results: list[Result], seconds: float, page: dict[str, float]) -> Summary:
    output = sum(result.usage.completion_tokens for result in results)

    def mean(name: str) -> float:
        return page[f"tokenbus_{name}_sum"] / max(page[f"tokenbus_{name}_count"], 1)

    return Summary(
        requests=len(results),
        prompt_tokens=sum(result.usage.prompt_tokens for result in results),
        output_tokens=output,
        seconds=seconds,
        output_tokens_per_s=output / seconds,
        steps=int(page["tokenbus_step_seconds_count"]),
        mean_batch=mean("batch_rows"),
        mean_ttft_s=mean("time_to_first_token_seconds"),
        mean_itl_s=mean("inter_token_latency_seconds"),
    )


def _table(summary: Summary) -> Table:
    table = Table(title="demo summary", show_header=False)
    for name, value in msgspec.structs.asdict(summary).items():
        table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    return table
