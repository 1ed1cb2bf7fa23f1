"""How fast a model's linear layers are, by how their weights are held and by how many rows a step has (CPU)."""

import statistics
import time
from itertools import product

import click
import msgspec
import torch
from torch import Tensor, nn

from benchmarks import cli
from protocol.plan import WeightsName
from workers.linear import PackedLinear
from workers.model import load
from workers.packing import pack

_ROWS = (1, 4, 16, 32, 64, 256)
_WEIGHTS: tuple[WeightsName, ...] = ("plain", "float32", "bfloat16", "int8")


class LinearFigures(msgspec.Struct, frozen=True):
    """``ms``: of all linear layers together, the head's too, each with so many rows; median of the rounds."""

    weights: WeightsName
    rows: int
    ms: float


class LinearsFigures(msgspec.Struct, frozen=True):
    """In each of the rounds all have their turn."""

    model: str
    threads: int
    rounds: int
    steps: list[LinearFigures]


def _layers_of(name: str, weights: WeightsName) -> list[PackedLinear | nn.Linear]:
    """In the model's order, packed as the worker packs them."""
    module = load(name, "float32", "cpu").module
    pack(module, weights)
    return [layer for layer in module.modules() if isinstance(layer, (PackedLinear, nn.Linear))]


def _step_s(layers: list[PackedLinear | nn.Linear], inputs: dict[int, Tensor], rows: int) -> float:
    begun = time.perf_counter()
    for layer in layers:
        layer(inputs[layer.in_features][:rows])
    return time.perf_counter() - begun


@torch.inference_mode()
def measure(name: str, rounds: int) -> LinearsFigures:
    models = {weights: _layers_of(name, weights) for weights in _WEIGHTS}
    widths = {layer.in_features for layers in models.values() for layer in layers}
    inputs = {width: torch.randn(max(_ROWS), width) for width in widths}
    times: dict[tuple[WeightsName, int], list[float]] = {case: [] for case in product(_WEIGHTS, _ROWS)}
    for _, (weights, rows) in product(range(rounds), times):
        times[weights, rows].append(1e3 * _step_s(models[weights], inputs, rows))
    steps = [LinearFigures(*case, statistics.median(each)) for case, each in times.items()]
    return LinearsFigures(name, torch.get_num_threads(), rounds, steps)


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--rounds", default=9, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="[default: all cores]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(model: str, rounds: int, threads: int | None, as_json: bool) -> None:
    """Compare the time of a model's linear layers between the ways to hold their weights (CPU)."""
    if threads is not None:
        torch.set_num_threads(threads)
    cli.show(measure(model, rounds), as_json)


if __name__ == "__main__":
    main()
