"""The benchmark of a GPU, on a tiny model and the CPU; transformers' continuous batching is run by `test_peers`."""

import asyncio

import msgspec

from benchmarks import gpu, report
from benchmarks.workload import config, mixed

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def test_decodes_beside_the_floor_and_many_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PROMPT", 20)
    monkeypatch.setattr(gpu, "OUTPUT", 12)
    weight_bytes = gpu.make_model(tmp_path, SHAPE, "cpu")
    every, some = (mixed(count, prompt=(5, 30), output=(5, 30), seed=count, vocab=300) for count in (6, 3))
    worker = msgspec.structs.replace(config(str(tmp_path), 6, 64).worker(), kv_memory_mb=8, execution="eager")
    measured, kv_bytes = asyncio.run(gpu.measure(worker, [1, 3], every, some, weight_bytes, bytes_per_s=1e9))
    # Keys and values of 2 layers of 2 heads of 8, in float32 on the CPU.
    assert kv_bytes == 2 * 2 * 2 * 8 * 4
    assert [decode.batch for decode in measured.decodes] == [1, 3]
    for decode in measured.decodes:
        assert 0 < decode.steps < 12
        assert min(decode.step_s, decode.iteration_s) > 0
        # The context is the prompt and half of the output, within some tokens.
        least, most = (weight_bytes + decode.batch * length * kv_bytes for length in (20, 32))
        assert least < decode.floor_ratio * decode.iteration_s * 1e9 * 1.5
        assert decode.floor_ratio * decode.iteration_s * 1e9 < 1.5 * most
    assert (measured.all.requests, measured.all.output_tokens) == (6, every.output_tokens)
    assert measured.some.output_tokens_per_s == some.output_tokens / measured.some.seconds
    versions = {"torch": "2.11", "transformers": "5.17"}
    figures = gpu.GpuFigures("A Card", versions, weight_bytes, kv_bytes, 2e12, [measured], measured.some)
    table = report.gpu_table(figures)
    assert "| `eager` |" in table
    assert "2.00 TB/s" in table
    assert "A Card, torch 2.11" in table
    assert "(1.0x)" in table
