"""What every paged attention backend takes and gives.

A sequence's keys and values live in blocks of `block_size` tokens scattered over one cache; its row of the block table
says where. One step is a ragged batch: prefill chunks and single decode tokens side by side, without padding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The per-token shape of one attention layer; `query_heads` is a multiple of `kv_heads`."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """The rows of one step: R rows with T query tokens in total.

    query_start: int32 [R + 1], cumulative query counts.
    context_len: int32 [R], KV positions valid once this step's are written (start + length).
    block_table: int32 [R, max_blocks], the physical block of each logical one, padded with 0. Entries past the context
        or wholly before every query's sliding window are never read.
    cache_slots: int64 [T], block * block_size + offset that each token's key and value are written to.
    """

    query_start: Tensor
    context_len: Tensor
    block_table: Tensor
    cache_slots: Tensor
    max_query_len: int
    max_context_len: int


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a layer's attention asks for besides q, k and v.

    sliding_window: W keys are visible, the query's own position among them (transformers' meaning); None is all.
    softcap: scaled scores s become softcap * tanh(s / softcap).
    sinks: [query_heads], one more logit per head in the softmax's denominator, which adds no value (gpt_oss).
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionBackend(ABC):
    """Causal attention over a paged KV cache that the backend owns and lays out as it likes.

    ``dtype``: of what it is given and gives; ``kv_dtype``: what it holds keys and values as, if that is another one.
    """

    name: ClassVar[str]
    #: Whether a query's output is the same bits whatever else is in the batch and however its prompt was cut into chunks.
    batch_invariant: ClassVar[bool] = False
    #: Whether a context may be summed in parts, as many as suit the batch.
    in_parts: ClassVar[bool] = True
    #: Whether `attend` can be captured in a CUDA graph; then the cache has a last block more, which is nobody's.
    capturable: ClassVar[bool] = False

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self.device = device
        self.allocate()

    @abstractmethod
    def allocate(self) -> None:
        """Make the cache, uninitialised, and whatever else the backend holds."""

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, attributes: Attributes
    ) -> Tensor:
        """Write this step's keys and values into the layer's blocks, then attend over each row's whole context.

        query: [T, query_heads, key_dim]; key: [T, kv_heads, key_dim]; value: [T, kv_heads, value_dim].
        Query i of a row sits at position context_len - query_len + i and sees the keys at positions up to its own.
        Returns [T, query_heads, value_dim] in the query's dtype.
        """

    @abstractmethod
    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy blocks, whole and in every layer: int64 [n] each. All are read before any is written."""

    @classmethod
    @abstractmethod
    def unsupported(
        cls,
        layers: Sequence[LayerShape],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        attributes: Sequence[Attributes] = (),
        kv_dtype: torch.dtype | None = None,
    ) -> str | None:
        """The reason this backend cannot serve such a model here, or None when it can.

        attributes: what the model's layers will ask for, as far as known. kv_dtype: as the constructor's.
        """

    @staticmethod
    def bytes_per_block(layers: Sequence[LayerShape], block_size: int, kv_dtype: torch.dtype) -> int:
        """Bytes one block takes over all layers."""
        elements = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in layers)
        return elements * block_size * kv_dtype.itemsize
