"""Greedy tokens are what argmax gives, whatever the logits hold."""

import pytest
import torch

from tests.workers.machines import compile_for
from workers.greedy import _kernel, greedy

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("vocab", [1, 7, 16, 32, 96, 256, 259, 1000, 50_257, 49_152])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [3, 1_000_000], ids=["ties", "few ties"])
def test_it_is_argmax(vocab, dtype, values):
    draw = torch.Generator().manual_seed(vocab)
    logits = torch.randint(values, (5, vocab), generator=draw).to(dtype)
    logits[1] = -INFINITY
    logits[2, vocab // 2 :] = INFINITY
    logits[3, vocab // 3 :: 2] = NAN
    assert torch.equal(greedy(logits), logits.argmax(dim=-1))


@pytest.mark.parametrize("place", [0, 15, 16, 255, 256, 510, 511])
@pytest.mark.parametrize("value", [2.0, NAN])
@pytest.mark.parametrize("before", [-INFINITY, 0.0, NAN])
def test_wherever_it_is(place, value, before):
    """What comes behind it is as great."""
    logits = torch.zeros(3, 512)
    logits[:, 0] = before
    logits[1, place:] = value
    assert torch.equal(greedy(logits), logits.argmax(dim=-1))


@pytest.mark.parametrize(("machine", "needs"), [("haswell", "avx2"), ("x86-64", "fxsr")])
def test_so_it_is_on_other_cpus(machine, needs, monkeypatch):
    compile_for(machine, needs, monkeypatch)
    monkeypatch.setattr("workers.greedy._kernel", _kernel.__wrapped__)
    for vocab in (7, 259, 1000):
        test_it_is_argmax(vocab, torch.float32, 3)


def test_without_a_compiler_it_is_torchs(monkeypatch):
    monkeypatch.setattr("workers.greedy._kernel", lambda: None)
    test_it_is_argmax(1000, torch.float32, 3)


def test_no_rows_and_rows_that_lie_apart():
    logits = torch.randn(6, 512, generator=torch.Generator().manual_seed(1))
    assert greedy(logits[:0]).tolist() == []
    assert torch.equal(greedy(logits[::2]), logits.argmax(dim=-1)[::2])
    assert torch.equal(greedy(logits[:, 3:400]), logits[:, 3:400].argmax(dim=-1))
    assert torch.equal(greedy(logits.T), logits.argmax(dim=0))
