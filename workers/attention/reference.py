"""The oracle: plain torch, one row at a time, any dtype and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.attention.base import AttentionBackend, Attributes, LayerShape, RaggedBatch
from workers.kv_cache import KVCache


class ReferenceAttention(AttentionBackend):
    """Computes in float32 at least and casts back. Slow, and meant to be read."""

    name = "reference"

    def allocate(self) -> None:
        self.cache = KVCache(self.layers, self.num_blocks, self.block_size, self.kv_dtype, self.device)

    @classmethod
    def unsupported(
        cls,
        layers: Sequence[LayerShape],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        attributes: Sequence[Attributes] = (),
        kv_dtype: torch.dtype | None = None,
    ) -> str | None:
        del layers, block_size, dtype, device, attributes, kv_dtype
        return None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, attributes: Attributes
    ) -> Tensor:
        self.cache.write(layer, key, value, batch.cache_slots)
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        starts = batch.query_start.tolist()
        for row, context_len in enumerate(batch.context_len.tolist()):
            tokens = slice(starts[row], starts[row + 1])
            output[tokens] = self._attend_row(layer, query[tokens], batch.block_table[row], context_len, attributes)
        return output

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        self.cache.copy(sources, targets)

    def _attend_row(
        self, layer: int, query: Tensor, block_table: Tensor, context_len: int, attributes: Attributes
    ) -> Tensor:
        """query: [L, query_heads, key_dim], the context's last L positions; returns [L, query_heads, value_dim]."""
        length, query_heads, _ = query.shape
        window = attributes.sliding_window or context_len
        query_positions = torch.arange(context_len - length, context_len, device=query.device)
        first_block = max(0, context_len - length - window + 1) // self.block_size
        key_positions = torch.arange(first_block * self.block_size, context_len, device=query.device)
        hidden = (key_positions > query_positions[:, None]) | (key_positions <= query_positions[:, None] - window)

        # Blocks before every window may have been freed: they are not gathered, since 0 * NaN would still be NaN.
        blocks = block_table[first_block : -(-context_len // self.block_size)].long()
        compute = torch.promote_types(query.dtype, torch.float32)
        keys = self.cache.keys[layer][blocks].flatten(0, 1)[: len(key_positions)].to(compute)
        values = self.cache.values[layer][blocks].flatten(0, 1)[: len(key_positions)].to(compute)
        # Slots of the first block before every window may be as stale as a freed block.
        values = values.masked_fill(hidden.all(0)[:, None, None], 0)

        kv_heads = keys.shape[1]
        grouped = query.to(compute).unflatten(1, (kv_heads, query_heads // kv_heads))
        scores = torch.einsum("qhgd,khd->hgqk", grouped, keys) * attributes.scaling
        if attributes.softcap is not None:
            scores = attributes.softcap * torch.tanh(scores / attributes.softcap)
        scores = scores.masked_fill(hidden, -torch.inf)
        if attributes.sinks is not None:
            sinks = attributes.sinks.to(compute).view(kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : len(key_positions)]
        return torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2).to(query.dtype)
