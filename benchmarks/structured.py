"""Structured output: whether what comes out is of its schema, over a public collection of schemas, and what following one costs.

The collection is JSON-Schema-Test-Suite's, made to find fault with validators; `schemas/LICENSE` says where it is from.
"""

import asyncio
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import jsonschema
import msgspec
from tokenizers import Tokenizer

from benchmarks import cli
from benchmarks.workload import config
from protocol.errors import BadRequest
from protocol.plan import NO_TOKEN, Sampling, WorkerConfig, WorkerInfo
from protocol.request import Request
from protocol.structure import StructuredOutputs
from scheduler.core.batcher import TokenEvent
from scheduler.core.sequence import Sequence
from scheduler.loop import Engine, StepReport
from scheduler.structure import check_grammar, grammar_for

_COLLECTION = Path(__file__).with_name("schemas") / "json-schema-test-suite.json"
#: Goes on for longer than any run.
_ENDLESS = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}, "kind": {"enum": ["bus", "tram"]}},
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}


class StructuredFigures(msgspec.Struct, frozen=True):
    """Of the ``schemas``, ``refused`` ones use what can't be enforced. Of the answers ``cut`` ones reached their limit, and
    ``valid`` ones are of their schema; the ``invalid`` and the ``lost`` are named. Step times are medians of the worker's own, in
    seconds, with every row decoding: ``overhead`` is what the grammars add to them.
    """

    schemas: int
    refused: int
    cut: int
    valid: int
    invalid: list[str]
    lost: list[str]
    rows: int
    free_step_s: float
    structured_step_s: float
    overhead: float


@dataclass(slots=True)
class Output:
    """What was generated for a sequence, without its end token, and how it ended."""

    tokens: list[int] = field(default_factory=list)
    end: Literal["finished", "cut", "lost"] | None = None

    def take(self, event: TokenEvent) -> None:
        if event.finish != "stop":
            self.tokens.append(event.token)
        if event.finish is not None:
            stopped: Literal["finished", "lost"] = "lost" if event.token == NO_TOKEN else "finished"
            self.end = stopped if event.finish == "stop" else "cut"


def read_schemas() -> list[dict[str, Any]]:
    """The collection, about 450 schemas."""
    return [entry["schema"] for entry in json.loads(_COLLECTION.read_bytes())]


def grammar_of(schema: dict[str, Any]) -> str:
    """As a request's would be made. Raises BadRequest for a schema that is refused."""
    request = Request(prompt="x", structured_outputs=StructuredOutputs(json=schema))
    check_grammar(request)
    grammar = grammar_for(request)
    assert grammar is not None
    return grammar


def _grammars(schemas: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Of the schemas that aren't refused, by their number."""
    grammars = {}
    for number, schema in enumerate(schemas):
        try:
            grammars[str(number)] = grammar_of(schema)
        except BadRequest:
            continue
    return grammars


async def _run(engine: Engine, sequences: list[Sequence]) -> tuple[dict[str, Output], list[StepReport]]:
    outputs = {sequence.id: Output() for sequence in sequences}
    unfinished = set(outputs)
    reports = []
    for sequence in sequences:
        engine.submit(sequence)
    while unfinished:
        report = await engine.reports.get()
        reports.append(report)
        for event in report.events:
            outputs[event.id].take(event)
            if event.finish is not None:
                unfinished.remove(event.id)
        if report.given_up:
            raise RuntimeError(f"the worker failed on {len(report.given_up)} sequences")
    return outputs, reports


def _sequence(id: str, info: WorkerInfo, length: int, seed: int, grammar: str | None, *, endless: bool) -> Sequence:
    return Sequence(
        id,
        [1],
        max_tokens=length,
        stop_ids=frozenset(() if endless else (NO_TOKEN, *info.eos_ids)),
        sampling=Sampling(temperature=1.0, seed=seed, grammar=grammar),
    )


async def _step_s(engine: Engine, rows: int, length: int, grammar: str | None) -> float:
    sequences = [_sequence(str(row), engine.info, length, row, grammar, endless=True) for row in range(rows)]
    _, reports = await _run(engine, sequences)
    return statistics.median(report.seconds for report in reports if report.decode_tokens == rows)


async def measure(worker: WorkerConfig, *, limit: int | None, length: int, rounds: int) -> StructuredFigures:
    """Every schema once, then ``rounds`` times ``max_running`` rows without and with a grammar; ``length``: of an answer, in
    tokens, at most."""
    schemas = read_schemas()[:limit]
    grammars = _grammars(schemas)
    async with Engine(worker) as engine:
        loop = asyncio.create_task(engine.run(), name="loop")
        try:
            sequences = [
                _sequence(number, engine.info, length, int(number), grammar, endless=False)
                for number, grammar in grammars.items()
            ]
            outputs, _ = await _run(engine, sequences)
            rows = worker.max_running
            free, structured = [], []
            for _ in range(rounds):
                free.append(await _step_s(engine, rows, length, None))
                structured.append(await _step_s(engine, rows, length, grammar_of(_ENDLESS)))
            tokenizer = Tokenizer.from_file(f"{engine.info.model_path}/tokenizer.json")
        finally:
            loop.cancel()
    ended = {end: [id for id, output in outputs.items() if output.end == end] for end in ("finished", "cut", "lost")}
    invalid = [
        id
        for id in ended["finished"]
        if not _is_valid(tokenizer.decode(outputs[id].tokens, skip_special_tokens=False), schemas[int(id)])
    ]
    free_s, structured_s = statistics.median(free), statistics.median(structured)
    return StructuredFigures(
        schemas=len(schemas),
        refused=len(schemas) - len(grammars),
        cut=len(ended["cut"]),
        valid=len(ended["finished"]) - len(invalid),
        invalid=invalid,
        lost=ended["lost"],
        rows=rows,
        free_step_s=free_s,
        structured_step_s=structured_s,
        overhead=structured_s / free_s - 1,
    )


def _is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (json.JSONDecodeError, jsonschema.ValidationError):
        return False
    return True


@click.command()
@cli.options
@click.option("--limit", type=int, help="So many schemas at most.  [default: all]")
@click.option("--length", default=128, show_default=True, help="Tokens of an answer, at most.")
@click.option("--rounds", default=3, show_default=True, help="Times that steps with and without grammars alternate.")
def main(
    model: str, max_running: int, max_batch_tokens: int, as_json: bool, limit: int | None, length: int, rounds: int
) -> None:
    """Follow every schema of the collection, then time steps with and without grammars."""
    worker = config(model, max_running, max_batch_tokens).worker()
    cli.show(asyncio.run(measure(worker, limit=limit, length=length, rounds=rounds)), as_json)


if __name__ == "__main__":
    main()
