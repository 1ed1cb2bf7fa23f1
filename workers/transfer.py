"""Small arrays on their way to the device: on CUDA all of them in one copy out of pinned memory, which the host doesn't wait
for."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

#: Bytes: kernels are compiled for addresses that are divisible by it, and once more for others.
_ALIGNMENT = 16


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Each as a tensor of its shape and dtype on the device; on the CPU it may be the same memory."""
    if device.type != "cuda":
        return [torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays]
    starts = list(accumulate((-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays), initial=0))
    # The allocator gives this memory to nobody else before the copy is done.
    staging = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    bytes_of = staging.numpy()
    for array, start in zip(arrays, starts, strict=False):
        bytes_of[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = staging.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
        for array, start in zip(arrays, starts, strict=False)
    ]


def index(rows: list[int], device: torch.device) -> list[int] | Tensor:
    """These rows as an index into a tensor on the device: one that doesn't make the host wait."""
    return rows if device.type == "cpu" else send([np.array(rows, dtype=np.int64)], device)[0]
