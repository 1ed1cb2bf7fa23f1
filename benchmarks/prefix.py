"""What the prefix cache is worth, live: a burst of requests that share a system prompt, with the cache and without; and that
another tenant finds nothing of it.

Prompts are random token ids, so that nothing is alike by accident. Computed prompt tokens are the service's own count.
"""

import asyncio
import random
import statistics

import click
import msgspec

from benchmarks import cli, live
from benchmarks.live import serving
from benchmarks.serve import ask, ask_all
from benchmarks.workload import WorkItem, Workload
from protocol.client import Client
from scheduler.config import Config, EngineConfig, ModelConfig
from scheduler.service import Service
from scheduler.simulation.figures import Percentiles

_BLOCK_SIZE = 16


class Burst(msgspec.Struct, frozen=True):
    """``requests`` of one tenant at once: the same ``shared_tokens``, then ``own_tokens`` of their own."""

    requests: int
    shared_tokens: int
    own_tokens: int
    output_tokens: int
    vocab: int

    @property
    def prompt_tokens(self) -> int:
        return self.shared_tokens + self.own_tokens

    @property
    def num_blocks(self) -> int:
        """KV blocks for all of them at once without any sharing, and the one more each that admission leaves free."""
        return self.requests * (-(-(self.prompt_tokens + self.output_tokens) // _BLOCK_SIZE) + 1)

    def workload(self, seed: int) -> Workload:
        draw = random.Random(seed)
        shared = self._tokens(draw, self.shared_tokens)
        return Workload(
            [
                WorkItem(number, [*shared, *self._tokens(draw, self.own_tokens)], self.output_tokens)
                for number in range(self.requests)
            ]
        )

    def _tokens(self, draw: random.Random, count: int) -> list[int]:
        return [draw.randrange(self.vocab // 100, self.vocab) for _ in range(count)]


class BurstFigures(msgspec.Struct, frozen=True):
    """One burst on a fresh service."""

    computed_prompt_tokens: int
    ttft_s: Percentiles
    output_tokens_per_s: float


class ProbeFigures(msgspec.Struct, frozen=True):
    """Of a request that is alone; medians over fresh prompts."""

    ttft_s: float
    computed_prompt_tokens: float


class IsolationFigures(msgspec.Struct, frozen=True):
    """``cold``: the first time; ``warm``: the same tenant again; ``other``: another tenant, when the first one's was warm."""

    prompts: int
    prompt_tokens: int
    cold: ProbeFigures
    warm: ProbeFigures
    other: ProbeFigures


class PrefixFigures(msgspec.Struct, frozen=True):
    """The round whose TTFT ratio is the median. ``saved``: the share of prompt tokens that the cache spared; ``ttft_ratio``
    and ``rate_ratio``: TTFT p50 without over with the cache, output tokens/s with over without."""

    burst: Burst
    rounds: int
    cached: BurstFigures
    uncached: BurstFigures
    saved: float
    ttft_ratio: float
    rate_ratio: float
    isolation: IsolationFigures


async def _burst(burst: Burst, settings: Config, seed: int, *, cache: bool) -> BurstFigures:
    engine = msgspec.structs.replace(settings.engine, prefix_cache=cache)
    async with serving(msgspec.structs.replace(settings, engine=engine)) as running:
        answers, seconds = await ask_all(burst.workload(seed), running.broker_url, settings.model.alias, tenants=1)
        return BurstFigures(
            computed_prompt_tokens=live.tokens(running, "prefill"),
            ttft_s=Percentiles.of([answer.ttft_s for answer in answers]),
            output_tokens_per_s=sum(answer.tokens for answer in answers) / seconds,
        )


async def _rounds(burst: Burst, settings: Config, rounds: int) -> tuple[BurstFigures, BurstFigures]:
    """With and without the cache in turn, who goes first changing; the median pair by TTFT."""
    pairs = []
    for seed in range(rounds):
        order = (True, False) if seed % 2 else (False, True)
        figures = {cache: await _burst(burst, settings, seed, cache=cache) for cache in order}
        pairs.append((figures[True], figures[False]))
    pairs.sort(key=lambda pair: pair[1].ttft_s.p50 / pair[0].ttft_s.p50)
    return pairs[len(pairs) // 2]


async def _isolation(burst: Burst, settings: Config, prompts: int) -> IsolationFigures:
    """One request at a time on one service, of two tenants."""
    probes: dict[str, list[tuple[float, int]]] = {"cold": [], "warm": [], "other": []}
    async with (
        serving(settings) as running,
        Client(running.broker_url, tenant="one") as one,
        Client(running.broker_url, tenant="two") as two,
    ):
        for seed in range(prompts):
            item = burst.workload(~seed).requests[0]
            askers = [("warm", one), ("other", two)]
            for name, client in [("cold", one), *(reversed(askers) if seed % 2 else askers)]:
                probes[name].append(await _probe(running, client, item))
    medians = {
        name: ProbeFigures(
            statistics.median(ttft_s for ttft_s, _ in pairs), statistics.median(computed for _, computed in pairs)
        )
        for name, pairs in probes.items()
    }
    return IsolationFigures(prompts, burst.prompt_tokens, **medians)


async def _probe(running: Service, client: Client, item: WorkItem) -> tuple[float, int]:
    """TTFT and computed prompt tokens of a request that is alone."""
    before = live.tokens(running, "prefill")
    answer = await ask(client, item, running.config.model.alias)
    return answer.ttft_s, live.tokens(running, "prefill") - before


async def run(burst: Burst, settings: Config, rounds: int, prompts: int) -> PrefixFigures:
    cached, uncached = await _rounds(burst, settings, rounds)
    return PrefixFigures(
        burst=burst,
        rounds=rounds,
        cached=cached,
        uncached=uncached,
        saved=1 - cached.computed_prompt_tokens / uncached.computed_prompt_tokens,
        ttft_ratio=uncached.ttft_s.p50 / cached.ttft_s.p50,
        rate_ratio=cached.output_tokens_per_s / uncached.output_tokens_per_s,
        isolation=await _isolation(burst, settings, prompts),
    )


@click.command()
@click.option("--requests", default=64, show_default=True)
@click.option("--shared-tokens", default=512, show_default=True, help="Prompt tokens that all have in common.")
@click.option("--own-tokens", default=20, show_default=True, help="Prompt tokens of each request's own.")
@click.option("--output-tokens", default=32, show_default=True)
@click.option("--vocab", default=49152, show_default=True, help="Prompts are drawn from token ids below this.")
@click.option("--rounds", default=3, show_default=True, help="Each with the cache and without, on fresh services.")
@click.option("--prompts", default=9, show_default=True, help="Fresh prompts that another tenant sends too.")
@cli.options
def main(
    requests: int,
    shared_tokens: int,
    own_tokens: int,
    output_tokens: int,
    vocab: int,
    rounds: int,
    prompts: int,
    model: str,
    max_running: int,
    max_batch_tokens: int,
    as_json: bool,
) -> None:
    """A burst with a shared system prompt, with the prefix cache and without; and what another tenant sees of it."""
    burst = Burst(requests, shared_tokens, own_tokens, output_tokens, vocab)
    settings = Config(
        model=ModelConfig(path=model),
        engine=EngineConfig(
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            block_size=_BLOCK_SIZE,
            num_blocks=burst.num_blocks,
        ),
    )
    cli.show(asyncio.run(run(burst, settings, rounds, prompts)), as_json)


if __name__ == "__main__":
    main()
