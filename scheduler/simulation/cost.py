"""How long a step takes: linear in what it computes and reads.

``seconds = step_s + row_s * rows + token_s * tokens + context_s * context + attended_s * attended``, for the whole iteration,
from one plan to the next. ``tokens`` are mostly matrix products, ``context`` the reading of KV, ``attended`` the arithmetic of
attention (protocol/plan.py says what is counted). A linear model knows no cliff: no caches, no sizes that a kernel likes better.
"""

import msgspec

from protocol.plan import Work


class CostError(ValueError):
    """No such model, or a file that doesn't hold one; the text says which."""


class Quality(msgspec.Struct, frozen=True):
    """How well the model tells the steps that it wasn't fitted to; errors are relative to what was measured."""

    steps: int
    held_out: int
    r_squared: float
    median_error: float
    p95_error: float
    #: Of the whole of their time.
    total_error: float


class CostModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All coefficients in seconds. ``origin``: the machine and how the numbers came about."""

    name: str
    origin: str
    step_s: float
    row_s: float
    token_s: float
    context_s: float
    attended_s: float
    quality: Quality | None = None

    def seconds(self, work: Work) -> float:
        return (
            self.step_s
            + self.row_s * work.rows
            + self.token_s * work.tokens
            + self.context_s * work.context
            + self.attended_s * work.attended
        )
