"""What a peer's process is asked and what it answers. Its environment holds the peer and msgspec, so nothing else is imported."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path

import msgspec


class Item(msgspec.Struct, frozen=True):
    """One request, decoded greedily to exactly ``max_tokens``, whatever tokens they are."""

    id: int
    prompt_token_ids: list[int]
    max_tokens: int


class Job(msgspec.Struct, frozen=True):
    """All ``items`` are there at once, and at most ``max_running`` are computed at a time.

    ``model``: a directory of safetensors, or a GGUF file. ``options`` are for the peer's driver, ``distributions`` are
    whose versions are asked for.
    """

    model: str
    threads: int
    max_running: int
    items: list[Item]
    warmup: list[Item] = []
    options: dict[str, str] = {}
    distributions: list[str] = []

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(item.prompt_token_ids) + item.max_tokens for item in [*self.warmup, *self.items])


class Output(msgspec.Struct, frozen=True):
    """``prompt_tokens`` as the peer counted them."""

    prompt_tokens: int
    token_ids: list[int]


class Answer(msgspec.Struct, frozen=True):
    """``seconds``: from handing over the first item to having the last token. ``outputs`` by item."""

    seconds: float
    outputs: dict[int, Output]
    versions: dict[str, str] = {}


Generate = Callable[[list[Item]], dict[int, Output]]


def answer(loaded: Callable[[Job], AbstractContextManager[Generate]]) -> None:
    """A driver's main: load, warm up, time the job's items alone. Job and answer are files, for engines write to stdout."""
    job_file, answer_file = map(Path, sys.argv[1:])
    job = msgspec.json.decode(job_file.read_bytes(), type=Job)
    with loaded(job) as generate:
        generate(job.warmup)
        begun = time.perf_counter()
        outputs = generate(job.items)
        seconds = time.perf_counter() - begun
    versions = {name: version(name) for name in job.distributions}
    answer_file.write_bytes(msgspec.json.encode(Answer(seconds, outputs, versions)))
