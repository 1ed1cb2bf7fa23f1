"""How far apart two results are."""

from torch import Tensor


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Where sums come out near 0, of what was added, which is about 1."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1))
