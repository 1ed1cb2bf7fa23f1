"""What a simulated run came to. Times are simulated seconds, service is in units of the price (core/fairness.py)."""

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

SHARES = (0.5, 0.95, 0.99)


class Percentiles(msgspec.Struct, frozen=True):
    """Of seconds."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.float64]) -> "Percentiles":
        """Of at least one; what lies between two of them is interpolated."""
        return cls(*np.quantile(values, SHARES).tolist())


class TenantFigures(msgspec.Struct, frozen=True):
    """``service``: units per weight that the tenant got in all. Percentiles are null where nothing was measured."""

    requests: int
    output_tokens: int
    output_tokens_per_s: float
    service: float
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    e2e_s: Percentiles | None


class Figures(msgspec.Struct, frozen=True):
    """``ttft_s``: from arrival to the first token; ``itl_s``: between two tokens of a request, within half a percent;
    ``e2e_s``: from arrival to the last token. ``requests`` came to their end; ``refused`` could never fit.

    ``max_service_gap``: among the first ``service_gap_tenants`` tenants (gap.py); ``service_gap_bound``: what theory allows a
    fair policy. ``kv_waste_ratio``: the share of the slots of allocated KV blocks, over time, that held no token.
    """

    policy: str
    cost_model: str
    requests: int
    refused: int
    seconds: float
    steps: int
    prompt_tokens: int
    output_tokens: int
    output_tokens_per_s: float
    ttft_s: Percentiles | None
    itl_s: Percentiles | None
    e2e_s: Percentiles | None
    max_service_gap: float
    service_gap_bound: float
    service_gap_tenants: int
    kv_waste_ratio: float
    preemptions: int
    tenants: dict[str, TenantFigures]
