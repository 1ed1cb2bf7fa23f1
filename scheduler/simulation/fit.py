"""A cost model from measured steps: the non-negative least squares, and how well it tells steps that it hasn't seen."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from protocol.plan import Work
from scheduler.simulation.cost import CostError, CostModel, Quality

#: Every so many steps, one is kept to judge by.
_HELD_OUT = 5
_TERMS = ("step_s", "row_s", "token_s", "context_s", "attended_s")

Matrix = NDArray[np.float64]


class TracedStep(msgspec.Struct, frozen=True):
    """A line that ``tokenbus bench engine --trace FILE`` wrote; ``seconds``: the worker's; ``gap_s``: the iteration's rest."""

    work: Work
    prefill_tokens: int
    decode_tokens: int
    seconds: float
    gap_s: float


def read(paths: Iterable[Path]) -> list[TracedStep]:
    """Raises CostError, OSError."""
    steps: list[TracedStep] = []
    decoder = msgspec.json.Decoder(TracedStep)
    for path in paths:
        try:
            steps += decoder.decode_lines(path.read_bytes())
        except msgspec.DecodeError as error:
            raise CostError(f"{path} holds no steps: {error}") from None
    return steps


def fit(steps: Sequence[TracedStep], *, name: str, origin: str) -> CostModel:
    """Fitted to four steps of five, judged by the others. Raises CostError when there are too few."""
    if len(steps) < 2 * _HELD_OUT * len(_TERMS):
        raise CostError(
            f"{len(steps)} steps are too few to fit {len(_TERMS)} terms: {2 * _HELD_OUT * len(_TERMS)} at least"
        )
    terms = np.array([[1, *msgspec.structs.astuple(step.work)] for step in steps], dtype=float)
    seconds = np.array([step.seconds + step.gap_s for step in steps])
    held_out = np.arange(len(steps)) % _HELD_OUT == _HELD_OUT - 1
    factors = _non_negative(terms[~held_out], seconds[~held_out])
    quality = _judge(terms[held_out] @ factors, seconds[held_out], len(steps))
    coefficients: dict[str, Any] = dict(zip(_TERMS, factors.tolist(), strict=True))
    return CostModel(name=name, origin=origin, quality=quality, **coefficients)


def _non_negative(terms: Matrix, seconds: Matrix) -> Matrix:
    """The best fit without negative factors is the best plain one on some of the terms, so with five of them: try all."""
    best, least = np.zeros(terms.shape[1]), np.inf
    for count in range(1, terms.shape[1] + 1):
        for chosen in map(list, combinations(range(terms.shape[1]), count)):
            scale = terms[:, chosen].max(axis=0)
            factors, *_ = np.linalg.lstsq(terms[:, chosen] / scale, seconds, rcond=None)
            error = float(np.square(terms[:, chosen] / scale @ factors - seconds).sum())
            if error < least and (factors >= 0).all():
                best, least = np.zeros(terms.shape[1]), error
                best[chosen] = factors / scale
    return best


def _judge(told: Matrix, measured: Matrix, steps: int) -> Quality:
    errors = np.abs(told - measured) / measured
    return Quality(
        steps=steps,
        held_out=len(measured),
        r_squared=1 - float(np.square(told - measured).sum() / np.square(measured - measured.mean()).sum()),
        median_error=float(np.median(errors)),
        p95_error=float(np.quantile(errors, 0.95)),
        total_error=float(told.sum() / measured.sum() - 1),
    )
