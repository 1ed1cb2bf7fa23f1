"""A worker process: ``python -m workers``, frames in on stdin, frames out on stdout, everything else on stderr.

With ``RANK STORE`` it is one that another worker process has started (`workers.ranks`).
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import msgspec
import torch
from torch import Tensor

from protocol import plan
from workers import selftest, tensor_parallel
from workers.attention import AttentionBackend, choose
from workers.draft_model import DraftModel
from workers.drafts import Drafter, NGram
from workers.grammar import Grammars
from workers.invariant import fix_shapes, one_by_one
from workers.lora import AdapterRefused, Adapters
from workers.memory import available
from workers.model import Model, ModelRefused, load
from workers.packing import INT8, pack
from workers.ranks import Ranks
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
    body = _read(sys.stdin.buffer)
    if body is None:
        return
    config = plan.decode_config(body)
    place = (int(sys.argv[1]), Path(sys.argv[2])) if sys.argv[1:] else ()
    ranks = Ranks(config.tensor_parallel, *place)
    ranks.start()
    ranks.tell(body)
    serve(config, ranks, sys.stdin.buffer, replies)
    ranks.leave(0)


def serve(config: plan.WorkerConfig, ranks: Ranks, requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer frames until the scheduler closes the pipe."""
    try:
        runner, info = start(config, ranks)
    except (ModelRefused, AdapterRefused, WeightsError, ValueError, OSError, torch.OutOfMemoryError) as error:
        ranks.forget()
        _write(replies, plan.StartFailure(str(error)))
        return
    _write(replies, info)
    work(runner, ranks, requests, replies)


def work(runner: Runner, ranks: Ranks, requests: BinaryIO, replies: BinaryIO) -> None:
    """Do what the scheduler says until it closes the pipe."""
    failed = False
    done = time.perf_counter()
    while (body := _read(requests)) is not None:
        ranks.tell(body)
        waited_s = time.perf_counter() - done
        match plan.decode_command(body):
            case plan.Ping():
                _write(replies, plan.Pong())
            case plan.Resume():
                failed = False
            case plan.StepPlan() as step if not failed:
                answer = execute(runner, step, waited_s)
                failed = isinstance(answer, plan.StepFailure)
                if failed:
                    # The others may wait for this one in the middle of the step.
                    ranks.leave(1)
                # From before the answer is written: while it is, the scheduler may have our core.
                done = time.perf_counter()
                _write(replies, answer)


def start(config: plan.WorkerConfig, ranks: Ranks) -> tuple[Runner, plan.WorkerInfo]:
    """Load, check and size everything. Raises ModelRefused, AdapterRefused, WeightsError, ValueError."""
    threads = config.threads or torch.get_num_threads()
    torch.set_num_threads(max(1, threads // ranks.count))
    device = torch.device(_resolve_device(config.device, ranks))
    if device.type == "cuda" and device.index is not None:
        # Collectives, graphs and kernels of ours run on the process's device, wherever their tensors are.
        torch.cuda.set_device(device)
    model = _model(config, device, ranks)
    agree = tensor_parallel.agree if ranks.count > 1 else None
    draft = _draft_model(config, model)
    kind = _attention(config, model)
    if config.batch_invariant:
        kind = one_by_one(kind)
    models = [model] if draft is None else [model, draft]
    per_block = sum(AttentionBackend.bytes_per_block(each.layers, config.block_size, each.kv_dtype) for each in models)
    longest = min(each.max_model_len for each in models)
    num_blocks = _num_blocks(config, per_block, longest)
    if device.type == "cpu":
        _check_memory(num_blocks * per_block * ranks.count)
    backend = kind(model.layers, num_blocks, config.block_size, model.dtype, device, model.kv_dtype)
    expected = selftest.expect(model)
    rounding = None
    if config.weights == INT8:
        # Once its activations are rounded so, two ways to compute a model only come near each other.
        selftest.check(model, kind, config.block_size, expected)
        rounding = torch.int8
    if pack(model.module, config.weights) != model.dtype:
        # Rounded weights have logits of their own; then both ways are asked for those.
        expected = selftest.expect(model)
    adapters = Adapters(model.module, {name: Path(path) for name, path in config.adapters.items()}, config.max_adapters)
    if config.batch_invariant:
        fix_shapes(model.module)
        selftest.check_invariant(model, kind, config.block_size, config.max_batch_tokens)
    selftest.check(model, kind, config.block_size, expected, rounding)
    max_model_len = min(longest, num_blocks * config.block_size)
    runner = Runner(
        model.module,
        backend,
        hidden=model.hidden,
        grammars=Grammars(model.path, model.vocab_size, model.eos_ids),
        max_running=config.max_running,
        max_model_len=max_model_len,
        adapters=adapters,
        drafter=_drafter(config, draft, num_blocks, agree),
        agree=agree,
    )
    _capture(runner, config, kind)
    return runner, plan.WorkerInfo(
        model_path=str(model.path),
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden.size,
        eos_ids=model.eos_ids,
        num_blocks=num_blocks,
        block_size=config.block_size,
        kv_bytes_per_block=per_block,
        device=str(device),
        dtype=_name(model.dtype),
        kv_dtype=_name(model.kv_dtype),
        attention=kind.name,
        sampling=model.sampling,
        adapters=list(config.adapters),
    )


def execute(runner: Runner, step: plan.StepPlan, waited_s: float) -> plan.StepResult | plan.StepFailure:
    """Run one step that was waited for so long; a failure is reported, not fatal."""
    try:
        return msgspec.structs.replace(runner.step(step), waited_s=waited_s)
    except Exception as error:
        # Whatever a forward pass can raise: the scheduler decides what it means, and the traceback stays here.
        logger.exception("step %d failed", step.step)
        return plan.StepFailure(step.step, f"{type(error).__name__}: {error}")


def _model(config: plan.WorkerConfig, device: torch.device, ranks: Ranks) -> Model:
    """The model, or this rank's share of it."""
    dtype = _resolve_dtype(config.dtype, device)
    if ranks.count == 1:
        return _holding(config, load(config.model, dtype, str(device), config.max_model_len))
    # No device need hold the whole of it.
    whole = load(config.model, dtype, "cpu", config.max_model_len)
    tensor_parallel.check(whole, ranks)
    ranks.join(device)
    return _holding(config, tensor_parallel.share(whole, ranks, device))


def _holding(config: plan.WorkerConfig, model: Model) -> Model:
    """The model, with its keys and values held as they are to be. Raises ValueError where they can't."""
    if config.kv_dtype == "auto":
        return model
    if model.device.type != "cpu":
        raise ValueError(
            f"kv_dtype = {config.kv_dtype!r} is for CPUs: on a GPU keys and values are in the model's dtype"
        )
    return replace(model, kv_dtype=getattr(torch, config.kv_dtype))


def _attention(config: plan.WorkerConfig, model: Model) -> type[AttentionBackend]:
    return choose(
        config.attention,
        model.device,
        model.dtype,
        model.layers,
        block_size=config.block_size,
        attributes=model.attributes,
        kv_dtype=model.kv_dtype,
    )


def _capture(runner: Runner, config: plan.WorkerConfig, kind: type[AttentionBackend]) -> None:
    """Have decodes replayed from graphs, if they are to be and can be. Raises ValueError where they were asked for and can't."""
    if config.execution == "eager" or (config.execution == "auto" and not kind.capturable):
        return
    try:
        runner.capture()
    except RuntimeError as error:
        if config.execution == "graphs":
            raise ValueError(f"execution 'graphs': {error}") from None
        logger.warning("steps are launched kernel by kernel: %s", error)


def _draft_model(config: plan.WorkerConfig, model: Model) -> Model | None:
    """The one that drafts for this model, if one is to. Raises ModelRefused when its tokens mean something else."""
    if config.speculation is None or config.speculation == plan.NGRAM:
        return None
    dtype = str(model.dtype).removeprefix("torch.")
    draft = _holding(config, load(config.speculation, dtype, str(model.device), config.max_model_len))
    if draft.vocab_size != model.vocab_size:
        raise ModelRefused(
            f"the draft model {config.speculation} has {draft.vocab_size} tokens and the model {model.vocab_size}: "
            "they must have the same vocabulary"
        )
    pack(draft.module, config.weights)
    return draft


def _drafter(
    config: plan.WorkerConfig, draft: Model | None, num_blocks: int, agree: Callable[[Tensor], object] | None
) -> Drafter | None:
    if draft is not None:
        kind = _attention(config, draft)
        backend = kind(draft.layers, num_blocks, config.block_size, draft.dtype, draft.device, draft.kv_dtype)
        return DraftModel(draft, backend, agree=agree)
    return NGram() if config.speculation == plan.NGRAM else None


def _num_blocks(config: plan.WorkerConfig, per_block: int, longest: int) -> int:
    """As many as asked for or as the memory holds, but never more than every slot could fill."""
    if config.num_blocks is not None:
        return config.num_blocks
    fitting = config.kv_memory_mb * 2**20 // per_block
    if not fitting:
        raise ValueError(f"kv_memory_mb = {config.kv_memory_mb} holds no block of {per_block} bytes")
    return min(fitting, config.max_running * -(-longest // config.block_size))


def _check_memory(needed: int) -> None:
    """Raises ValueError where so many bytes of keys and values don't fit: who takes more than there is, is killed."""
    left = available()
    if needed > left:
        raise ValueError(
            f"{needed >> 20} MiB of keys and values don't fit into the {left >> 20} MiB of memory that are left: "
            "lower engine.num_blocks or engine.kv_memory_mb"
        )


def _resolve_device(device: str, ranks: Ranks) -> str:
    """Each rank has a GPU of its own. Raises ValueError when there aren't as many."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.count == 1 or device == "cpu":
        return device
    if torch.cuda.device_count() < ranks.count:
        raise ValueError(f"model.tensor_parallel = {ranks.count}, and there are {torch.cuda.device_count()} GPUs")
    return f"{device}:{ranks.index}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
