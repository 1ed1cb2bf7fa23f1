"""Two tenants that both ask for more than their half, one sending twice as fast: who is served how much, live.

The first suite of Sheng et al., "Fairness in Serving Large Language Models" (OSDI'24): two clients with requests of 256 prompt
and 256 output tokens, evenly spaced, at rates of 1 to 2, each of them above half of what the machine serves (90 and 180 a minute
there; here the rates are an option, for machines differ). A whole service with its broker and journal, the tenants' clients
beside it. Our policy first, then first come, first served, with the same arrivals; the prefix cache is off. What is left at
the end is cancelled.

Service is read from the scheduler's own counters many times a second. The bound is the theorem's (``core/fairness.py``): it holds
over every stretch of time in which both tenants have something waiting.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks import cli, live
from benchmarks.live import serving
from protocol.client import Client
from protocol.request import Request
from scheduler.config import Config, EngineConfig, LimitsConfig, ModelConfig
from scheduler.core.fairness import FairQueue, service_gap_bound
from scheduler.core.policies import PolicyName
from scheduler.service import Service
from scheduler.simulation.figures import Percentiles

_POLICIES: tuple[PolicyName, ...] = ("fair", "chunked")
_SLOW, _FAST = "slow", "fast"
#: Well below a step's time on a CPU.
_SAMPLE_S = 0.02
_CURVE_POINTS = 120
_NAMES = {"fair": "ours", "chunked": "first come, first served"}


class Suite(msgspec.Struct, frozen=True):
    """``rate``: requests a minute of the slow tenant; the other one sends twice as fast."""

    minutes: float
    rate: float
    prompt_tokens: int = 256
    output_tokens: int = 256
    vocab: int = 49152

    def rate_of(self, tenant: str) -> float:
        return {_SLOW: self.rate, _FAST: 2 * self.rate}[tenant]

    def arrivals(self, tenant: str) -> list["_Arrival"]:
        """Evenly spaced, with random prompts; the same ones every time."""
        draw, every_s = random.Random(tenant), 60 / self.rate_of(tenant)
        return [
            _Arrival(
                every_s * number,
                [draw.randrange(self.vocab // 100, self.vocab) for _ in range(self.prompt_tokens)],
                self.output_tokens,
            )
            for number in range(int(60 * self.minutes / every_s))
        ]


class TenantFigures(msgspec.Struct, frozen=True):
    """``ttft_s`` of the requests that began at all, from sending to the first chunk: under overload it grows with the run."""

    name: str
    requests_per_min: float
    sent: int
    begun: int
    ended: int
    ttft_s: Percentiles | None


class PolicyFigures(msgspec.Struct, frozen=True):
    """Gaps in service units: the fast tenant's service less the slow one's.

    While both had something waiting: ``largest_gap`` counts from when that began, ``largest_change`` between any two moments;
    the bound speaks of both. ``backlogged_s``: for how long that was the case. ``curve``: pairs of seconds and gap, from when it
    first was.
    """

    policy: PolicyName
    largest_gap: float
    largest_change: float
    backlogged_s: float
    output_tokens_per_s: float
    tenants: list[TenantFigures]
    curve: list[tuple[float, float]]


class FairnessFigures(msgspec.Struct, frozen=True):
    """``bound`` in service units, for KV blocks that hold ``kv_tokens``."""

    suite: Suite
    kv_tokens: int
    bound: float
    runs: list[PolicyFigures]


@dataclass(frozen=True, slots=True)
class _Arrival:
    at_s: float
    prompt: list[int]
    max_tokens: int


@dataclass(slots=True)
class _Answers:
    sent: int = 0
    ended: int = 0
    ttft_s: list[float] = field(default_factory=list)

    def figures(self, tenant: str, rate: float) -> TenantFigures:
        ttft_s = Percentiles.of(self.ttft_s) if len(self.ttft_s) > 1 else None
        return TenantFigures(tenant, rate, self.sent, len(self.ttft_s), self.ended, ttft_s)


@dataclass(frozen=True, slots=True)
class _Sample:
    """The gap at a time; ``backlogged``: both had something waiting."""

    at_s: float
    gap: float
    backlogged: bool


async def _watch(queue: FairQueue, samples: list[_Sample]) -> None:
    """Note the gap whenever it has changed, for ever."""
    begun = time.perf_counter()
    while True:
        gap = queue.served(_FAST) - queue.served(_SLOW)
        backlogged = queue.waits(_SLOW) and queue.waits(_FAST)
        if not samples or (samples[-1].gap, samples[-1].backlogged) != (gap, backlogged):
            samples.append(_Sample(time.perf_counter() - begun, gap, backlogged))
        await asyncio.sleep(_SAMPLE_S)


async def _ask(client: Client, arrival: _Arrival, model: str, answers: _Answers) -> None:
    request = Request(
        prompt=arrival.prompt, max_tokens=arrival.max_tokens, temperature=0.0, ignore_eos=True, stream=True
    )
    await asyncio.sleep(arrival.at_s)
    answers.sent += 1
    sent = time.perf_counter()
    first = True
    async for _ in client.stream(request, model=model):
        if first:
            answers.ttft_s.append(time.perf_counter() - sent)
            first = False
    answers.ended += 1


async def _run(suite: Suite, running: Service) -> PolicyFigures:
    """Both send at their rates, whatever comes back, until the time is over."""
    samples: list[_Sample] = []
    answers = {_SLOW: _Answers(), _FAST: _Answers()}
    model = running.config.model.alias
    async with Client(running.broker_url, tenant=_SLOW) as slow, Client(running.broker_url, tenant=_FAST) as fast:
        before, begun = live.tokens(running, "generated"), time.perf_counter()
        try:
            async with asyncio.timeout(60 * suite.minutes), asyncio.TaskGroup() as group:
                group.create_task(_watch(running.engine.batcher.queue, samples), name="watch")
                for client in (slow, fast):
                    for arrival in suite.arrivals(client.tenant):
                        work = _ask(client, arrival, model, answers[client.tenant])
                        group.create_task(work, name=f"{client.tenant} at {arrival.at_s:.1f} s")
        except TimeoutError:
            seconds = time.perf_counter() - begun
            tokens = live.tokens(running, "generated") - before
    tenants = [each.figures(name, suite.rate_of(name)) for name, each in answers.items()]
    return _figures(running.config.engine.policy, samples, tokens / seconds, tenants)


def _figures(
    policy: PolicyName, samples: list[_Sample], output_tokens_per_s: float, tenants: list[TenantFigures]
) -> PolicyFigures:
    """Raises ClickException when the tenants didn't overload the machine."""
    stretches = [list(group) for both, group in groupby(samples, lambda sample: sample.backlogged) if both]
    if not stretches:
        raise click.ClickException("never did both tenants have something waiting: raise --rate, or --minutes")
    origin = stretches[0][0]
    curve = [(sample.at_s, sample.gap - origin.gap) for sample in samples if sample.at_s >= origin.at_s]
    return PolicyFigures(
        policy=policy,
        largest_gap=max(abs(sample.gap - stretch[0].gap) for stretch in stretches for sample in stretch),
        largest_change=max(
            max(sample.gap for sample in stretch) - min(sample.gap for sample in stretch) for stretch in stretches
        ),
        backlogged_s=sum(stretch[-1].at_s - stretch[0].at_s for stretch in stretches),
        output_tokens_per_s=output_tokens_per_s,
        tenants=tenants,
        curve=[*curve[:: -(-len(curve) // _CURVE_POINTS)], curve[-1]],
    )


async def measure(suite: Suite, settings: Config) -> FairnessFigures:
    """Both policies, one after the other, each on a fresh service."""
    runs = []
    for policy in _POLICIES:
        engine = msgspec.structs.replace(settings.engine, policy=policy)
        async with serving(msgspec.structs.replace(settings, engine=engine)) as running:
            runs.append(await _run(suite, running))
            pool, queue = running.engine.batcher.pool, running.engine.batcher.queue
    kv_tokens = pool.num_blocks * pool.block_size
    return FairnessFigures(suite, kv_tokens, service_gap_bound(queue.price, suite.prompt_tokens, kv_tokens), runs)


def plot(figures: FairnessFigures, file: Path) -> None:
    """The gap over time, and the bound."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and needed only here

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 3.5))
    for run in figures.runs:
        minutes, gaps = [at_s / 60 for at_s, _ in run.curve], [gap for _, gap in run.curve]
        axes.plot(minutes, gaps, drawstyle="steps-post", label=_NAMES[run.policy])
    axes.axhline(figures.bound, color="black", linewidth=0.8, linestyle="--", label="the bound")
    axes.set_xlabel("minutes")
    axes.set_ylabel("service ahead, fast over slow")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def _show(figures: FairnessFigures) -> None:
    table = Table(title=f"service units, fast tenant over slow; the bound is {figures.bound:,.0f}")
    for column in ("policy", "largest gap", "largest change", "both waiting, s", "tokens/s", "TTFT p50, slow", "fast"):
        table.add_column(column, justify="right")
    for run in figures.runs:
        ttft = ("" if tenant.ttft_s is None else f"{tenant.ttft_s.p50:.1f}" for tenant in run.tenants)
        numbers = f"{run.largest_gap:,.0f}", f"{run.largest_change:,.0f}", f"{run.backlogged_s:.0f}"
        table.add_row(_NAMES[run.policy], *numbers, f"{run.output_tokens_per_s:.1f}", *ttft)
    Console().print(table)


@click.command()
@click.option("--minutes", default=10.0, show_default=True, help="Of each policy.")
@click.option("--rate", default=18.0, show_default=True, help="Requests a minute of the slow tenant, half the other's.")
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--output-tokens", default=256, show_default=True)
@click.option("--vocab", default=49152, show_default=True, help="Prompts are drawn from token ids below this.")
@click.option("--num-blocks", default=512, show_default=True, help="KV blocks, of 16 tokens.")
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--max-running", default=16, show_default=True)
@click.option("--max-batch-tokens", default=256, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    minutes: float,
    rate: float,
    prompt_tokens: int,
    output_tokens: int,
    vocab: int,
    num_blocks: int,
    picture: Path | None,
    model: str,
    max_running: int,
    max_batch_tokens: int,
    as_json: bool,
) -> None:
    """Two tenants that overload the service. Each should send more than half of what it can serve."""
    suite = Suite(minutes, rate, prompt_tokens, output_tokens, vocab)
    settings = Config(
        model=ModelConfig(path=model),
        engine=EngineConfig(
            max_running=max_running, max_batch_tokens=max_batch_tokens, num_blocks=num_blocks, prefix_cache=False
        ),
        limits=LimitsConfig(outstanding_per_tenant=len(suite.arrivals(_FAST))),
    )
    figures = asyncio.run(measure(suite, settings))
    if picture:
        plot(figures, picture)
    if as_json:
        cli.show(figures, as_json)
    else:
        _show(figures)


if __name__ == "__main__":
    main()
