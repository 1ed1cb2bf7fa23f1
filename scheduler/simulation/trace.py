"""Public trace files: ``TIMESTAMP,ContextTokens,GeneratedTokens``, as the Azure LLM inference traces of 2023 have them.

P. Patel et al., "Splitwise: Efficient Generative LLM Inference Using Phase Splitting", ISCA'24.
"""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from scheduler.simulation.arrivals import Demand

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"


class TraceError(ValueError):
    """A line that can't be used; the text names file, line and reason."""


def read(path: Path, *, speed: float = 1.0, repeat: int = 1) -> Iterator[Demand]:
    """Its requests, ``speed`` times as fast as they came, the whole file ``repeat`` times over.

    The first is at 0 s. A repetition begins after the last request, by the mean time between two. Raises TraceError, OSError.
    """
    start = 0.0
    for _ in range(repeat):
        at, count = start, 0
        for seconds, prompt, output in _requests(path):
            at, count = start + seconds / speed, count + 1
            yield at, prompt, output
        if count:
            start = at + (at - start) / max(count - 1, 1)


def _requests(path: Path) -> Iterator[Demand]:
    begun = None
    last = 0.0
    with path.open(encoding="utf-8", errors="replace") as lines:
        if next(lines, "").strip() != HEADER:
            raise TraceError(f"{path}, line 1: must be {HEADER}")
        for number, line in enumerate(lines, start=2):
            if not line.strip():
                continue
            try:
                time, prompt, output = _parse(line)
                begun = begun or time
                seconds = (time - begun).total_seconds()
                if seconds < last:
                    raise ValueError(f"{time} is before the line above it")  # noqa: TRY301 - it needs the line's number
            except (ValueError, TypeError) as error:
                raise TraceError(f"{path}, line {number}: {error}") from None
            last = seconds
            yield seconds, prompt, output


def _parse(line: str) -> tuple[datetime, int, int]:
    fields = line.strip().split(",")
    if len(fields) != HEADER.count(",") + 1:
        raise ValueError(f"{len(fields)} fields instead of {HEADER.count(',') + 1}")
    prompt, output = int(fields[1]), int(fields[2])
    if prompt < 1 or output < 1:
        raise ValueError(f"a request has at least one token in and one out, not {prompt} and {output}")
    return datetime.fromisoformat(fields[0]), prompt, output
