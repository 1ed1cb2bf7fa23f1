"""CPU: our own kernel, `paged_attention.cpp`, called once per layer through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from workers import huge_pages
from workers.attention.base import AttentionBackend, Attributes, LayerShape, RaggedBatch
from workers.kernels import FOLDER
from workers.kernels.compiler import CompileError, address_of, load_library

SOURCE = FOLDER / "paged_attention.cpp"
# The kernel's vectors are 16 floats at most, and 8 where 16 does not divide a shape.
LANES = 16
MULTIPLE = 8
#: What keys and values may be held as, and how the kernel is built for it.
_BUILDS = {torch.float32: [], torch.float16: ["HALF"]}


class _Layer(ctypes.Structure):
    _fields_ = (
        ("cache", c_void_p),
        *((name, c_int64) for name in ("query_heads", "kv_heads", "key_dim", "value_dim", "block_size", "block_bytes")),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query_start", "context_len", "block_table", "cache_slots")),
        *((name, c_int64) for name in ("rows", "tokens", "max_blocks")),
    )


class Call(ctypes.Structure):
    """What one layer asks of the kernel in one step; `paged_attention.h` says what each field is."""

    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value", "output")),
        *((f"{name}_{axis}", c_int64) for name in ("query", "key", "value") for axis in ("token", "head")),
        ("sinks", c_void_p),
        ("sliding_window", c_int64),
        ("scaling", c_float),
        ("softcap", c_float),
        ("threads", c_int64),
    )
    sinks_held: Tensor | None

    @classmethod
    def asking(cls, attributes: Attributes, **others: int) -> Call:
        """With what a layer's attention asks for, and other fields; it holds the sinks that it has the address of."""
        sinks = None if attributes.sinks is None else attributes.sinks.to(torch.float32).contiguous()
        call = cls(
            sinks=None if sinks is None else sinks.data_ptr(),
            sliding_window=attributes.sliding_window or 0,
            scaling=attributes.scaling,
            softcap=attributes.softcap or 0.0,
            **others,
        )
        call.sinks_held = sinks
        return call


class CpuAttention(AttentionBackend):
    """One cache tensor per layer, [num_blocks, kv_heads, (key_dim + value_dim) * block_size], laid out by the kernel.

    Raises CompileError when the kernel cannot be compiled.
    """

    name = "cpu"
    batch_invariant = True

    def allocate(self) -> None:
        self._kernel = _library(self.layers, self.block_size, self.kv_dtype).paged_attention
        self._kernel.argtypes, self._kernel.restype = (c_void_p, c_void_p, c_void_p), None
        #: For kernels that call it.
        self.kernel_address = address_of(self._kernel)
        self.cache = huge_pages.zeros(
            [(self.num_blocks, s.kv_heads, (s.key_dim + s.value_dim) * self.block_size) for s in self.layers],
            self.kv_dtype,
        )
        self._layers = (_Layer * len(self.layers))(
            *(
                _Layer(
                    cache.data_ptr(),
                    s.query_heads,
                    s.kv_heads,
                    s.key_dim,
                    s.value_dim,
                    self.block_size,
                    cache[0].nbytes,
                )
                for s, cache in zip(self.layers, self.cache, strict=True)
            )
        )
        self._batch: RaggedBatch | None = None
        self._batch_tensors: tuple[Tensor, ...] = ()
        self._batch_pointers = _Batch()

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
        del attributes  # it has them all
        if device.type != "cpu":
            return f"the C++ kernel runs on the CPU, not on {device}"
        if dtype != torch.float32:
            return f"the C++ kernel computes in float32, not {dtype}"
        if kv_dtype not in {None, *_BUILDS}:
            return f"the C++ kernel holds keys and values in float32 or float16, not {kv_dtype}"
        if any(size % MULTIPLE for size in _sizes(layers, block_size)):
            return f"the C++ kernel wants block size and head dims in multiples of {MULTIPLE}"
        try:
            _library(layers, block_size, kv_dtype or dtype)
        except CompileError as error:
            return f"the C++ kernel could not be compiled: {error}"
        return None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, batch: RaggedBatch, attributes: Attributes
    ) -> Tensor:
        """As the interface says. Raises ValueError for tensors or a batch that do not fit the cache."""
        caches, batch_address = self.addresses(batch)
        shape, tokens = self.layers[layer], self._batch_pointers.tokens
        output = torch.empty(tokens, shape.query_heads, shape.value_dim)
        call = Call.asking(
            attributes,
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            output=output.data_ptr(),
            **_strides("query", query, (tokens, shape.query_heads, shape.key_dim)),
            **_strides("key", key, (tokens, shape.kv_heads, shape.key_dim)),
            **_strides("value", value, (tokens, shape.kv_heads, shape.value_dim)),
            threads=torch.get_num_threads(),
        )
        self._kernel(caches + layer * ctypes.sizeof(_Layer), batch_address, ctypes.addressof(call))
        return output

    def addresses(self, batch: RaggedBatch) -> tuple[int, int]:
        """Of all layers' caches, and of a step's batch while that lasts, for the kernel. Raises ValueError for a batch that
        doesn't fit the cache."""
        if batch is not self._batch:
            self._use(batch)
        return ctypes.addressof(self._layers), ctypes.addressof(self._batch_pointers)

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        for blocks in self.cache:
            blocks[targets] = blocks[sources]

    def _use(self, batch: RaggedBatch) -> None:
        """Point the kernel at a new step's batch. Raises ValueError where it would read or write outside the cache."""
        query_start, context_len, block_table = (
            tensor.to("cpu", torch.int32).contiguous()
            for tensor in (batch.query_start, batch.context_len, batch.block_table)
        )
        cache_slots = batch.cache_slots.to("cpu", torch.int64).contiguous()
        rows, max_blocks = block_table.shape
        tokens = len(cache_slots)
        lengths = query_start.diff()
        if (
            (len(query_start), len(context_len)) != (rows + 1, rows)
            or (int(query_start[0]), int(query_start[-1])) != (0, tokens)
            or bool(
                (lengths < 0).any() | (lengths > context_len).any() | (context_len > max_blocks * self.block_size).any()
            )
            or not _within(block_table, self.num_blocks)
            or not _within(cache_slots, self.num_blocks * self.block_size)
        ):
            raise ValueError("the batch does not fit the KV cache")
        # The batch is held so that its identity stays its own, the tensors so that the pointers stay good.
        self._batch, self._batch_tensors = batch, (query_start, context_len, block_table, cache_slots)
        self._batch_pointers = _Batch(*(tensor.data_ptr() for tensor in self._batch_tensors), rows, tokens, max_blocks)


def _sizes(layers: Sequence[LayerShape], block_size: int) -> set[int]:
    return {block_size, *(dim for shape in layers for dim in (shape.key_dim, shape.value_dim))}


def _library(layers: Sequence[LayerShape], block_size: int, kv_dtype: torch.dtype) -> ctypes.CDLL:
    narrow = any(size % LANES for size in _sizes(layers, block_size))
    return load_library(SOURCE, [f"LANES={MULTIPLE if narrow else LANES}", *_BUILDS[kv_dtype]])


def _strides(name: str, tensor: Tensor, shape: tuple[int, int, int]) -> dict[str, int]:
    """The token and head strides of a float32 tensor of `shape` with a dense last dimension; else ValueError."""
    token, head, element = tensor.stride()
    if tensor.shape != shape or tensor.dtype != torch.float32 or (element != 1 and shape[2] > 1):
        raise ValueError(f"expected float32 {shape} with a dense last dimension, got {tensor.dtype} {tensor.shape}")
    return {f"{name}_token": token, f"{name}_head": head}


def _within(indices: Tensor, end: int) -> bool:
    if not indices.numel():
        return True
    low, high = indices.aminmax()
    return int(low) >= 0 and int(high) < end
