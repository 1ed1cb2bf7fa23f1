"""The paged KV cache in the plain layout, which the reference and CUDA backends read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the attention package imports this module
    from workers.attention.base import LayerShape


class KVCache:
    """Per layer, keys [num_blocks, block_size, kv_heads, key_dim] and values [..., value_dim]; not initialised."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def blocks(heads: int, dim: int) -> Tensor:
            return torch.empty(num_blocks, block_size, heads, dim, dtype=dtype, device=device)

        self.keys = [blocks(layer.kv_heads, layer.key_dim) for layer in layers]
        self.values = [blocks(layer.kv_heads, layer.value_dim) for layer in layers]

    def write(self, layer: int, key: Tensor, value: Tensor, cache_slots: Tensor) -> None:
        """Store key [T, kv_heads, key_dim] and value [T, kv_heads, value_dim] at cache_slots, int64 [T]."""
        for cache, given in ((self.keys[layer], key), (self.values[layer], value)):
            cache.flatten(0, 1).index_copy_(0, cache_slots, _narrowed(given, cache.dtype))

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks, int64 [n] each, in every layer; all are read before any is written."""
        for blocks in (*self.keys, *self.values):
            blocks[targets] = blocks[sources]


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In another dtype, where what is too large for that becomes its largest number: infinity would make a softmax NaN."""
    if tensor.dtype == dtype:
        return tensor
    limit = torch.finfo(dtype).max
    return tensor.clamp(-limit, limit).to(dtype)
