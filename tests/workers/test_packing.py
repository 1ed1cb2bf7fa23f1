"""What is packed, what is left alone, and that the weights aren't held twice."""

import logging
import weakref

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.workers.engine import LocalEngine, workload
from tests.workers.models import SERVED, generate, tiny
from workers import packing
from workers.linear import PackedLinear
from workers.norm import RMSNorm, rms_norm
from workers.packed_attention import PackedAttention
from workers.packed_layer import PackedLayer
from workers.packed_mlp import PackedMLP
from workers.packing import pack
from workers.rotary import Heads, rotate_


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


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3_text"])
def test_all_parts_are_fused(kind):
    """Gates of SiLU or of GELU, norms that add 1 to their weight, queries and keys that are normalised."""
    model = tiny(kind)
    pack(model, "float32")
    assert {PackedAttention, PackedMLP, RMSNorm, PackedLinear, PackedLayer} <= kinds(model)
    assert not [each for each in kinds(model) if each.__name__.endswith("RMSNorm") and each is not RMSNorm]


def test_what_only_looks_alike_is_not_fused():
    """This gate is the exact GELU; olmo2 normalises its queries and keys over all heads."""
    gemma, olmo = tiny("gemma2", hidden_activation="gelu"), tiny("olmo2")
    pack(gemma, "float32")
    pack(olmo, "float32")
    assert not {PackedMLP, PackedLayer} & kinds(gemma)
    assert PackedAttention not in kinds(olmo)
    assert PackedLinear in kinds(gemma) & kinds(olmo)


def test_an_attention_layer_hands_on_all_that_it_did():
    """gemma2 has a scaling of its own, a softcap, and a window in every other layer."""
    model = tiny("gemma2")
    expected = [layer.self_attn for layer in model.model.layers]
    pack(model, "float32")
    packed = [layer for layer in model.modules() if type(layer) is PackedAttention]
    assert [layer.layer_idx for layer in packed] == [0, 1]
    for layer, before in zip(packed, expected, strict=True):
        assert layer.given["scaling"] == before.scaling
        assert layer.given["softcap"] == before.attn_logit_softcapping
        assert layer.given["sliding_window"] == before.sliding_window


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 3, 400])
@pytest.mark.parametrize("dim", [2, 64, 90])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_turned_as_transformers_does(tokens, dim, normed):
    """In place, and only the first ones; what is normalised before is each head, by its own kind's weight."""
    counts, width = (3, 2), 7 * dim + 3
    x, cos, sin = torch.randn(1, tokens, width), torch.randn(1, tokens, dim), torch.randn(1, tokens, dim)
    norms = [nn.RMSNorm(dim, eps=1e-3) if normed else nn.Identity() for _ in counts]
    for parameter in (each for norm in norms for each in norm.parameters()):
        nn.init.normal_(parameter)
    queries, keys = (Heads.of(*each) for each in zip(counts, map(rms_norm, norms), strict=True))
    before = x.clone()
    rotate_(x, queries, keys, cos, sin)
    split = before[..., : 5 * dim].view(1, tokens, 5, dim).split(counts, dim=2)
    normalised = [norm(part).transpose(1, 2) for norm, part in zip(norms, split, strict=True)]
    expected = torch.cat(apply_rotary_pos_emb(*normalised, cos, sin), dim=1)
    torch.testing.assert_close(x[..., : 5 * dim], expected.transpose(1, 2).flatten(2))
    assert torch.equal(x[..., 5 * dim :], before[..., 5 * dim :])
    other = Heads.of(2, RMSNorm(torch.ones(dim + 2), 1e-3))
    for wrong in (
        (x.double(), queries, keys, cos, sin),
        (x, queries, Heads.of(6), cos, sin),
        (x, queries, keys, cos[:, 1:], sin),
        (x, queries, other, cos, sin),
    ):
        with pytest.raises(ValueError, match="don't fit"):
            rotate_(*wrong)


def test_a_norm_is_torchs_rms_norm():
    norm = nn.RMSNorm(45, eps=1e-3)
    nn.init.normal_(norm.weight)
    x = torch.randn(7, 45)
    ours, residual = RMSNorm(norm.weight, 1e-3), torch.randn(45, 7).T
    torch.testing.assert_close(ours(x), norm(x).detach())
    torch.testing.assert_close(ours(x, residual), residual + norm(x).detach())
    for wrong in ((x.double(),), (x[:, 1:],), (x, residual[1:]), (x, residual.double())):
        with pytest.raises(ValueError, match=r"expected float32 \[\.\.\., 45\]"):
            ours(*wrong)


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


def test_rounded_weights_generate_what_transformers_does_with_them():
    """transformers' own loop over the packed model, against ours."""
    requests = workload(seed=8, count=5, vocab=97)
    oracle = tiny("llama")
    pack(oracle, "bfloat16")
    engine = LocalEngine(tiny("llama"), weights="bfloat16", running=3, budget=9)
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
    assert engine.finish() == {str(index): generate(oracle, *request) for index, request in enumerate(requests)}


@torch.inference_mode()
def test_rounded_activations_generate_what_is_likeliest_but_for_their_steps():
    """A last bit of an attention's output may move an input of the next layer by a step, and so the logits."""
    requests = workload(seed=8, count=5, vocab=97)
    oracle = tiny("llama")
    pack(oracle, "int8")
    engine = LocalEngine(tiny("llama"), weights="int8", running=3, budget=9)
    for index, (prompt, length) in enumerate(requests):
        engine.submit(str(index), prompt, length)
    for name, tokens in engine.finish().items():
        prompt, length = requests[int(name)]
        assert len(tokens) == length
        ids = torch.tensor([[*prompt, *tokens]])
        logits = oracle(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() <= 0.03 * logits.std()


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
