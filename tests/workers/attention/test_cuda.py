"""The Triton kernel against the reference: on a GPU, or where there is none in Triton's interpreter, if Triton is installed."""

import os
from dataclasses import replace

import pytest
import torch

from tests.workers.attention.histories import CPU, History, Sequences, cache_tensors, fresh
from workers.attention.base import Attributes, LayerShape
from workers.attention.cuda import CudaAttention
from workers.attention.reference import ReferenceAttention

GPU = torch.cuda.is_available()
if not GPU:
    # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

DEVICE = torch.device("cuda" if GPU else "cpu")
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
    for output, reference in zip(Sequences(history).replay(attention), expected, strict=True):
        torch.testing.assert_close(output.float().to(CPU), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attributes", [PLAIN, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("shape", [LayerShape(9, 3, 64, 64), LayerShape(50, 1, 24, 40), LayerShape(4, 4, 128, 128)])
def test_a_growing_history_equals_the_reference(shape, attributes):
    sinks = None if attributes.sinks is None else attributes.sinks[: shape.query_heads]
    check(History(shape, 16, CHUNKS, replace(attributes, sinks=sinks), seed=11), torch.float32, 2e-5)


@pytest.mark.parametrize("block_size", [1, 24, 256])
def test_any_block_size(block_size):
    check(History(LayerShape(4, 2, 32, 32), block_size, CHUNKS, PLAIN, seed=3), torch.float32, 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_as_near_as_they_can_be(dtype):
    check(History(LayerShape(16, 8, 128, 128), 16, CHUNKS, PLAIN, seed=4), dtype, 3e-2)
