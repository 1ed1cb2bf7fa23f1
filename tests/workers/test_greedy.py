"""Greedy tokens are what argmax gives, whatever the logits hold."""

import pytest
import torch

from workers.greedy import greedy

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("vocab", [1, 7, 32, 96, 256, 1000, 50_257, 49_152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [3, 1_000_000], ids=["ties", "few ties"])
def test_it_is_argmax(vocab, dtype, values):
    draw = torch.Generator().manual_seed(vocab)
    logits = torch.randint(values, (5, vocab), generator=draw).to(dtype)
    logits[1] = -INFINITY
    logits[2, vocab // 2 :] = INFINITY
    logits[3, vocab // 3 :: 2] = NAN
    assert torch.equal(greedy(logits), logits.argmax(dim=-1))


def test_no_rows_and_rows_that_lie_apart():
    logits = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    assert greedy(logits[:0]).tolist() == []
    assert torch.equal(greedy(logits[::2]), logits.argmax(dim=-1)[::2])
