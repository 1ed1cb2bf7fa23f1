"""The command line of ``tokenbus bench peers``, its table and its picture."""

import os
import platform
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import cli
from benchmarks.peers import rounds as alternating
from benchmarks.peers.catalogue import PEERS
from benchmarks.peers.figures import PeerFigures, PeersFigures, summarize
from benchmarks.peers.job import Item, Job
from benchmarks.workload import Workload, load
from workers.weights import DEMO, demo_model


def compare(job: Job, wanted: list[str], shortened: dict[str, int], rounds: int) -> PeersFigures:
    """All wanted peers and ours on one job, in alternating rounds, with a line of progress."""
    entries = alternating.entries(PEERS, wanted, job, shortened)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("peers", total=None)
        alternating.measure(entries, rounds, lambda what: progress.update(task, description=what))
    return PeersFigures(_cpu(), job.threads, job.max_running, rounds, summarize(entries))


def _cpu() -> str:
    """What the processor calls itself: proc(5), ``/proc/cpuinfo``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def job(workload: Workload, model: Path, threads: int, max_running: int) -> Job:
    items = [Item(item.id, item.prompt_token_ids, item.max_tokens) for item in workload.requests]
    return Job(str(model.resolve()), threads, max_running, items)


def plot(figures: PeersFigures, file: Path) -> None:
    """A bar for each that ran, and in a line from the slowest of its rounds to the fastest."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and needed only here

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    rows = [(_label(peer), peer.output_tokens_per_s) for peer in figures.peers]
    measured = [(name, rate) for name, rate in rows if rate is not None]
    figure, axes = plt.subplots(figsize=(7, 1 + 0.4 * len(measured)))
    bars = axes.barh(
        [name for name, _ in measured],
        [rate.median for _, rate in measured],
        xerr=[[rate.median - rate.min for _, rate in measured], [rate.max - rate.median for _, rate in measured]],
        color=["tab:blue" if name.startswith("ours") else "tab:gray" for name, _ in measured],
    )
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("output tokens/s")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _label(peer: PeerFigures) -> str:
    return f"{peer.name}, outputs 1/{peer.shortened}" if peer.shortened > 1 else peer.name


def _row(peer: PeerFigures) -> list[str]:
    rate = peer.output_tokens_per_s
    return [
        _label(peer),
        "" if rate is None else f"{rate.median:.1f}",
        "" if rate is None else f"{rate.min:.1f} to {rate.max:.1f}",
        "" if peer.ours_over is None else f"{peer.ours_over:.2f}x ({peer.beside})",
        "" if peer.equal_requests is None else f"{peer.equal_requests} of {peer.requests}",
        ", ".join(f"{name} {version}" for name, version in peer.versions.items()),
    ]


def _show(figures: PeersFigures) -> None:
    console = Console()
    table = Table(title=f"{figures.cpu}, {figures.threads} threads, {figures.rounds} rounds")
    for column in ("peer", "tokens/s", "range", "ours over it", "same tokens", "versions"):
        table.add_column(column)
    for peer in figures.peers:
        table.add_row(*_row(peer))
    console.print(table)
    for peer in figures.peers:
        if peer.error:
            console.print(f"{peer.name}: {peer.error}", markup=False, highlight=False)


def _names(_context: click.Context, _option: click.Parameter, text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PEERS]:
        raise click.BadParameter(f"{', '.join(unknown)}: known are {', '.join(PEERS)}")
    return names


def _divisors(_context: click.Context, _option: click.Parameter, pairs: tuple[str, ...]) -> dict[str, int]:
    divisors = {}
    for pair in pairs:
        name, _, divisor = pair.partition("=")
        if name not in PEERS or not divisor.isdecimal() or int(divisor) < 1:
            raise click.BadParameter(f"{pair!r} is not PEER=N with a peer's name and a whole number from 1")
        divisors[name] = int(divisor)
    return divisors


@click.command()
@cli.workload_option
@click.option("--peers", "names", default=",".join(PEERS), show_default=True, callback=_names, help="Comma-separated.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--shorten",
    "shortened",
    multiple=True,
    metavar="PEER=N",
    callback=_divisors,
    help="Run this peer, and ours beside it, with outputs of an N-th of their length.",
)
@click.option("--model", default=DEMO, show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default="all cores", type=click.IntRange(min=1))
@click.option("--max-running", default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", "picture", type=click.Path(path_type=Path, dir_okay=False))
def main(
    file: Path,
    names: list[str],
    rounds: int,
    shortened: dict[str, int],
    model: str,
    threads: int,
    max_running: int,
    as_json: bool,
    picture: Path | None,
) -> None:
    """Run a workload through other engines and through ours, in turn; each is installed on first use."""
    path = demo_model() if model == DEMO else Path(model)
    figures = compare(job(load(file), path, threads, max_running), names, shortened, rounds)
    if picture:
        plot(figures, picture)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(figures)).decode())
    else:
        _show(figures)


if __name__ == "__main__":
    main()
