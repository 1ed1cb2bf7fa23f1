"""The C++ kernel against the reference, and the bits it promises."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from tests.workers.attention.histories import CPU, History, Sequences, cache_tensors, fresh, histories
from tests.workers.machines import compile_for
from workers.attention.base import Attributes, LayerShape, RaggedBatch
from workers.attention.cpu import CpuAttention
from workers.attention.reference import ReferenceAttention

SHAPE = LayerShape(query_heads=6, kv_heads=2, key_dim=64, value_dim=32)
PLAIN = Attributes(scaling=0.125)
#: Rounded to half precision, keys and values are the same for both backends.
either_precision = pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16])


@pytest.fixture
def threads():
    """Sets torch's thread count, which is the kernel's too, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@either_precision
@settings(max_examples=150, deadline=None)
@given(history=histories())
def test_every_step_of_a_growing_history_equals_the_reference(kv_dtype, history):
    sequences = Sequences(history)
    outputs = sequences.replay(fresh(CpuAttention, history, kv_dtype))
    expected = sequences.replay(fresh(ReferenceAttention, history, kv_dtype))
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [CpuAttention, ReferenceAttention])
@either_precision
@settings(max_examples=20, deadline=None)
@given(history=histories())
def test_copied_blocks_hold_what_those_held_that_they_were_copied_from(backend, kv_dtype, history):
    stayed = Sequences(history).replay(fresh(backend, history, kv_dtype))
    moved = Sequences(history).replay(fresh(backend, history, kv_dtype), moving=True)
    assert all(map(torch.equal, moved, stayed))


@either_precision
@settings(max_examples=60, deadline=None)
@given(history=histories())
def test_a_row_gets_the_same_bits_alone_and_in_one_prefill(kv_dtype, history):
    sequences = Sequences(history)
    outputs = sequences.replay(fresh(CpuAttention, history, kv_dtype))
    for row, output in enumerate(outputs):
        ends = history.lengths
        alone = sequences.attend(fresh(CpuAttention, history, kv_dtype), [0] * len(ends), ends, [row])[0]
        assert torch.equal(output, alone)


@either_precision
@pytest.mark.parametrize("chunks", [[[300], [1]], [[700, 20], [1, 1], [30, 1]]])
def test_a_row_gets_the_same_bits_on_any_number_of_threads(threads, chunks, kv_dtype):
    # One thread never splits a context here, eight always do.
    history = History(SHAPE, 16, chunks, replace(PLAIN, sinks=torch.randn(SHAPE.query_heads)), seed=3)
    sequences = Sequences(history)
    outputs = []
    for count in (1, 8):
        threads(count)
        outputs.append(torch.cat(sequences.replay(fresh(CpuAttention, history, kv_dtype))))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("backend", [CpuAttention, ReferenceAttention])
@pytest.mark.parametrize("window", [1, 16, 17, 100])
def test_blocks_before_the_window_may_be_freed(backend, window):
    history = History(SHAPE, 16, [[200], [1]], replace(PLAIN, sliding_window=window), seed=5)
    sequences = Sequences(history)
    kept, freed = fresh(backend, history), fresh(backend, history)
    for attention in (kept, freed):
        sequences.attend(attention, [0], [200], [0])
    first_needed = (200 - window + 1) // history.block_size
    gone = sequences.table[0][:first_needed].long()
    for tensor in cache_tensors(freed):
        tensor[gone] = torch.nan
    [output] = sequences.attend(freed, [200], [201], [0])
    [expected] = sequences.attend(kept, [200], [201], [0])
    assert torch.equal(output, expected)


def test_large_scores_neither_overflow_nor_vanish():
    history = History(SHAPE, 16, [[100]], Attributes(scaling=50.0), seed=7)
    sequences = Sequences(history)
    [output] = sequences.replay(fresh(CpuAttention, history))
    [expected] = sequences.replay(fresh(ReferenceAttention, history))
    # Scores in the hundreds carry rounding of about 1e-4 into the exponent.
    torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("machine", "needs"), [("haswell", "avx2"), ("x86-64", "sse2")])
def test_half_precision_is_the_same_on_other_cpus(monkeypatch, machine, needs):
    history = History(SHAPE, 16, [[100, 7], [1, 30]], PLAIN, seed=13)
    sequences = Sequences(history)
    expected = sequences.replay(fresh(ReferenceAttention, history, torch.float16))
    compile_for(machine, needs, monkeypatch)
    for output, reference in zip(sequences.replay(fresh(CpuAttention, history, torch.float16)), expected, strict=True):
        torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-5)


def test_what_half_precision_has_no_number_for_becomes_its_largest():
    history = History(SHAPE, 16, [[40]], PLAIN, seed=11)
    sequences = Sequences(history)
    sequences.key[0][3], sequences.value[0][5] = 1e6, -1e6
    [output] = sequences.replay(fresh(CpuAttention, history, torch.float16))
    [expected] = sequences.replay(fresh(ReferenceAttention, history, torch.float16))
    assert output.isfinite().all()
    torch.testing.assert_close(output, expected, atol=1e-2, rtol=1e-4)


def test_layers_keep_apart_and_may_differ():
    layers = [SHAPE, LayerShape(query_heads=4, kv_heads=4, key_dim=24, value_dim=48), SHAPE]
    backends = [kind(layers, 8, 16, torch.float32, CPU) for kind in (CpuAttention, ReferenceAttention)]
    for step, (start, length) in enumerate([(0, 20), (20, 1), (21, 30)]):
        batch = one_row(start, length)
        for layer, shape in enumerate(layers):
            torch.manual_seed(step * 10 + layer)
            query = torch.randn(length, shape.query_heads, shape.key_dim)
            key = torch.randn(length, shape.kv_heads, shape.key_dim)
            value = torch.randn(length, shape.kv_heads, shape.value_dim)
            output, expected = (backend.attend(layer, query, key, value, batch, PLAIN) for backend in backends)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_slices_of_a_fused_projection_are_read_where_they_lie():
    heads, dim, length = 4, 16, 20
    fused = torch.randn(length, 3, heads, dim)
    query, key, value = fused[:, 0], fused[:, 1], fused.transpose(1, 2)[:, :, 2]
    backends = [
        kind([LayerShape(heads, heads, dim, dim)], 4, 16, torch.float32, CPU)
        for kind in (CpuAttention, ReferenceAttention)
    ]
    output, expected = (backend.attend(0, query, key, value, one_row(0, length), PLAIN) for backend in backends)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def one_row(start: int, length: int) -> RaggedBatch:
    """One row in blocks 0, 1, 2 ... of 16 tokens."""
    end = start + length
    return RaggedBatch(
        query_start=torch.tensor([0, length], dtype=torch.int32),
        context_len=torch.tensor([end], dtype=torch.int32),
        block_table=torch.arange(-(-end // 16), dtype=torch.int32)[None],
        cache_slots=torch.arange(start, end),
        max_query_len=length,
        max_context_len=end,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"cache_slots": torch.tensor([8 * 16])},
        {"cache_slots": torch.tensor([-1])},
        {"block_table": torch.tensor([[8]], dtype=torch.int32)},
        {"block_table": torch.tensor([[-1]], dtype=torch.int32)},
        {"context_len": torch.tensor([17], dtype=torch.int32)},
        {"context_len": torch.tensor([0], dtype=torch.int32)},
        {"query_start": torch.tensor([0, 2], dtype=torch.int32)},
        {"query_start": torch.tensor([0, 1, 1], dtype=torch.int32)},
    ],
)
def test_a_batch_that_would_touch_memory_outside_the_cache_is_refused(wrong):
    attention = CpuAttention([SHAPE], 8, 16, torch.float32, CPU)
    tensors = (torch.randn(1, heads, dim) for heads, dim in ((6, 64), (2, 64), (2, 32)))
    with pytest.raises(ValueError, match="does not fit"):
        attention.attend(0, *tensors, replace(one_row(0, 1), **wrong), PLAIN)


@pytest.mark.parametrize(
    "key", [torch.zeros(1, 2, 64).double(), torch.zeros(1, 3, 64), torch.zeros(2, 2, 64), torch.zeros(1, 64, 2).mT]
)
def test_tensors_that_the_kernel_would_misread_are_refused(key):
    attention = CpuAttention([SHAPE], 8, 16, torch.float32, CPU)
    with pytest.raises(ValueError, match="expected float32"):
        attention.attend(0, torch.zeros(1, 6, 64), key, torch.zeros(1, 2, 32), one_row(0, 1), PLAIN)


@either_precision
def test_a_block_takes_the_bytes_announced(kv_dtype):
    layers = [SHAPE, LayerShape(query_heads=3, kv_heads=1, key_dim=8, value_dim=40)]
    for kind in (CpuAttention, ReferenceAttention):
        held = sum(tensor.nbytes for tensor in cache_tensors(kind(layers, 5, 16, torch.float32, CPU, kv_dtype)))
        assert held == 5 * kind.bytes_per_block(layers, 16, kv_dtype)


def test_the_kernel_shares_torchs_openmp_runtime():
    CpuAttention([SHAPE], 1, 16, torch.float32, CPU)
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len({path for path in mapped if "libgomp" in path or "libomp" in path or "libiomp" in path}) == 1
