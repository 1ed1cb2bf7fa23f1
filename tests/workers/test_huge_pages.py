import sys
import threading
from array import array
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch

from workers import huge_pages


def resident(address: int, bytes: int) -> int:
    """How many of these bytes of this process are in memory (proc_pid_pagemap(5))."""
    with Path("/proc/self/pagemap").open("rb") as pages:
        pages.seek(address // PAGESIZE * 8)
        return PAGESIZE * sum(page >> 63 for page in array("Q", pages.read(bytes // PAGESIZE * 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (7,), (1 << 12, 1 << 13)])
def test_a_copy_has_the_same_numbers_and_is_dense(shape, dtype):
    given = torch.randint(-9, 9, shape).to(dtype).transpose(0, -1)
    copies = [huge_pages.copy(given) for _ in range(3)]
    copies[0].fill_(7)
    for copy in copies[1:]:
        assert torch.equal(copy, given)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 64 == 0


def test_a_copy_outlives_what_was_copied_beside_it():
    kept = huge_pages.copy(torch.arange(10))
    for _ in range(3):
        huge_pages.copy(torch.zeros(1 << 24))
    assert torch.equal(kept, torch.arange(10))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for it")
def test_zeros_are_there_before_anybody_writes_them():
    first, second = huge_pages.zeros([(1 << 22, 4), (2, 3)], torch.float32)
    for thread in threading.enumerate():
        if thread.name == "populate":
            thread.join()
    address, bytes = first.data_ptr(), first.nbytes
    assert resident(address, bytes) == bytes
    assert (first.shape, second.shape) == ((1 << 22, 4), (2, 3))
    assert first.dtype == second.dtype == torch.float32
    assert not first.any() and not second.any()
    del first, second
    assert resident(address, bytes) < 1 << 22
