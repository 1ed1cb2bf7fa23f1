"""Rotary position embeddings (Su et al., "RoFormer", 2021) in one pass, where transformers' own take sixteen."""

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from workers.kernels import FOLDER
from workers.kernels.compiler import load_library

SOURCE = FOLDER / "rotary.cpp"


def rotate_(x: Tensor, heads: int, cos: Tensor, sin: Tensor) -> None:
    """Turn the first ``heads`` heads of each token in place.

    x: float32 ``[1, T, width]``, dense, on the CPU; cos and sin: float32 ``[1, T, dim]``. Raises ValueError for anything else.
    """
    tokens, dim = cos.shape[-2:]
    width = x.shape[-1]
    fits = x.shape == (1, tokens, width) and cos.shape == sin.shape == (1, tokens, dim) and heads * dim <= width
    if not fits or not x.is_contiguous() or {x.dtype, cos.dtype, sin.dtype} != {torch.float32} or dim % 2:
        raise ValueError(f"{heads} heads of {list(cos.shape)} don't fit {x.dtype} {list(x.shape)}")
    cos, sin = cos.contiguous(), sin.contiguous()
    kernel()(x.data_ptr(), tokens, width, heads, dim, cos.data_ptr(), sin.data_ptr(), torch.get_num_threads())


@cache
def kernel() -> "ctypes._NamedFuncPointer":
    """Raises CompileError."""
    rotary = load_library(SOURCE).rotary
    rotary.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64)
    rotary.restype = None
    return rotary
