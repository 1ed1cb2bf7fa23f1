"""The Triton kernel against the reference: on a GPU, or where there is none in Triton's interpreter, if Triton is installed."""

from dataclasses import replace

import pytest
import torch

from tests.workers.attention.histories import CPU, History, Sequences, cache_tensors, fresh
from workers.attention.base import Attributes, LayerShape
from workers.attention.cuda import CudaAttention
from workers.attention.reference import ReferenceAttention
from workers.invariant import one_by_one

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Prompts in chunks beside decodes, then decodes alone, so few that their contexts are split between programs.
CHUNKS = [[40, 1, 20], [1, 1, 70], [60, 1, 0], [1, 1, 1], [1, 0, 1]]
PLAIN = Attributes(0.125)
EVERYTHING = Attributes(0.2, 37, 20.0, torch.linspace(-2.0, 3.0, 50))


def check(history: History, dtype: torch.dtype, tolerance: float) -> None:
    """Every output; a place in the cache that is read before it is written would show."""
    expected = Sequences(history).replay(fresh(ReferenceAttention, history))
    sinks = history.attributes.sinks
    if sinks is not None:
        history = replace(history, attributes=replace(history.attributes, sinks=sinks.to(DEVICE)))
    attention = CudaAttention([history.shape], history.num_blocks, history.block_size, dtype, DEVICE)
    for tensor in cache_tensors(attention):
        tensor.fill_(torch.nan)
    for output, reference in zip(Sequences(history).replay(attention, moving=True), expected, strict=True):
        torch.testing.assert_close(output.float().to(CPU), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attributes", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", [LayerShape(9, 3, 64, 64), LayerShape(50, 1, 24, 40), LayerShape(4, 4, 128, 128)])
def test_a_growing_history_equals_the_reference(shape, attributes):
    sinks = None if attributes.sinks is None else attributes.sinks[: shape.query_heads]
    check(History(shape, 16, CHUNKS, replace(attributes, sinks=sinks), seed=11), torch.float32, 2e-5)


@pytest.mark.parametrize("block_size", [1, 24, 256])
def test_any_block_size(block_size):
    check(History(LayerShape(4, 2, 32, 32), block_size, CHUNKS, PLAIN, seed=3), torch.float32, 2e-5)


def test_a_context_that_is_not_summed_in_parts_is_the_same_bits_in_any_company():
    history = History(LayerShape(4, 1, 32, 32), 16, CHUNKS, PLAIN, seed=5)
    sequences, kind = Sequences(history), one_by_one(CudaAttention)

    def attention() -> CudaAttention:
        return kind([history.shape], history.num_blocks, history.block_size, torch.float32, DEVICE)

    together = sequences.replay(attention())
    for row in range(len(history.lengths)):
        (alone,) = sequences.attend(attention(), [0] * len(history.lengths), history.lengths, [row])
        assert torch.equal(together[row], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_as_near_as_they_can_be(dtype):
    check(History(LayerShape(16, 8, 128, 128), 16, CHUNKS, PLAIN, seed=4), dtype, 3e-2)
