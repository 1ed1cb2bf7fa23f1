"""How large a KV block should be: what is left empty in the last ones, simulated, and how fast the CPU kernel reads them."""

import statistics
from itertools import islice
from random import Random

import click
import msgspec

from benchmarks import cli
from scheduler.core.batch import Limits
from scheduler.simulation import arrivals, models, synthetic
from scheduler.simulation.run import Setup, run

_SIZES = (8, 16, 32, 64, 128)
#: Requests of these lengths keep a batch of some 40 busy.
_PROMPT, _OUTPUT = "lognormal:256:0.8", "lognormal:128:0.8"
_REQUESTS_PER_S = 0.9
_KV_TOKENS = 64 * 1024
_CONTEXT, _ROWS, _CHUNK = 200, 64, 256


class BlockFigures(msgspec.Struct, frozen=True):
    """``waste``: slots of allocated blocks without a token, as a share of all allocated ones, over time; ``decodes_ms``,
    ``decode_ms`` and ``prefill_ms``: attention of 64 decodes, of one and of a prompt of 256, milliseconds a layer, medians."""

    block_size: int
    waste: float
    decodes_ms: float
    decode_ms: float
    prefill_ms: float


class BlocksFigures(msgspec.Struct, frozen=True):
    """``requests`` were simulated, and each kernel time is of ``steps`` steps in each of the rounds, sizes in turn."""

    requests: int
    rounds: int
    steps: int
    sizes: list[BlockFigures]


def _waste(block_size: int, requests: int) -> float:
    prompt, output = (synthetic.lengths(text, Random(text)) for text in (_PROMPT, _OUTPUT))
    demands = synthetic.demands(synthetic.poisson(_REQUESTS_PER_S, Random("times")), prompt, output)
    coming = islice(arrivals.assign(demands, arrivals.round_robin(8)), requests)
    setup = Setup("fair", models.load("smollm2-cpu"), Limits(64, 256, 8192), _KV_TOKENS // block_size, block_size)
    return run(coming, setup).figures.kv_waste_ratio


def _kernel(rounds: int, steps: int) -> dict[tuple[int, str], float]:
    from benchmarks.attention import Workload, random_batch, step_times  # noqa: PLC0415
    from workers.attention.cpu import CpuAttention  # noqa: PLC0415 - torch

    loads = {
        "decodes": Workload("decode", _ROWS, 1, _CONTEXT),
        "decode": Workload("decode", 1, 1, _CONTEXT),
        "prefill": Workload("prefill", 1, _CHUNK, _CHUNK),
    }
    times: dict[tuple[int, str], list[float]] = {(size, name): [] for size in _SIZES for name in loads}
    for _ in range(rounds):
        for size, name in times:
            batch = random_batch(loads[name], size)
            times[size, name] += step_times(CpuAttention, batch, steps, size)
    return {case: statistics.median(each) for case, each in times.items()}


@click.command()
@click.option("--requests", default=5000, show_default=True, help="To simulate.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(requests: int, rounds: int, steps: int, as_json: bool) -> None:
    """Wasted memory and attention's speed by the number of tokens in a KV block (CPU)."""
    times = _kernel(rounds, steps)
    sizes = [
        BlockFigures(size, _waste(size, requests), *(times[size, name] for name in ("decodes", "decode", "prefill")))
        for size in _SIZES
    ]
    cli.show(BlocksFigures(requests, rounds, steps, sizes), as_json)


if __name__ == "__main__":
    main()
