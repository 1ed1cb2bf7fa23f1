"""A worker that computes nothing and takes its time over it: ``python -m benchmarks.sleeper`` instead of ``python -m workers``.

``SLEEPER_STEP_S`` is how long it takes over each step.
"""

import os
import sys
import time

from protocol import plan
from protocol.plan import WorkerConfig, WorkerInfo
from workers.weights import DEMO, demo_model

_MODEL_LEN = 4096
_VOCAB, _TOKEN = 1000, 40


def main() -> None:
    """Answer every plan with the same token for each row, until the scheduler closes the pipe."""
    step_s = float(os.environ["SLEEPER_STEP_S"])
    config = plan.decode_config(_read() or b"")
    _write(_info(config))
    while (body := _read()) is not None:
        match plan.decode_command(body):
            case plan.Ping():
                _write(plan.Pong())
            case plan.StepPlan() as step:
                time.sleep(step_s)
                tokens = [_TOKEN] * step.num_sampled
                _write(plan.StepResult(step.step, tokens, step_s))


def _info(config: WorkerConfig) -> WorkerInfo:
    return WorkerInfo(
        model_path=str(demo_model() if config.model == DEMO else config.model),
        max_model_len=_MODEL_LEN,
        vocab_size=_VOCAB,
        hidden_size=1,
        eos_ids=[],
        num_blocks=config.max_running * _MODEL_LEN // config.block_size,
        block_size=config.block_size,
        kv_bytes_per_block=0,
        device="none",
        dtype="none",
        kv_dtype="none",
        attention="none",
    )


def _read() -> bytes | None:
    header = sys.stdin.buffer.read(plan.HEADER_BYTES)
    return sys.stdin.buffer.read(plan.body_length(header)) if len(header) == plan.HEADER_BYTES else None


def _write(reply: plan.Reply) -> None:
    sys.stdout.buffer.write(plan.frame(reply))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
