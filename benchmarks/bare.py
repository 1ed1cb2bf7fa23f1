"""What steps that were run can't be faster than: the time of their bare matrix products, or of reading the weights.

A process of its own, `python -m benchmarks.bare`, under the worker's environment: a job in on stdin, the times out.
"""

import asyncio
import os
import statistics
import sys
import time

import msgspec

from protocol.plan import WorkerConfig
from scheduler.worker import ENVIRONMENT

#: 512 MiB.
_READ_FLOATS = 1 << 27
_READ_PASSES = 16


class Job(msgspec.Struct, frozen=True):
    """``steps``: of each step how many rows went through the model, and how many of them to its end."""

    worker: WorkerConfig
    steps: list[tuple[int, int]]


class Bare(msgspec.Struct, frozen=True):
    """``products_s``: all matrix products of all steps. ``weight_bytes``: what one step reads of weights at least.

    ``read_bytes_per_s``: what the same threads read from memory, the median of several passes.
    """

    products_s: float
    weight_bytes: int
    read_bytes_per_s: float

    @property
    def read_s(self) -> float:
        """To read the weights once."""
        return self.weight_bytes / self.read_bytes_per_s


async def time_bare(job: Job) -> Bare:
    """Raises RuntimeError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.bare",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=ENVIRONMENT | os.environ,
    )
    answer, _ = await process.communicate(msgspec.json.encode(job))
    if process.returncode:
        raise RuntimeError(f"the process of the bare products ended with status {process.returncode}")
    return msgspec.json.decode(answer, type=Bare)


def measure(job: Job) -> Bare:
    """Every linear layer in the model's order, packed as the worker packs it, on random rows: float32 on the CPU."""
    import torch  # noqa: PLC0415 - only in the process that measures

    from workers.linear import PackedLinear  # noqa: PLC0415
    from workers.model import load  # noqa: PLC0415
    from workers.packed_layer import PackedLayer  # noqa: PLC0415
    from workers.packing import pack  # noqa: PLC0415

    if job.worker.threads is not None:
        torch.set_num_threads(job.worker.threads)
    module = load(job.worker.model, "float32", "cpu").module
    pack(module, job.worker.weights)
    decoder = [layer for layer in module.modules() if isinstance(layer, PackedLayer)]
    # All that comes after the last attention is computed for tokens that are sampled after, and no others.
    narrow = {
        module.get_output_embeddings(),
        *(each for last in decoder[-1:] if last.ends for each in last.products[1:]),
    }
    layers = [layer for layer in module.modules() if isinstance(layer, (PackedLinear, torch.nn.Linear))]
    longest = max(rows for rows, _ in job.steps)
    inputs = {width: torch.randn(longest, width) for width in {layer.in_features for layer in layers}}

    def step(rows: int, sampled: int) -> None:
        for layer in layers:
            layer(inputs[layer.in_features][: sampled if layer in narrow else rows])

    with torch.inference_mode():
        step(*job.steps[0])
        begun = time.perf_counter()
        for rows, sampled in job.steps:
            step(rows, sampled)
        products_s = time.perf_counter() - begun
    packed = sum(layer.nbytes for layer in layers if isinstance(layer, PackedLinear))
    plain = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    return Bare(products_s, packed + plain, _read_bytes_per_s())


def _read_bytes_per_s() -> float:
    """What no cache holds, summed up several times, the median: others on the machine slow this down as they do a step. It
    lies as weights do."""
    import torch  # noqa: PLC0415 - only in the process that measures

    from workers import huge_pages  # noqa: PLC0415

    (numbers,) = huge_pages.zeros([(_READ_FLOATS,)], torch.float32)
    numbers.fill_(1)  # else all its pages are one
    seconds = []
    for _ in range(_READ_PASSES):
        begun = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begun)
    return numbers.nbytes / statistics.median(seconds)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
