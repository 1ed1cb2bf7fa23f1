"""Keys and values in half precision: twice as many fit, and all that is promised of a sequence holds."""

from pathlib import Path

import pytest
import torch

from protocol.plan import Sampling, WorkerConfig
from tests.workers.configs import worker_config
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import save, tiny
from workers.__main__ import start
from workers.model import Model
from workers.ranks import Ranks

TINY = {"hidden_size": 64, "num_hidden_layers": 2}


def config(model: Path, **settings) -> WorkerConfig:
    """As many blocks as the memory holds."""
    return worker_config(model, num_blocks=None, max_running=64, **settings)


@pytest.mark.parametrize("attention", ["cpu", "reference"])
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_worker_has_twice_the_blocks_in_as_much_memory(tmp_path, attention, weights):
    path = save(tiny("llama", **TINY), tmp_path)
    settings = {"attention": attention, "weights": weights}
    _, whole = start(config(path, **settings), Ranks(1))
    _, half = start(config(path, kv_dtype="float16", **settings), Ranks(1))
    assert (half.num_blocks, half.attention) == (2 * whole.num_blocks, attention)
    assert 2 * half.kv_bytes_per_block == whole.kv_bytes_per_block
    assert (whole.kv_dtype, half.kv_dtype) == ("float32", "float16")


def test_so_has_one_whose_draft_model_holds_them_so_too(tmp_path):
    path = save(tiny("llama", **TINY), tmp_path)
    _, whole = start(config(path, speculation=str(path)), Ranks(1))
    _, half = start(config(path, speculation=str(path), kv_dtype="float16"), Ranks(1))
    assert half.num_blocks == 2 * whole.num_blocks


def test_on_a_gpu_it_is_refused(tmp_path, monkeypatch):
    path = save(tiny("llama", **TINY), tmp_path)
    monkeypatch.setattr(Model, "device", property(lambda _: torch.device("cuda")))
    with pytest.raises(ValueError, match="kv_dtype = 'float16' is for CPUs"):
        start(config(path, kv_dtype="float16"), Ranks(1))


@pytest.mark.parametrize("attention", ["cpu", "reference"])
def test_the_tokens_are_the_same_in_any_company(attention):
    """Among chunks, preemptions and prompts that begin as ones that are there already do."""
    model = tiny("llama")
    (begin, _), *requests = workload(seed=5, count=11, vocab=97, longest_prompt=24, longest_output=60)
    requests = [(begin + prompt, length) for prompt, length in requests]

    def run(chosen: list[int], **sizes: int) -> tuple[dict[str, list[int]], LocalEngine]:
        engine = LocalEngine(
            model, attention=attention, kv_dtype=torch.float16, longest=128, prefix_cache=True, **sizes
        )
        for index in chosen:
            prompt, length = requests[index]
            engine.submit(str(index), prompt, length, Sampling(temperature=1.0, seed=index))
        return engine.finish(), engine

    alone: dict[str, list[int]] = {}
    for index in range(len(requests)):
        alone |= run([index])[0]
    together, engine = run(list(range(len(requests))), running=6, budget=13, blocks=14)
    assert together == alone
    assert engine.batcher.counters.preemptions > 0
    assert engine.batcher.counters.cached_tokens > 0
