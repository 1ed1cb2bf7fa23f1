"""The registry: ours, and the baselines it is compared with, all behind one interface."""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

from scheduler.core.fairness import Price
from scheduler.core.policies.base import Policy
from scheduler.core.policies.chunked import Chunked
from scheduler.core.policies.fair import Fair
from scheduler.core.policies.orca import Orca
from scheduler.core.policies.prefill_first import PrefillFirst
from scheduler.core.policies.static import Static

PolicyName = Literal["fair", "chunked", "prefill_first", "orca", "static"]
NAMES: tuple[PolicyName, ...] = get_args(PolicyName)

_POLICIES: dict[PolicyName, Callable[[Mapping[str, float] | None, Price], Policy]] = {
    "fair": Fair,
    "chunked": Chunked,
    "prefill_first": PrefillFirst,
    "orca": Orca,
    "static": Static,
}


def create(name: PolicyName, weights: Mapping[str, float] | None = None, price: Price = Price()) -> Policy:
    """A fresh policy; ``weights`` names the tenants whose weight isn't 1."""
    return _POLICIES[name](weights, price)
