"""Memory in huge pages, for what each step reads from end to end: weights, keys and values.

With pages of 4 KB a CPU spends much of its time on finding where they lie (docs/decisions/0021-huge-pages.md). The kernel gives
huge ones as it has them, to who asks for them (madvise(2)); elsewhere this is memory like any other.
"""

import contextlib
import mmap
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

#: So much is asked for at once, for tensor after tensor: little of the last page is left over.
_PIECE = 64 << 20
_ALIGNMENT = 64
#: From Linux 5.14 on; Python's mmap has no name for it.
_MADV_POPULATE_WRITE = 23
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


def zeros(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """float32 of these shapes, one after the other. It is there when they are: no step waits for a page to be cleared, and who
    asked for more than the machine has knows at once. Raises OSError."""
    sizes = [prod(shape) for shape in shapes]
    mapping = _map(sum(sizes) * torch.float32.itemsize)
    if _LINUX:
        _advise(mapping, _MADV_POPULATE_WRITE)
    parts = _whole(mapping).view(torch.float32).split(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def _map(bytes: int) -> mmap.mmap:
    mapping = mmap.mmap(-1, bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _LINUX:
        _advise(mapping, mmap.MADV_HUGEPAGE)
    return mapping


def _advise(mapping: mmap.mmap, advice: int) -> None:
    with contextlib.suppress(OSError):  # a kernel that doesn't know it
        mapping.madvise(advice)


def _whole(mapping: mmap.mmap) -> Tensor:
    return torch.frombuffer(mapping, dtype=torch.uint8)
