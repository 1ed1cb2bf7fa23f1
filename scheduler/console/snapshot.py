"""What the console shows at one moment: numbers and names only, never a prompt or a text.

Times are in seconds on one clock, of which only differences mean anything; ``at`` is now.
"""

from typing import Literal

import msgspec

#: Where a request stands. ``preempted``: it waits again, its blocks lost to others, and is to be computed anew.
Stage = Literal["waiting", "prefill", "decode", "preempted"]


class Phase(msgspec.Struct, frozen=True):
    """A stretch of a request's time; ``until`` None: it goes on."""

    stage: Stage
    since: float
    until: float | None


class RequestRow(msgspec.Struct, frozen=True):
    """One request; ``phases`` are the latest ones, the oldest first. ``outcome`` None: it hasn't ended."""

    tenant: str
    request_id: str
    prompt_tokens: int
    generated_tokens: int
    phases: list[Phase]
    outcome: str | None


class TenantRow(msgspec.Struct, frozen=True):
    """What a tenant has and gets. ``service``: units so far, divided by its weight, as the fair queue counts them."""

    tenant: str
    weight: float
    waiting: int
    running: int
    tokens_per_s: float
    service: float


class Snapshot(msgspec.Struct, frozen=True):
    """``checks`` are those of /readyz. ``rows`` and ``step_s`` are of the last step; rates are means over the last seconds.

    Of tenants and requests only some are listed: ``tenants`` the busiest, ``requests`` those that run, then those that have
    waited longest, then those that ended last.
    """

    at: float
    model: str
    checks: dict[str, bool]
    max_running: int
    running: int
    waiting: int
    rows: int
    step_s: float
    steps_per_s: float
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    kv_blocks: int
    kv_blocks_used: int
    preemptions: int
    num_tenants: int
    tenants: list[TenantRow]
    requests: list[RequestRow]


encode = msgspec.json.encode
decode = msgspec.json.Decoder(Snapshot).decode
