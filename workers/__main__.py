"""A worker process: ``python -m workers``, frames in on stdin, frames out on stdout, everything else on stderr."""

import logging
import os
import signal
import sys
import time
from typing import BinaryIO

import msgspec
import torch

from protocol import plan
from workers import selftest
from workers.attention import AttentionBackend, choose
from workers.grammar import Grammars
from workers.model import Model, ModelRefused, load
from workers.packing import pack
from workers.runner import Runner
from workers.weights import WeightsError

logger = logging.getLogger("workers")


def main() -> None:
    # Libraries print; frames must not be mixed with that, so they get the pipe and everybody else gets stderr.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # Ctrl-C and SIGHUP reach the whole process group; the scheduler decides when we stop, by closing our stdin.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    serve(sys.stdin.buffer, replies)


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer frames until the scheduler closes the pipe."""
    body = _read(requests)
    if body is None:
        return
    try:
        runner, info = start(plan.decode_config(body))
    except (ModelRefused, WeightsError, ValueError, OSError) as error:
        _write(replies, plan.StartFailure(str(error)))
        return
    _write(replies, info)
    work(runner, requests, replies)


def work(runner: Runner, requests: BinaryIO, replies: BinaryIO) -> None:
    """Do what the scheduler says until it closes the pipe."""
    failed = False
    done = time.perf_counter()
    while (body := _read(requests)) is not None:
        waited_s = time.perf_counter() - done
        match plan.decode_command(body):
            case plan.Ping():
                _write(replies, plan.Pong())
            case plan.Resume():
                failed = False
            case plan.StepPlan() as step if not failed:
                answer = execute(runner, step, waited_s)
                failed = isinstance(answer, plan.StepFailure)
                # From before the answer is written: while it is, the scheduler may have our core.
                done = time.perf_counter()
                _write(replies, answer)


def start(config: plan.WorkerConfig) -> tuple[Runner, plan.WorkerInfo]:
    """Load, check and size everything. Raises ModelRefused, WeightsError, ValueError."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(_resolve_device(config.device))
    model = load(config.model, _resolve_dtype(config.dtype, device), str(device), config.max_model_len)
    kind = choose(
        config.attention,
        device,
        model.dtype,
        model.layers,
        block_size=config.block_size,
        attributes=model.attributes,
    )
    expected = selftest.expect(model)
    if pack(model.module, config.weights) != model.dtype:
        # Rounded weights have logits of their own; then both ways are asked for those.
        expected = selftest.expect(model)
    selftest.check(model, kind, config.block_size, expected)
    backend = kind(model.layers, _num_blocks(config, model), config.block_size, model.dtype, device)
    max_model_len = min(model.max_model_len, backend.num_blocks * config.block_size)
    grammars = Grammars(model.path, model.vocab_size, model.eos_ids)
    runner = Runner(
        model.module, backend, grammars=grammars, max_running=config.max_running, max_model_len=max_model_len
    )
    return runner, plan.WorkerInfo(
        model_path=str(model.path),
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_ids=model.eos_ids,
        num_blocks=backend.num_blocks,
        block_size=config.block_size,
        kv_bytes_per_block=AttentionBackend.bytes_per_block(model.layers, config.block_size, model.dtype),
        device=str(device),
        dtype=str(model.dtype).removeprefix("torch."),
        attention=kind.name,
    )


def execute(runner: Runner, step: plan.StepPlan, waited_s: float) -> plan.StepResult | plan.StepFailure:
    """Run one step that was waited for so long; a failure is reported, not fatal."""
    try:
        return msgspec.structs.replace(runner.step(step), waited_s=waited_s)
    except Exception as error:
        # Whatever a forward pass can raise: the scheduler decides what it means, and the traceback stays here.
        logger.exception("step %d failed", step.step)
        return plan.StepFailure(step.step, f"{type(error).__name__}: {error}")


def _num_blocks(config: plan.WorkerConfig, model: Model) -> int:
    """As many as asked for or as the memory holds, but never more than every slot could fill."""
    if config.num_blocks is not None:
        return config.num_blocks
    per_block = AttentionBackend.bytes_per_block(model.layers, config.block_size, model.dtype)
    fitting = config.kv_memory_mb * 2**20 // per_block
    if not fitting:
        raise ValueError(f"kv_memory_mb = {config.kv_memory_mb} holds no block of {per_block} bytes")
    return min(fitting, config.max_running * -(-model.max_model_len // config.block_size))


def _resolve_device(device: str) -> str:
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _resolve_dtype(dtype: str, device: torch.device) -> str:
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def _read(pipe: BinaryIO) -> bytes | None:
    header = pipe.read(plan.HEADER_BYTES)
    if len(header) < plan.HEADER_BYTES:
        return None
    return pipe.read(plan.body_length(header))


def _write(pipe: BinaryIO, reply: plan.Reply) -> None:
    pipe.write(plan.frame(reply))
    pipe.flush()


if __name__ == "__main__":
    main()
