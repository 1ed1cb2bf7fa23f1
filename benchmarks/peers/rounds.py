"""Alternating rounds: everybody in turn, backwards every other round; who failed once is not run again."""

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from benchmarks.peers.catalogue import OURS, Peer
from benchmarks.peers.failure import PeerFailed
from benchmarks.peers.job import Answer, Item, Job

_WARMUP_REQUESTS = 4
_WARMUP_TOKENS = 4


@dataclass(slots=True)
class Entry:
    """One peer on one length of the workload, and what came of it."""

    name: str
    peer: Peer
    job: Job
    shortened: int
    answers: list[Answer] = field(default_factory=list)
    error: str | None = None


def entries(peers: dict[str, Peer], wanted: list[str], job: Job, shortened: dict[str, int]) -> list[Entry]:
    """The wanted peers and, on every length of the workload, those of ours that they are compared with."""
    pairs = dict.fromkeys(
        (name, shortened.get(wish, 1)) for wish in wanted for name in (OURS, peers[wish].beside, wish)
    )
    return [Entry(name, peers[name], _shorten(job, divisor), divisor) for name, divisor in pairs]


def measure(entries: list[Entry], rounds: int, watch: Callable[[str], None]) -> None:
    """Install all, then run all, round by round. ``watch`` is told what comes next."""
    for entry in entries:
        watch(f"installing {entry.name}")
        _attempt(entry, _install)
    for number in range(rounds):
        for entry in entries[:: -1 if number % 2 else 1]:
            watch(f"round {number + 1} of {rounds}: {entry.name}")
            _attempt(entry, _run)


def _attempt(entry: Entry, do: Callable[[Entry], None]) -> None:
    if entry.error is not None:
        return
    try:
        do(entry)
    except PeerFailed as error:
        entry.error = str(error)


def _install(entry: Entry) -> None:
    entry.peer.engine.install()


def _run(entry: Entry) -> None:
    answer = entry.peer.engine.run(entry.job)
    check(entry.job.items, answer)
    entry.answers.append(answer)


def check(items: list[Item], answer: Answer) -> None:
    """Whether all prompts were read and all outputs written to their full length. Raises PeerFailed."""
    wanted = {item.id: (len(item.prompt_token_ids), item.max_tokens) for item in items}
    done = {id: (output.prompt_tokens, len(output.token_ids)) for id, output in answer.outputs.items()}
    differing = [id for id in wanted.keys() | done.keys() if wanted.get(id) != done.get(id)]
    if differing:
        id = min(differing)
        raise PeerFailed(
            f"did other work on {len(differing)} of {len(items)} requests; of request {id} (prompt, output) tokens are "
            f"{done.get(id)}, not {wanted.get(id)}"
        )


def _shorten(job: Job, divisor: int) -> Job:
    """The same prompts, outputs of a ``divisor``-th, and a warm-up whose prompts no prefix cache will know again."""
    items = [Item(item.id, item.prompt_token_ids, max(1, item.max_tokens // divisor)) for item in job.items]
    warmup = [
        Item(item.id, item.prompt_token_ids[::-1], min(item.max_tokens, _WARMUP_TOKENS))
        for item in items[:_WARMUP_REQUESTS]
    ]
    return msgspec.structs.replace(job, items=items, warmup=warmup)
