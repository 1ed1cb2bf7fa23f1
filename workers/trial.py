"""Whether a module of ours computes what it is to stand in for, tried on a few random rows."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Rows, or tokens, that a module is tried on.
ROWS = 3
#: How far ours may be from what is expected, as the norm of the difference over the norm: rounding alone.
_TOLERANCE = 1e-5


def agree(ours: Tensor, expected: Tensor) -> bool:
    return ours.shape == expected.shape and float((ours - expected).norm() / expected.norm()) < _TOLERANCE


def stands_in(ours: Callable[[Tensor], Tensor], layer: nn.Module, width: int) -> bool:
    """Whether two ways to compute a layer give the same of random rows of this width."""
    x = torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(0))
    return agree(ours(x), layer(x))
