"""CUDA: FlashAttention with a block table, through torch's own `varlen_attn`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad

from workers.attention.base import AttentionBackend, Attributes, LayerShape, RaggedBatch
from workers.kv_cache import KVCache

FA2_PAGE_MULTIPLE = 256
MAX_HEAD_DIM = 256


class CudaAttention(AttentionBackend):
    """FlashAttention-2, or whichever implementation `activate_flash_attention_impl` has put in its place."""

    name = "cuda"

    def allocate(self) -> None:
        self.cache = KVCache(self.layers, self.num_blocks, self.block_size, self.dtype, self.device)
        self._batch: RaggedBatch | None = None
        self._key_start: Tensor | None = None

    @classmethod
    def unsupported(
        cls,
        layers: Sequence[LayerShape],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        attributes: Sequence[Attributes] = (),
    ) -> str | None:
        if device.type != "cuda" or torch.version.cuda is None:
            return f"FlashAttention needs a CUDA device, not {device}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "FlashAttention needs compute capability 8.0"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"FlashAttention computes in float16 or bfloat16, not {dtype}"
        if any(s.key_dim != s.value_dim or s.key_dim % 8 or s.key_dim > MAX_HEAD_DIM for s in layers):
            return f"FlashAttention wants equal key and value dims, a multiple of 8, at most {MAX_HEAD_DIM}"
        if current_flash_attention_impl() is None and block_size % FA2_PAGE_MULTIPLE:
            return f"FlashAttention-2 wants blocks of a multiple of {FA2_PAGE_MULTIPLE} tokens, not {block_size}"
        return next(filter(None, map(_unsupported_attributes, attributes)), None)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, attributes: Attributes
    ) -> Tensor:
        """As the interface says. Raises ValueError for a softcap or sinks, which `varlen_attn` does not have."""
        if reason := _unsupported_attributes(attributes):
            raise ValueError(reason)
        if batch is not self._batch:
            self._batch, self._key_start = batch, _key_start(batch)
        self.cache.write(layer, key, value, batch.cache_slots)
        shape = self.layers[layer]
        window = attributes.sliding_window
        return cast(
            Tensor,
            varlen_attn(
                query,
                self.cache.keys[layer],
                self.cache.values[layer],
                batch.query_start,
                self._key_start,
                batch.max_query_len,
                batch.max_context_len,
                scale=attributes.scaling,
                # (-1, 0) is plain causal; a window counts the keys to the left of the query, without its own.
                window_size=(-1 if window is None else window - 1, 0),
                enable_gqa=shape.query_heads != shape.kv_heads,
                seqused_k=batch.context_len,
                block_table=batch.block_table,
                # One split sums each row in the same order whoever shares the batch.
                num_splits=1,
            ),
        )

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        self.cache.copy(sources, targets)


def _unsupported_attributes(attributes: Attributes) -> str | None:
    if attributes.softcap is not None:
        return "varlen_attn has no softcap"
    if attributes.sinks is not None:
        return "varlen_attn has no attention sinks"
    return None


def _key_start(batch: RaggedBatch) -> Tensor | None:
    """FlashAttention-2 checks cumulative key counts even where the block table and `seqused_k` replace them; later
    versions refuse them beside a block table."""
    if current_flash_attention_impl() is not None:
        return None
    return pad(batch.context_len.cumsum(0, dtype=torch.int32), (1, 0))
