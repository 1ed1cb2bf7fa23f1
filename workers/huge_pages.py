"""Memory in huge pages, for what each step reads from end to end: weights, keys and values.

With pages of 4 KB a CPU spends much of its time on finding where they lie (docs/decisions/0021-huge-pages.md). The kernel gives
huge ones as it has them, to who asks for them (madvise(2)); elsewhere this is memory like any other.
"""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Sequence
from math import prod
from threading import Thread

import torch
from torch import Tensor

#: So much is asked for at once, for tensor after tensor: little of the last page is left over.
_PIECE = 64 << 20
_ALIGNMENT = 64
#: From Linux 5.14 on; Python's mmap has no name for it. So much at a time, since nobody else gets memory meanwhile.
_MADV_POPULATE_WRITE = 23
_POPULATED_AT_ONCE = 16 << 20
_LINUX = sys.platform == "linux"


class _Room:
    """What is left of the newest piece. A piece goes when the last tensor in it does."""

    def __init__(self) -> None:
        self._left = torch.empty(0, dtype=torch.uint8)

    def take(self, bytes: int) -> Tensor:
        """uint8 ``[bytes]``."""
        if bytes > len(self._left):
            self._left = _whole(_map(max(bytes, _PIECE)))
        taken, self._left = self._left[:bytes], self._left[bytes + -bytes % _ALIGNMENT :]
        return taken


_room = _Room()


def copy(tensor: Tensor) -> Tensor:
    """The same numbers, dense, on the CPU. Raises OSError where no memory is left."""
    return _room.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def zeros(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    """Of these shapes, one after the other. A thread has the kernel clear their pages, so that no step waits for that.
    Raises OSError."""
    sizes = [prod(shape) for shape in shapes]
    memory = _whole(_map(sum(sizes) * dtype.itemsize))
    if _LINUX and memory.nbytes > _POPULATED_AT_ONCE:
        Thread(target=_populate, args=(memory,), name="populate", daemon=True).start()
    parts = memory.view(dtype).split(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _populate(memory: Tensor) -> None:
    """Leaves what is in it as it is, also what is written meanwhile."""
    advise = ctypes.CDLL(None).madvise
    for start in range(0, memory.nbytes, _POPULATED_AT_ONCE):
        size = min(_POPULATED_AT_ONCE, memory.nbytes - start)
        advise(ctypes.c_void_p(memory.data_ptr() + start), ctypes.c_size_t(size), _MADV_POPULATE_WRITE)


def _map(bytes: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _LINUX:
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _whole(mapping: mmap.mmap) -> Tensor:
    return torch.frombuffer(mapping, dtype=torch.uint8)
