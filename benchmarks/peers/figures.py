"""What is measured of peers: a row for each, and for each length of the workload."""

import statistics
from typing import Self

import msgspec

from benchmarks.peers.catalogue import OURS
from benchmarks.peers.job import Item
from benchmarks.peers.rounds import Entry


class Spread(msgspec.Struct, frozen=True):
    """Of all rounds."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: list[float]) -> Self:
        """Raises StatisticsError when there are none."""
        return cls(statistics.median(values), min(values), max(values))


class PeerFigures(msgspec.Struct, frozen=True):
    """``shortened``: what every output's length was divided by.

    ``beside``: the one of ours that ran on the same requests, and ``ours_over`` its median tokens/s over this one's.
    ``equal_requests``: those with the same greedy tokens as ours in float32. Where there is an ``error``, figures are of
    the rounds before it, if any.
    """

    name: str
    title: str
    shortened: int
    requests: int
    prompt_tokens: int
    output_tokens: int
    beside: str
    versions: dict[str, str]
    seconds: list[float]
    output_tokens_per_s: Spread | None
    ours_over: float | None
    equal_requests: int | None
    error: str | None


class PeersFigures(msgspec.Struct, frozen=True):
    """``threads`` and ``max_running`` are everybody's."""

    cpu: str
    threads: int
    max_running: int
    rounds: int
    peers: list[PeerFigures]


def summarize(entries: list[Entry]) -> list[PeerFigures]:
    ran = {(entry.name, entry.shortened): entry for entry in entries if entry.answers}
    return [
        _figures(entry, ran.get((OURS, entry.shortened)), ran.get((entry.peer.beside, entry.shortened)))
        for entry in entries
    ]


def _figures(entry: Entry, ours: Entry | None, beside: Entry | None) -> PeerFigures:
    items, answers = entry.job.items, entry.answers
    rate = Spread.of(_rates(entry)) if answers else None
    return PeerFigures(
        name=entry.name,
        title=entry.peer.title,
        shortened=entry.shortened,
        requests=len(items),
        prompt_tokens=sum(len(item.prompt_token_ids) for item in items),
        output_tokens=_output_tokens(items),
        beside=entry.peer.beside,
        versions=answers[0].versions if answers else {},
        seconds=[answer.seconds for answer in answers],
        output_tokens_per_s=rate,
        ours_over=Spread.of(_rates(beside)).median / rate.median if beside and rate else None,
        equal_requests=_equal(entry, ours) if answers and ours else None,
        error=entry.error,
    )


def _output_tokens(items: list[Item]) -> int:
    return sum(item.max_tokens for item in items)


def _rates(entry: Entry) -> list[float]:
    return [_output_tokens(entry.job.items) / answer.seconds for answer in entry.answers]


def _equal(entry: Entry, ours: Entry) -> int:
    theirs, expected = entry.answers[0].outputs, ours.answers[0].outputs
    return sum(theirs[id].token_ids == output.token_ids for id, output in expected.items())
