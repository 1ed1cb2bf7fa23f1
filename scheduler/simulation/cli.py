"""``tokenbus simulate``: one run, all policies side by side, the paper's suites, how many replicas a target needs, or a cost
model fitted to measured steps."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from scheduler.core import policies
from scheduler.core.policies import PolicyName
from scheduler.simulation import fit as fitting
from scheduler.simulation import picture, replicas, tables
from scheduler.simulation.cost import CostError
from scheduler.simulation.figures import Figures
from scheduler.simulation.picture import PictureError
from scheduler.simulation.replicas import ReplicaFigures, Targets
from scheduler.simulation.run import Outcome, Stuck, Watch, run
from scheduler.simulation.scenario import Scenario, ScenarioError
from scheduler.simulation.suites import SUITES, SuiteFigures, run_suite
from scheduler.simulation.trace import TraceError

_ERRORS = (msgspec.ValidationError, CostError, PictureError, ScenarioError, Stuck, TraceError, OSError)
_FILE = click.Path(path_type=Path, dir_okay=False)


_Runs = dict[str, Sequence[Outcome]]


class Comparison(msgspec.Struct, frozen=True):
    """Every policy on the same arrivals; throughput also as a multiple of static batching's."""

    runs: list[Figures]
    throughput_over_static: dict[str, float]


_Shown = Figures | Comparison | ReplicaFigures | list[SuiteFigures]

_REQUESTS = (
    click.option(
        "--trace", type=_FILE, help="CSV of TIMESTAMP,ContextTokens,GeneratedTokens instead of made-up requests."
    ),
    click.option("--speed", default=1.0, show_default=True, help="Replay a trace so many times as fast."),
    click.option("--repeat", default=1, show_default=True, help="Replay a trace so many times over."),
    click.option("--requests", type=int, help="Only the first so many.  [default: all of a trace, else 1000]"),
    click.option("--pattern", default="poisson", show_default=True, type=click.Choice(["poisson", "constant"])),
    click.option(
        "--rate", default="1", show_default=True, help="Requests/s; 2,0: on and off; 1,4,2: one after the other."
    ),
    click.option("--period", default=60.0, show_default=True, help="Seconds that each of several rates lasts."),
    click.option(
        "--prompt-tokens",
        "prompt",
        default="128",
        show_default=True,
        help="Tokens: 128, 16-512, geometric:64, lognormal:128:0.8.",
    ),
    click.option("--output-tokens", "output", default="64", show_default=True, help="Tokens, as for --prompt-tokens."),
    click.option(
        "--max-tokens", type=int, help="What requests ask for, should they stop earlier.  [default: what comes]"
    ),
    click.option("--prefix-tokens", default=0, show_default=True, help="Common to a tenant's prompts, and cached."),
    click.option("--tenants", default=1, show_default=True, help="They take turns, or see --zipf."),
    click.option("--zipf", type=float, help="Draw tenants, the k-th in proportion to k to the power of minus this."),
    click.option("--weight", "weights", multiple=True, metavar="TENANT=WEIGHT"),
    click.option("--seed", default=0, show_default=True),
)
_MACHINE = (
    click.option(
        "--cost", default="smollm2-cpu", show_default=True, help="Cost model: a name, or a file that fit wrote."
    ),
    click.option("--max-running", default=64, show_default=True),
    click.option("--max-batch-tokens", default=256, show_default=True),
    click.option("--itl-target-ms", type=float, help="About how long a step may take while somebody decodes."),
    click.option("--max-model-len", default=8192, show_default=True),
    click.option("--block-size", default=16, show_default=True),
    click.option("--num-blocks", default=1456, show_default=True, help="The default is what serve has for SmolLM2."),
)
_COMMON = (
    click.option("--policy", default="fair", show_default=True, type=click.Choice(policies.NAMES)),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option("--output", "file", type=_FILE, help="Write the JSON here."),
)
_MODES = (
    click.option("--compare", is_flag=True, help="All policies on the same arrivals."),
    click.option(
        "--suite",
        type=click.Choice(["all", *SUITES]),
        help="The fairness paper's workloads and machine, fair and FCFS.",
    ),
    click.option("--plot", type=_FILE, help="Draw a picture; needs matplotlib."),
)


def _options(*options: Callable[..., Any]) -> Callable[..., Any]:
    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.group(invoke_without_command=True)
@_options(*_COMMON, *_MODES, *_REQUESTS, *_MACHINE)
@click.pass_context
def simulate(
    context: click.Context,
    /,
    policy: PolicyName,
    compare: bool,
    suite: str | None,
    as_json: bool,
    file: Path | None,
    plot: Path | None,
    weights: tuple[str, ...],
    **options: Any,
) -> None:
    """The service's own batcher on a virtual clock: no worker, no broker, minutes in seconds."""
    if context.invoked_subcommand is not None:
        return
    figures: _Shown
    try:
        scenario = msgspec.convert({**options, "weights": _weights(weights)}, Scenario)
        with _progress(quiet=as_json) as watch:
            if suite is not None:
                figures, runs = _suites(list(SUITES) if suite == "all" else [suite], scenario.seed, watch)
            elif compare:
                figures, runs = _compare(scenario, watch)
            else:
                figures, runs = _single(scenario, policy, watch)
        _show(figures, as_json, file)
        if plot is not None:
            picture.draw(runs, plot)
    except _ERRORS as error:
        raise click.ClickException(str(error)) from None


@simulate.command("replicas")
@click.option("--ttft-p99", type=float, required=True, help="Seconds from arrival to the first token, at most.")
@click.option("--itl-p99", type=float, help="Seconds between two tokens, at most.")
@click.option("--most", default=64, show_default=True, type=click.IntRange(min=1), help="Replicas to try.")
@_options(*_COMMON, *_REQUESTS, *_MACHINE)
def replicas_needed(
    ttft_p99: float,
    itl_p99: float | None,
    most: int,
    policy: PolicyName,
    as_json: bool,
    file: Path | None,
    weights: tuple[str, ...],
    **options: Any,
) -> None:
    """How many replicas hold these percentiles; requests are dealt to them in turn."""
    try:
        targets = msgspec.convert({"ttft_p99_s": ttft_p99, "itl_p99_s": itl_p99}, Targets)
        scenario = msgspec.convert({**options, "weights": _weights(weights)}, Scenario)
        with _progress(quiet=as_json) as watch:
            figures = replicas.search(
                list(scenario.arrivals()), scenario.setup(policy), targets, most=most, watch=watch
            )
        _show(figures, as_json, file)
    except _ERRORS as error:
        raise click.ClickException(str(error)) from None


@simulate.command()
@click.argument("traces", nargs=-1, required=True, type=_FILE)
@click.option("--name", default="fitted", show_default=True)
@click.option("--origin", default="", help="What was measured: model, machine, date.")
@click.option("--output", "file", type=_FILE, help="Write the model here; else it is printed.")
def fit(traces: tuple[Path, ...], name: str, origin: str, file: Path | None) -> None:
    """Fit a cost model to TRACES of tokenbus bench engine --trace."""
    try:
        model = fitting.fit(fitting.read(traces), name=name, origin=origin)
        if file is None:
            click.echo(_json(model))
            return
        file.write_text(_json(model) + "\n")
    except _ERRORS as error:
        raise click.ClickException(str(error)) from None
    Console().print(tables.of_model(model))


def _single(scenario: Scenario, policy: PolicyName, watch: Watch) -> tuple[Figures, _Runs]:
    outcome = run(scenario.arrivals(), scenario.setup(policy), watch)
    return outcome.figures, {policy: [outcome]}


def _compare(scenario: Scenario, watch: Watch) -> tuple[Comparison, _Runs]:
    outcomes = [run(scenario.arrivals(), scenario.setup(policy), watch) for policy in policies.NAMES]
    runs = [outcome.figures for outcome in outcomes]
    static = next(figures for figures in runs if figures.policy == "static")
    return Comparison(runs, {figures.policy: tables.factor(figures, static) for figures in runs}), {"": outcomes}


def _suites(names: Sequence[str], seed: int, watch: Watch) -> tuple[list[SuiteFigures], _Runs]:
    done = {name: run_suite(SUITES[name], seed, watch=watch) for name in names}
    return [figures for figures, _ in done.values()], {name: outcomes for name, (_, outcomes) in done.items()}


def _weights(assignments: tuple[str, ...]) -> dict[str, float]:
    weights = {}
    for assignment in assignments:
        tenant, _, weight = assignment.rpartition("=")
        try:
            weights[tenant] = float(weight)
        except ValueError:
            raise ScenarioError(f"--weight {assignment} must look like t0=2") from None
    return weights


@contextlib.contextmanager
def _progress(*, quiet: bool) -> Iterator[Watch]:
    """On stderr."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.completed:,} requests ended after {task.fields[now]:,.0f} s"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=None, now=0.0)
        yield lambda ended, now: progress.update(task, completed=ended, now=now)


def _show(figures: _Shown, as_json: bool, file: Path | None) -> None:
    if file is not None:
        file.write_text(_json(figures) + "\n")
    if as_json:
        click.echo(_json(figures))
    elif file is None:
        Console().print(*_tables(figures))


def _tables(figures: _Shown) -> list[Any]:
    match figures:
        case Figures():
            return list(tables.of_run(figures))
        case Comparison():
            return [tables.of_runs(figures.runs)]
        case ReplicaFigures():
            return [tables.of_replicas(figures)]
        case _:
            return [tables.of_suites(figures)]


def _json(figures: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(figures)).decode()
