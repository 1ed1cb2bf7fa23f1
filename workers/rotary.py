"""Rotary position embeddings (Su et al., "RoFormer", 2021) in one pass, where transformers' own take sixteen."""

import ctypes
from ctypes import c_float, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from workers.kernels import FOLDER
from workers.kernels.compiler import load_library
from workers.norm import RMSNorm

SOURCE = FOLDER / "rotary.cpp"


class Heads(ctypes.Structure):
    """So many that lie side by side, and the norm that is over each of them, if any."""

    _fields_ = (("count", c_int64), ("weight", c_void_p), ("epsilon", c_float))
    norm: RMSNorm | None

    @classmethod
    def of(cls, count: int, norm: RMSNorm | None = None) -> "Heads":
        """It holds the norm that it has the weight's address of."""
        heads = cls(count, *((norm.weight_address, norm.epsilon) if norm else (None, 0)))
        heads.norm = norm
        return heads


def rotate_(x: Tensor, queries: Heads, keys: Heads, cos: Tensor, sin: Tensor) -> None:
    """Normalise and turn the first heads of each token in place: its queries', and the keys' behind them.

    x: float32 ``[1, T, width]``, dense, on the CPU; cos and sin: float32 ``[1, T, dim]``. Raises ValueError for anything else.
    """
    tokens, dim = cos.shape[-2:]
    width, heads = x.shape[-1], queries.count + keys.count
    fits = x.shape == (1, tokens, width) and cos.shape == sin.shape == (1, tokens, dim) and heads * dim <= width
    norms = [part.norm for part in (queries, keys) if part.norm]
    if (
        not fits
        or not x.is_contiguous()
        or {x.dtype, cos.dtype, sin.dtype} != {torch.float32}
        or dim % 2
        or any(norm.width != dim for norm in norms)
    ):
        raise ValueError(f"{heads} heads of {list(cos.shape)} don't fit {x.dtype} {list(x.shape)}")
    cos, sin = cos.contiguous(), sin.contiguous()
    parts = (ctypes.addressof(part) for part in (queries, keys))
    kernel()(x.data_ptr(), tokens, width, *parts, dim, cos.data_ptr(), sin.data_ptr(), torch.get_num_threads())


@cache
def kernel() -> "ctypes._NamedFuncPointer":
    """Raises CompileError."""
    rotary = load_library(SOURCE).rotary
    rotary.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64)
    rotary.restype = None
    return rotary
