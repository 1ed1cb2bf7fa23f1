"""What drafts are worth on texts that repeat their prompts: one text at a time and a full batch, with speculation and without.

The texts are this project's own modules, to be written again with a change or to be summed up. Each way decodes greedily to the
model's own end, so both must write the same tokens.
"""

import asyncio
import statistics
from pathlib import Path
from typing import get_args

import click
import msgspec

import protocol
import scheduler.core
from benchmarks import cli
from benchmarks.engine import EngineFigures, record
from benchmarks.workload import WorkItem, Workload, config
from protocol.plan import NGRAM, WeightsName
from protocol.request import Message, Request
from scheduler.chat import Chat
from scheduler.config import OFF, Config
from scheduler.loop import StepReport
from workers.model import path_of

_FOLDERS = (Path(protocol.__file__).parent, Path(scheduler.core.__file__).parent)
_LINES = 24
_TASKS = (
    "Write this Python code again, with `self` renamed to `this`:\n\n{text}",
    "Sum up what this Python code does, quoting the most important lines:\n\n{text}",
)


class WayFigures(msgspec.Struct, frozen=True):
    """One run: ``acceptance`` is the share of drafted tokens that were right."""

    steps: int
    output_tokens: int
    output_tokens_per_s: float
    drafted_tokens: int
    acceptance: float


class BatchFigures(msgspec.Struct, frozen=True):
    """At most ``batch`` sequences at once. The ratios are medians over the rounds: steps without speculation over steps with it,
    output tokens/s with it over without. ``off`` and ``on``: of the round whose rate ratio is the median."""

    batch: int
    requests: int
    off: WayFigures
    on: WayFigures
    step_ratio: float
    rate_ratio: float
    same_tokens: bool


class SpeculationFigures(msgspec.Struct, frozen=True):
    speculation: str
    rounds: int
    batches: list[BatchFigures]


def texts(count: int) -> list[str]:
    """So many questions, each about another part of the project's modules."""
    modules = sorted(path for folder in _FOLDERS for path in folder.glob("*.py"))
    lines = [line for module in modules for line in module.read_text().splitlines()]
    parts = ["\n".join(lines[start : start + _LINES]) for start in range(0, len(lines) - _LINES, _LINES)]
    chosen = parts[:: max(len(parts) // count, 1)][:count]
    return [_TASKS[number % len(_TASKS)].format(text=part) for number, part in enumerate(chosen)]


def workload(chat: Chat, count: int, output_tokens: int) -> Workload:
    prompts = [chat.prompt_tokens(Request(messages=[Message("user", each)])) for each in texts(count)]
    return Workload(
        [WorkItem(number, prompt, output_tokens, ignore_eos=False) for number, prompt in enumerate(prompts)]
    )


async def _run(work: Workload, settings: Config) -> tuple[EngineFigures, WayFigures]:
    figures, reports = await record(work, settings.worker(), speculation=settings.speculation())
    return figures, _way(figures, reports)


def _way(figures: EngineFigures, reports: list[StepReport]) -> WayFigures:
    accepted, rejected = sum(sum(report.accepted) for report in reports), reports[-1].rejected_tokens
    return WayFigures(
        steps=figures.steps,
        output_tokens=figures.output_tokens,
        output_tokens_per_s=figures.output_tokens_per_s,
        drafted_tokens=accepted + rejected,
        acceptance=accepted / max(accepted + rejected, 1),
    )


async def measure(work: Workload, settings: Config, rounds: int) -> BatchFigures:
    """Both ways in turn, who goes first changing."""
    plain = msgspec.structs.replace(settings, engine=msgspec.structs.replace(settings.engine, speculation=OFF))
    pairs, same = [], True
    for number in range(rounds):
        order = (plain, settings) if number % 2 == 0 else (settings, plain)
        runs = {way.engine.speculation: await _run(work, way) for way in order}
        (off_run, off), (on_run, on) = runs[OFF], runs[settings.engine.speculation]
        same &= off_run.token_ids == on_run.token_ids
        pairs.append((off, on))
    pairs.sort(key=lambda pair: pair[1].output_tokens_per_s / pair[0].output_tokens_per_s)
    off, on = pairs[len(pairs) // 2]
    return BatchFigures(
        batch=settings.engine.max_running,
        requests=len(work.requests),
        off=off,
        on=on,
        step_ratio=statistics.median(off.steps / on.steps for off, on in pairs),
        rate_ratio=statistics.median(on.output_tokens_per_s / off.output_tokens_per_s for off, on in pairs),
        same_tokens=same,
    )


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--weights", default="auto", show_default=True, type=click.Choice(get_args(WeightsName)))
@click.option("--speculation", default=NGRAM, show_default=True, help="`ngram`, or the directory of a draft model.")
@click.option("--max-draft", default=7, show_default=True)
@click.option("--cheap-tokens", default=16, show_default=True)
@click.option("--batch", "batches", default=(1, 32), show_default=True, multiple=True, help="Sequences at once.")
@click.option("--single", default=8, show_default=True, help="Requests one after the other, at batch 1.")
@click.option("--output-tokens", default=160, show_default=True, help="At most, of each request.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(
    model: str,
    weights: WeightsName,
    speculation: str,
    max_draft: int,
    cheap_tokens: int,
    batches: tuple[int, ...],
    single: int,
    output_tokens: int,
    rounds: int,
    as_json: bool,
) -> None:
    """Texts that repeat their prompts, with drafts and without."""
    chat = Chat(str(path_of(model)))
    cases = []
    for batch in batches:
        settings = config(model, batch, 256)
        settings = msgspec.structs.replace(
            settings,
            model=msgspec.structs.replace(settings.model, weights=weights),
            engine=msgspec.structs.replace(
                settings.engine, speculation=speculation, max_draft=max_draft, cheap_tokens=cheap_tokens
            ),
        )
        work = workload(chat, single if batch == 1 else batch, output_tokens)
        cases.append(asyncio.run(measure(work, settings, rounds)))
    cli.show(SpeculationFigures(speculation, rounds, cases), as_json)


if __name__ == "__main__":
    main()
