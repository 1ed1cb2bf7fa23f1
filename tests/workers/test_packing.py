"""What is packed, what is left alone, and that the weights aren't held twice."""

import logging
import weakref

import pytest
import torch
from torch import nn

from tests.workers.engine import LocalEngine, workload
from tests.workers.models import SERVED, generate, tiny
from workers import packing
from workers.linear import PackedLinear
from workers.norm import RMSNorm
from workers.packing import PackedMLP, pack


def kinds(module: nn.Module) -> set[type]:
    return {type(layer) for layer in module.modules()}


@pytest.mark.parametrize("kind", sorted(SERVED))
def test_no_linear_layer_is_left_and_the_logits_stay(kind):
    model = tiny(kind)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        assert pack(model, "auto") == torch.float32
        assert nn.Linear not in kinds(model)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_llama_is_fused():
    model = tiny("llama")
    pack(model, "float32")
    assert {PackedMLP, RMSNorm, PackedLinear} <= kinds(model)


def test_what_only_looks_alike_is_not_fused():
    """gemma2's gate is a GELU, and its norm adds 1 to its weight."""
    model = tiny("gemma2")
    pack(model, "float32")
    assert not {PackedMLP, RMSNorm} & kinds(model)
    assert PackedLinear in kinds(model)


def test_a_norm_is_torchs_rms_norm():
    norm = nn.RMSNorm(45, eps=1e-3)
    nn.init.normal_(norm.weight)
    x = torch.randn(7, 45)
    torch.testing.assert_close(RMSNorm(norm.weight, 1e-3)(x), norm(x).detach())
    with pytest.raises(ValueError, match=r"expected float32 \[\.\.\., 45\]"):
        RMSNorm(norm.weight, 1e-3)(x.double())


def test_weights_are_freed_and_a_tied_embedding_keeps_its_own():
    model = tiny("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight
    before = embedding.clone()
    others = [weakref.ref(layer.weight) for layer in model.model.modules() if type(layer) is nn.Linear]
    pack(model, "int8")
    assert [weight for weight in others if weight() is not None] == []
    assert model.model.embed_tokens.weight is embedding
    assert torch.equal(embedding, before)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_narrow_weights_generate_what_transformers_does_with_the_rounded_ones(weights):
    """transformers' own loop over the packed model, against ours."""
    requests = workload(seed=8, count=5, vocab=97)
    oracle = tiny("llama")
    pack(oracle, weights)
    engine = LocalEngine(tiny("llama"), weights=weights, running=3, budget=9)
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
    assert engine.finish() == {str(index): generate(oracle, *request) for index, request in enumerate(requests)}


def test_what_cannot_be_packed_stays_or_is_refused_by_name(caplog):
    model = tiny("llama").to(torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        assert pack(model, "auto") == torch.bfloat16
    assert "only float32 weights on the CPU are packed, not torch.bfloat16" in caplog.text
    assert PackedLinear not in kinds(model)
    with pytest.raises(ValueError, match="weights 'int8': only float32"):
        pack(model, "int8")
    assert pack(tiny("llama"), packing.PLAIN) == torch.float32


def test_without_a_compiler_torchs_layers_serve(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    packing.kernel.cache_clear()
    model = tiny("llama")
    assert pack(model, "auto") == torch.float32
    assert "no C++ compiler" in caplog.text
    assert PackedLinear not in kinds(model)
