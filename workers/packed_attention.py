"""An attention layer whose query, key and value come from one product, with the rotary embeddings applied where they lie."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workers import trial
from workers.linear import PackedLinear
from workers.norm import rms_norm
from workers.rotary import Heads, rotate_

#: Under this name a layer's attention function is ours for a trial.
_TRIAL = "tokenbus_trial"


class _Call(NamedTuple):
    """What a layer hands to its attention function: tensors ``[1, heads, T, head_dim]``, and what is the same every time."""

    query: Tensor
    key: Tensor
    value: Tensor
    given: dict[str, Any]


class PackedAttention(nn.Module):
    """As transformers' LlamaAttention: which attention function is called is the model's setting.

    ``projection``: query, key and value, one below the other; ``turned``: the heads of queries and of keys; ``given``: see
    `_Call`. Raises CompileError, or ValueError for weights that can't be packed.
    """

    #: The layers of the model that a product stands in for.
    merged: ClassVar = {"qkv": ("q_proj", "k_proj", "v_proj")}

    def __init__(
        self, layer: Any, projection: nn.Linear, format: torch.dtype, turned: tuple[Heads, Heads], given: dict[str, Any]
    ) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = layer.config, layer.layer_idx, layer.head_dim
        # transformers' own attention functions look for these.
        self.num_key_value_groups, self.is_causal = layer.num_key_value_groups, layer.is_causal
        self.heads, self.turned = _heads(layer), turned
        self.qkv = PackedLinear(projection, format, widths=[count * self.head_dim for count in self.heads])
        self.o_proj = PackedLinear(layer.o_proj, format)
        self.given = given
        self._eager: Callable[..., tuple[Tensor, Any]] = sys.modules[type(layer).__module__].eager_attention_forward

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[Tensor, Any]:
        """hidden_states ``[1, T, width]``, position_embeddings two of ``[1, T, head_dim]`` -> ``[1, T, width]``, weights."""
        query, key, value = _split(self.qkv(hidden_states), self.heads, self.turned, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        implementation = self.config._attn_implementation  # noqa: SLF001 - as in every layer of transformers
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, self._eager)
        output, weights = attend(self, query, key, value, attention_mask, **(more | self.given))
        return self.o_proj(output.flatten(2)), weights


def packed_attention(format: torch.dtype, layer: Any) -> PackedAttention | None:
    """One in the place of a layer that does just this on random tokens; else None."""
    projections: list[Any] = [getattr(layer, f"{name}_proj", None) for name in "qkvo"]
    if not all(type(projection) is nn.Linear for projection in projections) or not hasattr(layer, "head_dim"):
        return None
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, trial.ROWS, layer.q_proj.in_features, generator=draw)
    cos, sin = torch.randn(2, 1, trial.ROWS, layer.head_dim, generator=draw)
    try:
        with observed(layer) as calls:
            output, _ = layer(hidden_states=x, position_embeddings=(cos, sin), attention_mask=None)
    except (TypeError, RuntimeError):
        return None  # it takes other arguments, or embeddings of another size
    projection, turned = _stacked(projections[:3]), _turned(layer)
    ours = _split(projection(x), _heads(layer), turned, (cos, sin))
    (theirs,) = calls
    pairs = [*zip(ours, theirs[:3], strict=True), (layer.o_proj(ours[0].transpose(1, 2).flatten(2)), output)]
    if not all(trial.agree(mine, expected) for mine, expected in pairs):
        return None
    return PackedAttention(layer, projection, format, turned, theirs.given)


@contextmanager
def observed(layer: Any) -> Iterator[list[_Call]]:
    """What the layer's attention function, which answers with its queries, is called with meanwhile."""
    calls = []

    def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> tuple[Tensor, None]:
        del mask
        calls.append(_Call(query, key, value, given))
        return query.transpose(1, 2), None

    config = layer.config
    before = config._attn_implementation  # noqa: SLF001 - nothing public sets it for one layer
    ALL_ATTENTION_FUNCTIONS[_TRIAL] = attend
    config._attn_implementation = _TRIAL  # noqa: SLF001
    try:
        yield calls
    finally:
        config._attn_implementation = before  # noqa: SLF001
        del ALL_ATTENTION_FUNCTIONS[_TRIAL]


def _heads(layer: Any) -> list[int]:
    """Of query, key and value."""
    return [projection.out_features // layer.head_dim for projection in (layer.q_proj, layer.k_proj, layer.v_proj)]


def _turned(layer: Any) -> tuple[Heads, Heads]:
    """The heads of queries and keys, with the norms that some models have over each."""
    queries, keys, _ = _heads(layer)
    return _normed(queries, layer, "q_norm"), _normed(keys, layer, "k_norm")


def _normed(count: int, layer: Any, name: str) -> Heads:
    norm = rms_norm(getattr(layer, name, None))
    return Heads.of(count, norm if norm and norm.width == layer.head_dim else None)


def _stacked(linears: list[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are theirs, one after the other."""
    stacked = nn.Linear(linears[0].in_features, sum(each.out_features for each in linears), device="meta")
    weights: list[Tensor] = [each.weight for each in linears]
    biases: list[Tensor] = [torch.zeros(each.out_features) if each.bias is None else each.bias for each in linears]
    stacked.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    stacked.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return stacked


def _split(
    qkv: Tensor, heads: list[int], turned: tuple[Heads, Heads], embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Query, key and value, each a view ``[1, heads, T, head_dim]`` of the product, once all but the values are turned."""
    rotate_(qkv, *turned, *embeddings)
    return qkv.unflatten(2, (sum(heads), -1)).transpose(1, 2).split(heads, dim=1)
