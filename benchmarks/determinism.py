"""Whether a request's tokens depend on anything but itself: the same requests alone, and in every circumstance that could matter.

Half of them are greedy, half are drawn with seeds. Each condition has a service of its own, asked over MQTT; what it says is
compared with what it said to each request alone, with the same weights. Beside tokens, log probabilities are compared to
the last bit: where those are equal, equal tokens are no luck.
"""

import asyncio
import os
import random
import signal
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import msgspec

from benchmarks import cli, engine, process
from benchmarks.live import serving
from benchmarks.workload import WorkItem, Workload
from protocol.client import Client
from protocol.openai import EmbeddingList, TextLogprobs
from protocol.plan import NGRAM, WeightsName
from protocol.request import Request
from scheduler.config import Config, EngineConfig, ModelConfig
from scheduler.mqtt.broker import EmbeddedBroker
from scheduler.service import Service

#: Prompt tokens that four requests after each other have in common.
_SHARED_TOKENS = 48
_SAMPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.05, "presence_penalty": 0.5},
    {"temperature": 0.7, "typical_p": 0.9, "repetition_penalty": 1.1},
]
_ACCEPT_S = 120.0
_SERVICE_KILLED = "service killed"
#: Their names, in the order of the table.
CONDITIONS = ("batch", "preempted", "worker killed", "prefix cache", "speculation", _SERVICE_KILLED)

WayName = Literal["packed", "packed-invariant", "plain", "plain-invariant"]
#: Weights, and whether `engine.batch_invariant` is on.
WAYS: dict[WayName, tuple[WeightsName, bool]] = {
    "packed": ("auto", False),
    "packed-invariant": ("auto", True),
    "plain": ("plain", False),
    "plain-invariant": ("plain", True),
}


class ConditionFigures(msgspec.Struct, frozen=True):
    """Of the greedy and the sampled requests, how many had the tokens that they have alone; of all, how many had the same log
    probabilities, in every bit: None where they were told none. ``happened``: how often what the condition is about did."""

    condition: str
    greedy: int
    sampled: int
    bits: int | None
    happened: int


class WayFigures(msgspec.Struct, frozen=True):
    """``output_tokens_per_s``: of the engine with all requests at once, the median of its rounds."""

    way: WayName
    output_tokens_per_s: float
    conditions: list[ConditionFigures]


class DeterminismFigures(msgspec.Struct, frozen=True):
    greedy: int
    sampled: int
    prompt_tokens: int
    output_tokens: int
    rounds: int
    ways: list[WayFigures]


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    tokens: int
    logprobs: list[float] | None
    attempt: int


Answers = dict[str, Answer]


@dataclass(slots=True)
class Watch:
    """Looks on while a service answers: the most that ran ``at_once``. With ``kill`` it kills the worker after so many chunks."""

    service: Service
    kill: int | None = None
    at_once: int = 0
    _chunks: int = 0

    def see(self) -> None:
        self._chunks += 1
        self.at_once = max(self.at_once, len(self.service.engine.batcher.running))
        if self._chunks == self.kill:
            os.kill(self.service.engine.worker_pid, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Condition:
    """``engine``: settings of it; ``scored``: whether log probabilities are asked for, with which nothing is drafted."""

    name: str
    happened: Callable[[Watch], int]
    engine: dict[str, Any] = field(default_factory=dict)
    kills_worker: bool = False
    scored: bool = True


def _accepted_drafts(watch: Watch) -> int:
    samples = (sample for metric in watch.service.metrics.accepted_drafts.collect() for sample in metric.samples)
    return int(sum(sample.value for sample in samples if sample.name.endswith("_sum")))


def _prompt(request: Request) -> list[int]:
    assert isinstance(request.prompt, list), "token ids, as `requests` makes them"
    return request.prompt


def _few_blocks(asked: dict[str, Request], block_size: int) -> int:
    """A quarter of what all of them need together, but enough for each."""
    blocks = [-(-(len(_prompt(request)) + (request.max_tokens or 0)) // block_size) for request in asked.values()]
    return max(*blocks, sum(blocks) // 4) + 1


def conditions(asked: dict[str, Request], block_size: int) -> list[Condition]:
    """But for being alone, and for the death of the whole service."""
    return [
        Condition("batch", lambda watch: watch.at_once),
        Condition(
            "preempted",
            lambda watch: watch.service.engine.batcher.counters.preemptions,
            {"num_blocks": _few_blocks(asked, block_size)},
        ),
        Condition("worker killed", lambda watch: watch.service.engine.worker_restarts, kills_worker=True),
        Condition(
            "prefix cache", lambda watch: watch.service.engine.batcher.counters.cached_tokens, {"prefix_cache": True}
        ),
        # As if tokens were cheap, for so many decodes leave no room for drafts.
        Condition(
            "speculation", _accepted_drafts, {"speculation": NGRAM, "cheap_tokens": 8 * len(asked)}, scored=False
        ),
    ]


def requests(count: int, output_tokens: int, vocab: int) -> dict[str, Request]:
    """Every other one is sampled. Each repeats itself, so that there is something to draft."""
    draw = random.Random(7)

    def tokens(number: int) -> list[int]:
        return [draw.randrange(vocab // 100 + 3, vocab) for _ in range(number)]

    made, beginning = {}, []
    for number in range(count):
        if number % 4 == 0:
            beginning = tokens(_SHARED_TOKENS)
        sampling = _SAMPLED[number // 2 % len(_SAMPLED)] if number % 2 else {"temperature": 0.0}
        made[f"r{number}"] = Request(
            prompt=[*beginning, *tokens(draw.randint(4, 12)) * draw.randint(1, 8)],
            max_tokens=output_tokens,
            ignore_eos=True,
            seed=number,
            stream=True,
            **sampling,
        )
    return made


async def _ask(client: Client, model: str, id: str, request: Request, see: Callable[[], None]) -> Answer:
    stream = client.stream(request, model=model, request_id=id)
    async for _ in stream:
        see()
    result = stream.result
    assert not isinstance(result.data, EmbeddingList)
    scores = result.data.choices[0].logprobs
    logprobs = scores.token_logprobs if isinstance(scores, TextLogprobs) else None
    return Answer(result.text, result.usage.completion_tokens, logprobs, result.attempt)


async def _ask_all(client: Client, model: str, asked: dict[str, Request], see: Callable[[], None]) -> Answers:
    async with asyncio.TaskGroup() as group:
        tasks = {id: group.create_task(_ask(client, model, id, request, see), name=id) for id, request in asked.items()}
    return {id: task.result() for id, task in tasks.items()}


def _scored(asked: dict[str, Request]) -> dict[str, Request]:
    return {id: msgspec.structs.replace(request, logprobs=0) for id, request in asked.items()}


async def _alone(asked: dict[str, Request], settings: Config) -> Answers:
    async with serving(settings) as running, Client(running.broker_url, tenant="one") as client:
        watch = Watch(running)
        answers = {
            id: await _ask(client, settings.model.alias, id, request, watch.see)
            for id, request in _scored(asked).items()
        }
    if watch.at_once > 1:
        raise RuntimeError(f"{watch.at_once} requests ran at once, of those that were to be alone")
    return answers


async def _under(condition: Condition, asked: dict[str, Request], settings: Config) -> tuple[Answers, int]:
    """The answers, and how often it happened."""
    settings = msgspec.structs.replace(settings, engine=msgspec.structs.replace(settings.engine, **condition.engine))
    async with serving(settings) as running, Client(running.broker_url, tenant="one") as client:
        watch = Watch(running, kill=2 * len(asked) if condition.kills_worker else None)
        answers = await _ask_all(client, settings.model.alias, _scored(asked) if condition.scored else asked, watch.see)
        return answers, condition.happened(watch)


async def _service_killed(asked: dict[str, Request], settings: Config) -> tuple[Answers, int]:
    """The answers that two processes gave, one after the other, and how many of them both had a part in."""
    seen, enough = 0, asyncio.Event()

    def see() -> None:
        nonlocal seen
        seen += 1
        if seen >= 2 * len(asked):
            enough.set()

    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "service"
        own.mkdir()
        async with (
            EmbeddedBroker(data_dir=Path(folder) / "broker") as broker,
            Client(broker.url, tenant="one", accept_timeout_s=_ACCEPT_S) as client,
            asyncio.TaskGroup() as group,
        ):
            async with process.serving(own, broker.url, _flags(settings)):
                asking = group.create_task(_ask_all(client, settings.model.alias, _scored(asked), see), name="asking")
                await enough.wait()
            async with process.serving(own, broker.url, _flags(settings)):
                answers = await asking
    return answers, sum(answer.attempt > 1 for answer in answers.values())


def _flags(settings: Config) -> dict[str, object]:
    """What isn't at its default in the sections of model and engine."""
    default = Config()
    return {
        f"{section}.{name}": value
        for section in ("model", "engine")
        for name, value in msgspec.structs.asdict(getattr(settings, section)).items()
        if value != getattr(getattr(default, section), name)
    }


def _compare(name: str, asked: dict[str, Request], alone: Answers, answers: Answers, happened: int) -> ConditionFigures:
    equal = {id for id, answer in answers.items() if (answer.text, answer.tokens) == (alone[id].text, alone[id].tokens)}
    scored = [id for id, answer in answers.items() if answer.logprobs is not None]
    return ConditionFigures(
        condition=name,
        greedy=sum(asked[id].temperature == 0 for id in equal),
        sampled=sum(asked[id].temperature != 0 for id in equal),
        bits=sum(answers[id].logprobs == alone[id].logprobs for id in scored) if scored else None,
        happened=happened,
    )


async def matrix(asked: dict[str, Request], settings: Config, chosen: tuple[str, ...]) -> list[ConditionFigures]:
    """All ``chosen`` conditions, or every one, with these settings."""
    alone = await _alone(asked, settings)
    figures = []
    for condition in conditions(asked, settings.engine.block_size):
        if not chosen or condition.name in chosen:
            answers, happened = await _under(condition, asked, settings)
            figures.append(_compare(condition.name, asked, alone, answers, happened))
    if not chosen or _SERVICE_KILLED in chosen:
        answers, happened = await _service_killed(asked, settings)
        figures.append(_compare(_SERVICE_KILLED, asked, alone, answers, happened))
    return figures


async def _rates(asked: dict[str, Request], ways: dict[WayName, Config], rounds: int) -> dict[WayName, float]:
    """Output tokens/s of the bare engine, the ways in turn."""
    work = Workload(
        [WorkItem(number, _prompt(request), request.max_tokens or 1) for number, request in enumerate(asked.values())]
    )
    rates: dict[WayName, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way in list(ways) if number % 2 else reversed(ways):
            rates[way].append((await engine.run(work, ways[way].worker())).output_tokens_per_s)
    return {way: statistics.median(each) for way, each in rates.items()}


def _settings(model: str, running: int, way: WayName) -> Config:
    weights, batch_invariant = WAYS[way]
    return Config(
        model=ModelConfig(path=model, weights=weights),
        engine=EngineConfig(max_running=running, prefix_cache=False, batch_invariant=batch_invariant),
    )


async def run(
    asked: dict[str, Request], ways: dict[WayName, Config], chosen: tuple[str, ...], rounds: int
) -> DeterminismFigures:
    rates = await _rates(asked, ways, rounds)
    greedy = sum(request.temperature == 0 for request in asked.values())
    return DeterminismFigures(
        greedy=greedy,
        sampled=len(asked) - greedy,
        prompt_tokens=sum(len(_prompt(request)) for request in asked.values()),
        output_tokens=sum(request.max_tokens or 0 for request in asked.values()),
        rounds=rounds,
        ways=[WayFigures(way, rates[way], await matrix(asked, settings, chosen)) for way, settings in ways.items()],
    )


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model.")
@click.option(
    "--requests", "count", default=32, show_default=True, help="Half of them greedy; all at once but when alone."
)
@click.option("--output-tokens", default=32, show_default=True, help="Of each request.")
@click.option("--vocab", default=49152, show_default=True, help="Prompts are drawn from token ids below this.")
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="[default: all]")
@click.option("--condition", "chosen", multiple=True, type=click.Choice(CONDITIONS), help="[default: all]")
@click.option("--rounds", default=3, show_default=True, help="In which the ways' speeds are compared.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    model: str,
    count: int,
    output_tokens: int,
    vocab: int,
    ways: tuple[WayName, ...],
    chosen: tuple[str, ...],
    rounds: int,
    as_json: bool,
) -> None:
    """The same requests in every circumstance: how many get the same tokens."""
    settings = {way: _settings(model, count, way) for way in ways or WAYS}
    cli.show(asyncio.run(run(requests(count, output_tokens, vocab), settings, chosen, rounds)), as_json)


if __name__ == "__main__":
    main()
