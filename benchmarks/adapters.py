"""What LoRA adapters cost: the same workload without any, with some that nobody uses, and with every request on one of them.

Random adapters, as PEFT saves them, on the projections of attention and of the MLP. The ways take turns, each on a fresh worker.
"""

import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import msgspec

from benchmarks import cli
from benchmarks.engine import run
from benchmarks.workload import Workload, config, load
from protocol.plan import WorkerConfig

_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class AdapterFigures(msgspec.Struct, frozen=True):
    """Output tokens/s, medians of the rounds; the shares are medians of each round's own."""

    adapters: int
    rank: int
    rounds: int
    base: float
    unused: float
    used: float
    unused_share: float
    used_share: float


def make(model: str, rank: int, count: int, folder: str) -> None:
    """Adapters ``0``, ``1``, … in folders of their names; in a process of its own, so that no model stays in memory."""
    import torch  # noqa: PLC0415
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415

    from workers.model import load as load_model  # noqa: PLC0415

    torch.manual_seed(0)
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_LAYERS), init_lora_weights=False)
    adapted = get_peft_model(load_model(model, "float32", "cpu").module, settings, adapter_name="0")
    for number in range(1, count):
        adapted.add_adapter(str(number), settings)
    adapted.save_pretrained(folder)


def _made(model: str, rank: int, count: int, folder: Path) -> dict[str, str]:
    code = f"from benchmarks.adapters import make; make({model!r}, {rank}, {count}, {str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return {str(number): str(folder / str(number)) for number in range(count)}


async def measure(
    workload: Workload, worker: WorkerConfig, adapters: dict[str, str], rank: int, rounds: int
) -> AdapterFigures:
    """Raises RuntimeError when the worker fails."""
    names = list(adapters)
    used = Workload(
        [
            msgspec.structs.replace(item, adapter=names[index % len(names)])
            for index, item in enumerate(workload.requests)
        ]
    )
    adapted = msgspec.structs.replace(worker, adapters=adapters, max_adapters=len(adapters))
    ways = {"base": (workload, worker), "unused": (workload, adapted), "used": (used, adapted)}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in random.sample(list(ways), len(ways)):
            speeds[way].append((await run(*ways[way])).output_tokens_per_s)

    def share(way: str) -> float:
        return statistics.median(speed / base for speed, base in zip(speeds[way], speeds["base"], strict=True))

    medians = {way: statistics.median(of) for way, of in speeds.items()}
    return AdapterFigures(
        len(adapters), rank, rounds, **medians, unused_share=share("unused"), used_share=share("used")
    )


@click.command()
@cli.workload_option
@cli.options
@click.option("--requests", type=int, help="Only the first of the workload.")
@click.option("--adapters", default=8, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--rounds", default=3, show_default=True)
def main(
    file: Path,
    model: str,
    max_running: int,
    max_batch_tokens: int,
    as_json: bool,
    requests: int | None,
    adapters: int,
    rank: int,
    rounds: int,
) -> None:
    """Run a workload with and without LoRA adapters."""
    worker = config(model, max_running, max_batch_tokens).worker()
    with tempfile.TemporaryDirectory(prefix="tokenbus-adapters-") as folder:
        made = _made(model, rank, adapters, Path(folder))
        figures = asyncio.run(measure(load(file).first(requests), worker, made, rank, rounds))
    cli.show(figures, as_json)


if __name__ == "__main__":
    main()
