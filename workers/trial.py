"""Whether a module of ours computes what it is to stand in for, tried on a few random rows."""

from torch import Tensor

#: Rows, or tokens, that a module is tried on.
ROWS = 3
#: How far ours may be from what is expected, as the norm of the difference over the norm: rounding alone.
_TOLERANCE = 1e-5


def agree(ours: Tensor, expected: Tensor) -> bool:
    return ours.shape == expected.shape and float((ours - expected).norm() / expected.norm()) < _TOLERANCE
