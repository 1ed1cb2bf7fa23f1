"""A workload file: ``{"requests": [{"id": 0, "prompt_token_ids": [...], "max_tokens": 83, "ignore_eos": true}, …]}``.

``python -m benchmarks.workload FILE`` writes a made-up one.
"""

import random
from pathlib import Path

import click
import msgspec

from scheduler.config import Config, EngineConfig, ModelConfig
from scheduler.core.sequence import Sequence


class WorkItem(msgspec.Struct, frozen=True):
    """One request, decoded greedily, through an ``adapter`` if one is named."""

    id: int
    prompt_token_ids: list[int]
    max_tokens: int
    ignore_eos: bool = True
    adapter: str = ""


class Workload(msgspec.Struct, frozen=True):
    """All are submitted at once."""

    requests: list[WorkItem]

    def first(self, count: int | None) -> "Workload":
        return self if count is None else Workload(self.requests[:count])

    @property
    def output_tokens(self) -> int:
        return sum(item.max_tokens for item in self.requests)


def load(path: Path) -> Workload:
    """Raises msgspec.DecodeError, or OSError."""
    return msgspec.json.decode(path.read_bytes(), type=Workload)


def mixed(count: int, *, prompt: tuple[int, int], output: tuple[int, int], seed: int, vocab: int = 49152) -> Workload:
    """Random prompts, lengths uniform within both bounds."""
    draw = random.Random(seed)
    return Workload(
        [
            WorkItem(
                id=index,
                prompt_token_ids=[draw.randrange(vocab // 100, vocab) for _ in range(draw.randint(*prompt))],
                max_tokens=draw.randint(*output),
            )
            for index in range(count)
        ]
    )


def sequence(item: WorkItem, eos_ids: list[int]) -> Sequence:
    stop = frozenset(() if item.ignore_eos else eos_ids)
    return Sequence(
        str(item.id), item.prompt_token_ids, max_tokens=item.max_tokens, stop_ids=stop, adapter=item.adapter
    )


def config(model: str, max_running: int, max_batch_tokens: int) -> Config:
    return Config(
        model=ModelConfig(path=model),
        engine=EngineConfig(max_running=max_running, max_batch_tokens=max_batch_tokens),
    )


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--count", default=24, show_default=True)
@click.option(
    "--prompt", nargs=2, type=int, default=(16, 1000), show_default=True, help="Tokens, shortest and longest."
)
@click.option("--output", nargs=2, type=int, default=(16, 200), show_default=True, help="Tokens, shortest and longest.")
@click.option("--seed", default=1, show_default=True)
def main(file: Path, count: int, prompt: tuple[int, int], output: tuple[int, int], seed: int) -> None:
    """Write a workload of random tokens to FILE."""
    file.write_bytes(msgspec.json.encode(mixed(count, prompt=prompt, output=output, seed=seed)))


if __name__ == "__main__":
    main()
