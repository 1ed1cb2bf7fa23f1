"""Where the time of a start goes: ``python -m benchmarks.startup_parts worker MODEL`` or ``service MODEL`` times the parts of one
process, one after the other, and prints them as JSON. Each is to be run in a process of its own, so that nothing is imported yet.
"""

import asyncio
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def worker(model: str) -> Iterator[str]:
    """Ends a part with each name: what ``workers.__main__.start`` does."""
    importlib.import_module("torch")
    yield "import torch"
    importlib.import_module("transformers").AutoModelForCausalLM  # noqa: B018 - it is imported at the first access
    yield "import transformers"
    process: Any = importlib.import_module("workers.__main__")
    selftest: Any = importlib.import_module("workers.selftest")
    yield "import the worker"
    loaded = process.load(model, "float32", "cpu")
    yield "load and probe the model"
    expected = selftest.expect(loaded)
    yield "plain forward passes"
    process.pack(loaded.module, "auto")
    yield "pack the weights"
    attention: Any = importlib.import_module("workers.attention")
    kind = attention.choose("auto", loaded.device, loaded.dtype, loaded.layers, attributes=loaded.attributes)
    selftest.check(loaded, kind, 16, expected)
    yield "self-test"


def service(model: str) -> Iterator[str]:
    """What the service does meanwhile."""
    importlib.import_module("scheduler.cli")
    yield "import the service"
    broker: Any = importlib.import_module("scheduler.mqtt.broker")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_start_broker(broker.EmbeddedBroker(data_dir=Path(folder))))
        yield "start Mosquitto"
    chat: Any = importlib.import_module("scheduler.chat")
    chat.preload()
    yield "import the tokenizer's library"
    chat.Chat(model)
    yield "load the tokenizer"


async def _start_broker(broker: Any) -> None:
    async with broker:
        pass


def timed(parts: Iterator[str]) -> dict[str, float]:
    """Seconds of each part."""
    seconds, begun = {}, time.perf_counter()
    for name in parts:
        now = time.perf_counter()
        seconds[name] = now - begun
        begun = now
    return seconds


if __name__ == "__main__":
    print(json.dumps(timed({"worker": worker, "service": service}[sys.argv[1]](sys.argv[2]))))
