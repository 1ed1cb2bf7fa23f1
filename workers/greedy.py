"""The likeliest tokens."""

import ctypes
from ctypes import c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from workers.kernels import FOLDER
from workers.kernels.compiler import CompileError, load_library

SOURCE = FOLDER / "greedy.cpp"


def greedy(logits: Tensor) -> Tensor:
    """Of each row the likeliest token, the first of equals: logits ``[n, V]`` -> int64 ``[n]``.

    What `argmax` gives; on the CPU that keeps track of places one by one, where a maximum alone takes several numbers at a time.
    """
    find = _kernel() if logits.device.type == "cpu" and logits.dtype == torch.float32 else None
    if find is None or logits.stride(1) != 1:
        return logits.argmax(dim=-1)
    rows, width = logits.shape
    found = torch.empty(rows, dtype=torch.int64)
    find(logits.data_ptr(), rows, logits.stride(0), width, found.data_ptr(), torch.get_num_threads())
    return found


@cache
def _kernel() -> "ctypes._NamedFuncPointer | None":
    """None where it can't be compiled."""
    try:
        function: Any = load_library(SOURCE).greedy
    except CompileError:
        return None
    function.argtypes, function.restype = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64), None
    return function
