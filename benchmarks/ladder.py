"""The ladder: one workload without a KV cache, with one, in static batches, and with continuous batching.

The slow rungs run on the first few requests only, which is said beside their figures; every rung's greedy tokens are
compared with continuous batching's.
"""

import asyncio
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import cli, engine
from benchmarks.baselines import BaselineFigures
from benchmarks.workload import Workload, config, load, mixed


class Rung(msgspec.Struct, frozen=True):
    """``expected`` is what the literature leads one to expect; ``equal_tokens`` the share that continuous batching gave too."""

    name: str
    requests: int
    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    equal_tokens: float
    expected: str


class Ladder(msgspec.Struct, frozen=True):
    """Factors are ratios of tokens/s."""

    rungs: list[Rung]
    cached_over_naive: float
    continuous_over_cached: float
    continuous_over_static: float


_EXPECTED = {
    "naive": "",
    "cached": "5 to 10x over naive at moderate lengths",
    "static": "more than one at a time, less the more lengths vary",
    "continuous": "over static: more the more output lengths vary (Orca, vLLM)",
}


def climb(workload: Workload, model: str, limits: dict[str, int], max_running: int, max_batch_tokens: int) -> Ladder:
    """Run every rung in a process of its own, slowest first. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True)) as progress:
        file = Path(folder) / "workload.json"
        file.write_bytes(msgspec.json.encode(workload))
        task = progress.add_task("ladder", total=len(limits) + 1)
        lower = {}
        for mode, first in limits.items():
            progress.update(task, description=f"{mode}, first {first} requests")
            lower[mode] = _baseline(mode, file, first, model)
            progress.advance(task)
        progress.update(task, description="continuous")
        ours = asyncio.run(engine.run(workload, config(model, max_running, max_batch_tokens).worker()))
        progress.advance(task)
    top = BaselineFigures(ours.output_tokens, ours.seconds, ours.output_tokens_per_s, ours.token_ids)
    rungs = [_rung(mode, figures, top) for mode, figures in (lower | {"continuous": top}).items()]
    rate = {rung.name: rung.output_tokens_per_s for rung in rungs}
    return Ladder(
        rungs=rungs,
        cached_over_naive=rate["cached"] / rate["naive"],
        continuous_over_cached=rate["continuous"] / rate["cached"],
        continuous_over_static=rate["continuous"] / rate["static"],
    )


def _baseline(mode: str, file: Path, first: int, model: str) -> BaselineFigures:
    command = [sys.executable, "-m", "benchmarks.baselines", mode, "--workload", str(file), "--first", str(first)]
    done = subprocess.run([*command, "--model", model, "--json"], check=True, stdout=subprocess.PIPE)
    return msgspec.json.decode(done.stdout, type=BaselineFigures)


def _rung(mode: str, figures: BaselineFigures, top: BaselineFigures) -> Rung:
    equal = sum(
        ours == theirs
        for id, output in figures.token_ids.items()
        for ours, theirs in zip(top.token_ids[id], output, strict=True)
    )
    return Rung(
        name=mode,
        requests=len(figures.token_ids),
        output_tokens=figures.output_tokens,
        seconds=figures.seconds,
        output_tokens_per_s=figures.output_tokens_per_s,
        equal_tokens=equal / figures.output_tokens,
        expected=_EXPECTED[mode],
    )


def plot(ladder: Ladder, file: Path) -> None:
    """A bar per rung."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and needed only here

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 3))
    bars = axes.barh([rung.name for rung in ladder.rungs], [rung.output_tokens_per_s for rung in ladder.rungs])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("output tokens/s")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def _show(ladder: Ladder) -> None:
    table = Table(title="the ladder")
    for column in ("rung", "requests", "tokens", "tokens/s", "equal tokens", "expected"):
        table.add_column(column)
    for rung in ladder.rungs:
        table.add_row(
            rung.name,
            str(rung.requests),
            str(rung.output_tokens),
            f"{rung.output_tokens_per_s:.1f}",
            f"{rung.equal_tokens:.1%}",
            rung.expected,
        )
    console = Console()
    console.print(table)
    console.print(
        f"cached / naive {ladder.cached_over_naive:.1f}x, continuous / cached {ladder.continuous_over_cached:.1f}x, "
        f"continuous / static {ladder.continuous_over_static:.1f}x"
    )


@click.command()
@click.option("--workload", "file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--slow-first", default=6, show_default=True, help="Requests that the two slow rungs run, the same ones.")
@cli.options
def main(
    file: Path | None,
    picture: Path | None,
    slow_first: int,
    model: str,
    max_running: int,
    max_batch_tokens: int,
    as_json: bool,
) -> None:
    """Without --workload: 64 requests, prompts of 16 to 256 tokens, outputs of 16 to 192."""
    workload = load(file) if file else mixed(64, prompt=(16, 256), output=(16, 192), seed=1)
    limits = {"naive": slow_first, "cached": slow_first, "static": len(workload.requests)}
    ladder = climb(workload, model, limits, max_running, max_batch_tokens)
    if picture:
        plot(ladder, picture)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(ladder)).decode())
    else:
        _show(ladder)


if __name__ == "__main__":
    main()
