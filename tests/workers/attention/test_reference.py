"""The oracle against other people's oracles: torch's SDPA, and transformers' own attention for the softcap."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from tests.workers.attention.histories import CPU, History, Sequences, fresh, histories
from workers.attention.base import Attributes, LayerShape
from workers.attention.reference import ReferenceAttention


def visible(history: History, length: int) -> Tensor:
    """[length, length], whether the query of a row may see the key of a column."""
    positions = torch.arange(length)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance < (history.attributes.sliding_window or length))


def sdpa(history: History, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attends over a whole sequence at once. A sink is one more key that scores its logit and has no value."""
    query, key, value = (tensor.double().transpose(0, 1) for tensor in (query, key, value))
    bias = torch.zeros(len(query), *visible(history, query.shape[1]).shape, dtype=torch.float64)
    bias = bias.masked_fill(~visible(history, query.shape[1]), -torch.inf)
    if history.attributes.sinks is not None:
        bias = torch.cat([bias, history.attributes.sinks[:, None, None].expand(-1, bias.shape[1], 1)], -1)
        key, value = (pad(tensor, (0, 0, 0, 1)) for tensor in (key, value))
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=bias, scale=history.attributes.scaling, enable_gqa=True
    )
    return output.transpose(0, 1).float()


@settings(max_examples=60, deadline=None)
@given(histories())
def test_a_history_through_the_paged_cache_equals_sdpa_over_whole_sequences(history):
    history = replace(history, attributes=replace(history.attributes, softcap=None))
    sequences = Sequences(history)
    outputs = sequences.replay(fresh(ReferenceAttention, history))
    for row, output in enumerate(outputs):
        expected = sdpa(history, sequences.query[row], sequences.key[row], sequences.value[row])
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(histories())
def test_softcap_is_that_of_gemma2(history):
    history = replace(history, attributes=replace(history.attributes, softcap=2.5, sinks=None))
    sequences = Sequences(history)
    outputs = sequences.replay(fresh(ReferenceAttention, history))
    module = SimpleNamespace(
        num_key_value_groups=history.shape.query_heads // history.shape.kv_heads,
        training=False,
        head_dim=history.shape.key_dim,
    )
    for row, output in enumerate(outputs):
        query, key, value = (
            whole[row].transpose(0, 1)[None] for whole in (sequences.query, sequences.key, sequences.value)
        )
        mask = torch.zeros(visible(history, len(output)).shape).masked_fill(~visible(history, len(output)), -torch.inf)
        expected, _ = eager_attention_forward(
            module, query, key, value, mask[None, None], scaling=history.attributes.scaling, softcap=2.5
        )
        torch.testing.assert_close(output, expected[0], atol=1e-5, rtol=1e-5)


def test_half_precision_is_computed_in_float32_and_cast_back():
    shape = LayerShape(query_heads=4, kv_heads=2, key_dim=16, value_dim=8)
    history = History(shape, 16, [[40]], Attributes(scaling=0.25), seed=1)
    sequences = Sequences(history)
    whole = sequences.replay(fresh(ReferenceAttention, history))[0]
    half = ReferenceAttention([shape], history.num_blocks, history.block_size, torch.bfloat16, CPU)
    output = sequences.replay(half)[0]
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), whole, atol=2e-2, rtol=2e-2)
