"""The bare matrix products of steps that were run: what their time would be if everything else in them were free.

A process of its own, `python -m benchmarks.floor`, under the worker's environment: a job in on stdin, seconds out.
"""

import asyncio
import os
import sys
import time

import msgspec

from protocol.plan import WorkerConfig
from scheduler.worker import ENVIRONMENT


class Job(msgspec.Struct, frozen=True):
    """``steps``: of each step how many rows went through the model, and how many of them through its head."""

    worker: WorkerConfig
    steps: list[tuple[int, int]]


async def seconds(job: Job) -> float:
    """What the job's products take. Raises RuntimeError."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.floor",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=ENVIRONMENT | os.environ,
    )
    answer, _ = await process.communicate(msgspec.json.encode(job))
    if process.returncode:
        raise RuntimeError(f"the floor's process ended with status {process.returncode}")
    return msgspec.json.decode(answer, type=float)


def measure(job: Job) -> float:
    """Every linear layer in the model's order, packed as the worker packs it, on random rows: float32 on the CPU."""
    import torch  # noqa: PLC0415 - only in the process that measures

    from workers.linear import PackedLinear  # noqa: PLC0415
    from workers.model import load  # noqa: PLC0415
    from workers.packing import pack  # noqa: PLC0415

    if job.worker.threads is not None:
        torch.set_num_threads(job.worker.threads)
    module = load(job.worker.model, "float32", "cpu").module
    pack(module, job.worker.weights)
    head = module.get_output_embeddings()
    layers = [layer for layer in module.modules() if isinstance(layer, (PackedLinear, torch.nn.Linear))]
    longest = max(rows for rows, _ in job.steps)
    inputs = {width: torch.randn(longest, width) for width in {layer.in_features for layer in layers}}

    def step(rows: int, sampled: int) -> None:
        for layer in layers:
            layer(inputs[layer.in_features][: sampled if layer is head else rows])

    with torch.inference_mode():
        step(*job.steps[0])
        begun = time.perf_counter()
        for rows, sampled in job.steps:
            step(rows, sampled)
        return time.perf_counter() - begun


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(measure(msgspec.json.decode(sys.stdin.buffer.read(), type=Job))))
