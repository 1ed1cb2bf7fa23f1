"""What a worker of a test is told."""

from pathlib import Path

from protocol.plan import WorkerConfig


def worker_config(model: Path, **settings) -> WorkerConfig:
    """Of a small one in float32 on a thread of the CPU, but for these ``settings``."""
    return WorkerConfig(
        **{
            "model": str(model),
            "dtype": "float32",
            "device": "cpu",
            "attention": "auto",
            "threads": 1,
            "block_size": 8,
            "num_blocks": 32,
            "kv_memory_mb": 1,
            "max_running": 2,
            "max_batch_tokens": 60,
            "max_model_len": None,
            **settings,
        }
    )
