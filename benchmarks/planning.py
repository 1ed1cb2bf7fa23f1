"""What a step costs the scheduler itself: planning it and applying its result, without any worker.

The batch is full and everybody in it decodes; who ends is replaced by who waits, and who waits by an arrival, so admissions,
prompts and growing block tables are in the figures. Times are the thread's own CPU time: nothing here waits for anything, and
other processes' turns on the cores shouldn't count.
"""

import gc
import random
import statistics
import time
from itertools import product
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import cli
from scheduler.core import policies
from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher
from scheduler.core.blocks import BlockPool
from scheduler.core.policies import PolicyName
from scheduler.core.sequence import Sequence

_POLICIES: tuple[PolicyName, ...] = ("fair", "chunked")
_BLOCK_SIZE = 16
_PROMPT = (16, 128)
_OUTPUT = (64, 512)
_VOCAB = 49152
_TOKEN = 7
#: Steps by when those who began together no longer end together.
_WARM_UP = 2 * _OUTPUT[1]
#: Median microseconds of a step's planning and applying that the project set itself.
TARGET_US = 300.0


class Micros(msgspec.Struct, frozen=True):
    """Microseconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Micros":
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        return cls(1e6 * cuts[49], 1e6 * cuts[98])


class Case(msgspec.Struct, frozen=True):
    """``step_us``: plan and apply together."""

    policy: PolicyName
    tenants: int
    waiting: int
    plan_us: Micros
    apply_us: Micros
    step_us: Micros


class PlanningFigures(msgspec.Struct, frozen=True):
    """Of ``steps`` steps in each of the rounds, which go through all cases in turn."""

    running: int
    rounds: int
    steps: int
    cases: list[Case]


class _Crowd:
    """A batcher whose queue never gets shorter than ``waiting``."""

    def __init__(self, policy: PolicyName, tenants: int, waiting: int, running: int) -> None:
        blocks = running * -(-(_PROMPT[1] + _OUTPUT[1]) // _BLOCK_SIZE)
        limits = Limits(running, 4 * running, _PROMPT[1] + _OUTPUT[1])
        self.batcher = Batcher(limits, BlockPool(blocks, _BLOCK_SIZE, prefix_cache=True), policies.create(policy))
        self._tenants = tenants
        self._waiting = waiting
        self._draw = random.Random(8)
        self._arrivals = 0
        for _ in range(running):
            self._arrive()
        self.refill()

    def refill(self) -> None:
        while self.batcher.num_waiting < self._waiting:
            self._arrive()

    def step(self) -> tuple[float, float]:
        """One step; seconds of planning and of applying."""
        begun = time.thread_time()
        plan = self.batcher.plan()
        planned = time.thread_time()
        assert plan is not None
        tokens = [_TOKEN] * plan.num_sampled
        sampled = time.thread_time()
        self.batcher.apply(plan.step, tokens)
        return planned - begun, time.thread_time() - sampled

    def _arrive(self) -> None:
        draw, number = self._draw, self._arrivals
        self._arrivals += 1
        # A first block of its own, so that no prompt is found in the prefix cache.
        prompt = [number % _VOCAB, *[draw.randrange(_VOCAB)] * draw.randint(_PROMPT[0] - 1, _PROMPT[1] - 1)]
        tenant = f"t{number % self._tenants}"
        self.batcher.submit(Sequence(str(number), prompt, max_tokens=draw.randint(*_OUTPUT), tenant=tenant))


def _round(crowd: _Crowd, steps: int) -> list[tuple[float, float]]:
    for _ in range(_WARM_UP):
        crowd.step()
        crowd.refill()
    gc.collect()
    times = []
    for _ in range(steps):
        times.append(crowd.step())
        crowd.refill()
    return times


def measure(running: int, waiting: list[int], tenants: list[int], rounds: int, steps: int) -> PlanningFigures:
    """Every round goes through all cases, each on a fresh batcher."""
    cases = list(product(_POLICIES, tenants, waiting))
    times: dict[tuple[PolicyName, int, int], list[tuple[float, float]]] = {case: [] for case in cases}
    for _, case in track(list(product(range(rounds), cases)), "planning", console=Console(stderr=True)):
        times[case] += _round(_Crowd(*case, running), steps)
    return PlanningFigures(
        running,
        rounds,
        steps,
        [
            Case(
                *case,
                plan_us=Micros.of([plan for plan, _ in pairs]),
                apply_us=Micros.of([apply for _, apply in pairs]),
                step_us=Micros.of([plan + apply for plan, apply in pairs]),
            )
            for case, pairs in times.items()
        ],
    )


def plot(figures: PlanningFigures, file: Path) -> None:
    """The median and the 99th percentile over the number waiting."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and needed only here

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    curves: dict[str, list[Case]] = {}
    for case in figures.cases:
        curves.setdefault(f"{case.policy}, {case.tenants:,} tenants", []).append(case)
    for name, cases in curves.items():
        waiting = [case.waiting for case in cases]
        (line,) = axes.plot(waiting, [case.step_us.p50 for case in cases], marker="o", label=f"{name}, median")
        axes.plot(waiting, [case.step_us.p99 for case in cases], ":", color=line.get_color(), label=f"{name}, p99")
    axes.axhline(TARGET_US, color="black", linewidth=0.8, linestyle="--", label="target")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences waiting")
    axes.set_ylabel(f"µs a step, {figures.running} running")
    figure.legend(fontsize="x-small", ncols=3, loc="outside lower center")
    figure.savefig(file, dpi=150)


def _show(figures: PlanningFigures) -> None:
    table = Table(title=f"plan and apply with {figures.running} running, µs: median (p99)")
    for column in ("policy", "tenants", "waiting", "plan", "apply", "both"):
        table.add_column(column, justify="right")
    for case in figures.cases:
        spreads = (f"{spread.p50:.0f} ({spread.p99:.0f})" for spread in (case.plan_us, case.apply_us, case.step_us))
        table.add_row(case.policy, f"{case.tenants:,}", f"{case.waiting:,}", *spreads)
    Console().print(table)


@click.command()
@click.option("--max-running", default=256, show_default=True)
@click.option("--waiting", multiple=True, type=int, default=(1_000, 10_000, 100_000), show_default=True)
@click.option("--tenants", multiple=True, type=int, default=(100, 10_000), show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--steps", default=500, show_default=True, help="Of each round and case.")
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    max_running: int,
    waiting: tuple[int, ...],
    tenants: tuple[int, ...],
    rounds: int,
    steps: int,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Microseconds that planning a step and applying its result take, however many wait."""
    figures = measure(max_running, list(waiting), list(tenants), rounds, steps)
    if picture:
        plot(figures, picture)
    if as_json:
        cli.show(figures, as_json)
    else:
        _show(figures)


if __name__ == "__main__":
    main()
