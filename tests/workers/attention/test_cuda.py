"""FlashAttention through the block table against the reference on the CPU."""

import pytest
import torch

from tests.workers.attention.histories import History, Sequences, fresh
from workers.attention.base import Attributes, LayerShape
from workers.attention.cuda import CudaAttention
from workers.attention.reference import ReferenceAttention


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("heads", [(9, 3), (4, 4)])
def test_a_growing_history_equals_the_reference(window, heads):
    shape = LayerShape(*heads, key_dim=64, value_dim=64)
    chunks = [[300, 1, 40], [1, 1, 300], [200, 1, 0]]
    history = History(shape, 256, chunks, Attributes(0.125, sliding_window=window), seed=11)
    sequences = Sequences(history)
    attention = CudaAttention([shape], history.num_blocks, 256, torch.bfloat16, torch.device("cuda"))
    outputs = sequences.replay(attention, moving=True)
    expected = sequences.replay(fresh(ReferenceAttention, history))
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output.float().cpu(), reference, atol=3e-2, rtol=3e-2)
