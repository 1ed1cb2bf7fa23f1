"""Figures for planning, all simulated: how many replicas a trace needs at several paces, and the policies side by side.

Nothing here measures this machine: equal options give equal figures on any.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random

import click
import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import cli
from scheduler.core import policies
from scheduler.core.batch import Limits
from scheduler.core.policies import PolicyName
from scheduler.simulation import arrivals, models, replicas, tables, trace
from scheduler.simulation.arrivals import Arrival
from scheduler.simulation.figures import Figures
from scheduler.simulation.replicas import FleetFigures, ReplicaFigures, Targets
from scheduler.simulation.run import Setup, run
from scheduler.simulation.trace import TraceError

#: The traces name no tenants, and not what was asked for: the k-th of eight tenants gets a share of k to the power of -1.2, and
#: all ask for up to 1000 tokens.
_TENANTS = 8
_ZIPF = 1.2
_MAX_TOKENS = 1000
#: The fairness paper's machine, with its KV cache of 10,000 tokens, and requests as long as that takes.
_COST_MODEL = "a10g-llama-2-7b"
_LIMITS = Limits(max_running=128, max_batch_tokens=512, max_model_len=8192)
_NUM_BLOCKS = 625
_BLOCK_SIZE = 16
#: More would say that something is wrong.
_MOST_REPLICAS = 256
_PACE = click.FloatRange(min=0, min_open=True)


class Load(msgspec.Struct, frozen=True):
    """What comes, from the file ``trace``. ``prompt_tokens`` and ``output_tokens`` are means; ``max_tokens`` is asked for."""

    trace: str
    requests: int
    seconds: float
    prompt_tokens: float
    output_tokens: float
    max_tokens: int
    tenants: int
    zipf: float


class Machine(msgspec.Struct, frozen=True):
    """What each replica is."""

    cost_model: str
    kv_tokens: int
    max_running: int
    max_batch_tokens: int
    max_model_len: int


class Pace(msgspec.Struct, frozen=True):
    """The load, so many times as fast as it came."""

    pace: float
    requests_per_s: float
    figures: ReplicaFigures


class ScaleFigures(msgspec.Struct, frozen=True):
    """``shared``: the load at the slowest pace, on as many replicas as ours needs for it, under each policy. ``at_once``: the
    first requests of it, all there from the start, on one machine; without their tenants' figures."""

    load: Load
    machine: Machine
    paces: list[Pace]
    shared: dict[PolicyName, FleetFigures]
    at_once: list[Figures]


def measure(file: Path, requests: int, paces: Sequence[float], targets: Targets, at_once: int) -> ScaleFigures:
    """``paces`` in ascending order. Raises ClickException."""
    load = _load(file, requests)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(paces) + 2 * len(policies.NAMES))
        needs: list[Pace] = []
        for pace in paces:
            progress.update(task, description=f"{pace:g}x the pace")
            needs.append(_need(load, pace, targets, least=_needed(needs[-1]) if needs else 1))
            progress.advance(task)
        shared = {}
        for policy in policies.NAMES:
            progress.update(task, description=f"{policy}, shared")
            shared[policy] = replicas.run_fleet(_hurry(load, paces[0]), _setup(policy), _needed(needs[0]))
            progress.advance(task)
        crowd = []
        for policy in policies.NAMES:
            progress.update(task, description=f"{policy}, at once")
            figures = run((arrival._replace(at=0.0) for arrival in load[:at_once]), _setup(policy)).figures
            crowd.append(msgspec.structs.replace(figures, tenants={}))
            progress.advance(task)
    return ScaleFigures(_describe(file.name, load), _machine(), needs, shared, crowd)


def _load(file: Path, requests: int) -> list[Arrival]:
    tenant = arrivals.zipf(_TENANTS, _ZIPF, Random(0))
    try:
        load = list(islice(arrivals.assign(trace.read(file), tenant, _MAX_TOKENS), requests))
    except TraceError as error:
        raise click.ClickException(str(error)) from None
    if not load or not load[-1].at:
        raise click.ClickException(f"{file} has no two requests at different times, so no pace")
    return load


def _hurry(load: Sequence[Arrival], pace: float) -> list[Arrival]:
    return [arrival._replace(at=arrival.at / pace) for arrival in load]


def _setup(policy: PolicyName) -> Setup:
    return Setup(policy, models.load(_COST_MODEL), _LIMITS, _NUM_BLOCKS, _BLOCK_SIZE)


def _need(load: Sequence[Arrival], pace: float, targets: Targets, least: int) -> Pace:
    hurried = _hurry(load, pace)
    figures = replicas.search(hurried, _setup("fair"), targets, least=least, most=_MOST_REPLICAS)
    return Pace(pace, len(load) / hurried[-1].at, figures)


def _needed(pace: Pace) -> int:
    """Raises ClickException when there was no such number."""
    if pace.figures.needed is None:
        most = pace.figures.tried[-1].replicas
        raise click.ClickException(f"at {pace.pace:g} times the pace, {most} replicas don't hold the target")
    return pace.figures.needed


def _describe(name: str, load: Sequence[Arrival]) -> Load:
    return Load(
        trace=name,
        requests=len(load),
        seconds=load[-1].at,
        prompt_tokens=sum(arrival.prompt for arrival in load) / len(load),
        output_tokens=sum(arrival.output for arrival in load) / len(load),
        max_tokens=_MAX_TOKENS,
        tenants=_TENANTS,
        zipf=_ZIPF,
    )


def _machine() -> Machine:
    return Machine(
        cost_model=_COST_MODEL,
        kv_tokens=_NUM_BLOCKS * _BLOCK_SIZE,
        max_running=_LIMITS.max_running,
        max_batch_tokens=_LIMITS.max_batch_tokens,
        max_model_len=_LIMITS.max_model_len,
    )


def _show(figures: ScaleFigures) -> None:
    console = Console()
    for pace in figures.paces:
        console.print(f"{pace.pace:g}x the pace, {pace.requests_per_s:.1f} requests/s")
        console.print(tables.of_replicas(pace.figures))
    table = Table("policy", "TTFT p99 s", "ITL p99 s", "KV waste", title=f"{figures.shared['fair'].replicas} replicas")
    for policy, fleet in figures.shared.items():
        p99 = [f"{times.p99:.3g}" if times else "" for times in (fleet.ttft_s, fleet.itl_s)]
        table.add_row(policy, *p99, f"{fleet.kv_waste_ratio:.1%}")
    console.print(table, tables.of_runs(figures.at_once))


@click.command()
@click.option("--trace", "file", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--requests", default=6000, show_default=True, help="Of the trace, the first so many.")
@click.option(
    "--at-once", default=2000, show_default=True, help="Of these, so many for the run with all there at once."
)
@click.option("--ttft-p99", default=2.0, show_default=True, help="Seconds.")
@click.option("--pace", "paces", multiple=True, type=_PACE, default=(1.0, 2.0, 4.0), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(file: Path, requests: int, at_once: int, ttft_p99: float, paces: tuple[float, ...], as_json: bool) -> None:
    """Replicas that a trace needs, and all policies on it; the trace is a CSV as tokenbus simulate takes it."""
    figures = measure(file, requests, sorted(paces), Targets(ttft_p99_s=ttft_p99), at_once)
    if as_json:
        cli.show(figures, as_json)
    else:
        _show(figures)


if __name__ == "__main__":
    main()
