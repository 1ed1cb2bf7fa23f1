"""A run described by plain options: which requests come, to which machine."""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from scheduler.core.batch import Limits
from scheduler.core.policies import PolicyName
from scheduler.simulation import arrivals, models, synthetic, trace
from scheduler.simulation.arrivals import Arrival, Demand
from scheduler.simulation.run import Setup

_DEFAULT_REQUESTS = 1000

Count = Annotated[int, Meta(ge=1)]
Positive = Annotated[float, Meta(gt=0)]


class ScenarioError(ValueError):
    """Options that don't go together; the text names them."""


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """``tokenbus simulate --help`` says what each is. Equal scenarios give equal requests, whatever the policy."""

    trace: Path | None
    speed: Positive
    repeat: Count
    pattern: Literal["poisson", "constant"]
    rate: str
    period: Positive
    requests: Count | None
    prompt: str
    output: str
    max_tokens: Count | None
    prefix_tokens: Annotated[int, Meta(ge=0)]
    tenants: Count
    zipf: Annotated[float, Meta(ge=0)] | None
    weights: dict[str, Positive]
    seed: int
    cost: str
    max_running: Count
    max_batch_tokens: Count
    itl_target_ms: Positive | None
    max_model_len: Count
    block_size: Count
    num_blocks: Count

    def arrivals(self) -> Iterator[Arrival]:
        """Raises ScenarioError; while it is read, TraceError or OSError."""
        random = self._random("tenants")
        tenant = (
            arrivals.round_robin(self.tenants) if self.zipf is None else arrivals.zipf(self.tenants, self.zipf, random)
        )
        most = self.requests
        if self.trace is None:
            demands = self._made_up()
            most = most or _DEFAULT_REQUESTS
        else:
            demands = trace.read(self.trace, speed=self.speed, repeat=self.repeat)
        return islice(arrivals.assign(demands, tenant, self.max_tokens), most)

    def setup(self, policy: PolicyName) -> Setup:
        """Raises ScenarioError, CostError."""
        try:
            limits = Limits(self.max_running, self.max_batch_tokens, self.max_model_len)
        except ValueError as error:
            raise ScenarioError(str(error)) from None
        return Setup(
            policy=policy,
            cost=models.load(self.cost),
            limits=limits,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            weights=self.weights,
            prefix_tokens=self.prefix_tokens,
            itl_target_s=None if self.itl_target_ms is None else self.itl_target_ms / 1000,
        )

    def _made_up(self) -> Iterator[Demand]:
        rates = _rates(self.rate)
        random = self._random("times")

        def pattern(rate: float) -> Iterator[float]:
            return synthetic.poisson(rate, random) if self.pattern == "poisson" else synthetic.constant(rate)

        try:
            prompt = synthetic.lengths(self.prompt, self._random("prompts"))
            output = synthetic.lengths(self.output, self._random("outputs"))
        except ValueError as error:
            raise ScenarioError(str(error)) from None
        times = pattern(rates[0]) if len(rates) == 1 else synthetic.shifting(rates, self.period, pattern)
        return synthetic.demands(times, prompt, output)

    def _random(self, purpose: str) -> Random:
        """A generator of its own for each purpose, so that changing one thing leaves the others as they were."""
        return Random(f"{self.seed} {purpose}")  # noqa: S311 - nothing secret


def _rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if not any(rates) or not all(0 <= rate < math.inf for rate in rates):
        raise ScenarioError(
            f"--rate {text} must be requests per second, such as 2.5, or several that follow each other: 2,0"
        )
    return rates
