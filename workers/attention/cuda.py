"""CUDA: `kernels/paged_attention.py`, in Triton."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.attention.base import AttentionBackend, Attributes, LayerShape, RaggedBatch
from workers.kv_cache import KVCache

#: Above it a program's keys and values don't fit the memory that its multiprocessor shares.
MAX_HEAD_DIM = 256


class CudaAttention(AttentionBackend):
    """The cache in the plain layout, any block size, and all attributes."""

    name = "cuda"
    capturable = True

    def allocate(self) -> None:
        from workers.kernels import paged_attention  # noqa: PLC0415 - torch brings Triton along where it is built for CUDA

        self._kernels = paged_attention
        self.cache = KVCache(self.layers, self.num_blocks + 1, self.block_size, self.dtype, self.device)

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
        del block_size, attributes  # it has them all
        if device.type != "cuda" or torch.version.cuda is None:
            return f"the Triton kernel needs a CUDA device, not {device}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernel needs compute capability 8.0"
        if kv_dtype not in {None, dtype}:
            return f"the Triton kernel holds keys and values as it gets them, in {dtype}, not {kv_dtype}"
        if importlib.util.find_spec("triton") is None:
            return "Triton isn't installed"
        if any(max(shape.key_dim, shape.value_dim) > MAX_HEAD_DIM for shape in layers):
            return f"the Triton kernel wants head dims of at most {MAX_HEAD_DIM}"
        return None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, attributes: Attributes
    ) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        self._kernels.store(key, value, keys, values, batch.cache_slots)
        return self._kernels.attend(query, keys, values, batch, attributes, in_parts=self.in_parts)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        self.cache.copy(sources, targets)
