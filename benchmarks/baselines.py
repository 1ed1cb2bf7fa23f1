"""The ladder's lower rungs, on plain transformers: what one would write without a scheduler."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import cli
from benchmarks.workload import WorkItem, load
from workers.weights import DEMO, demo_model

_STATIC_BATCH = 16
_PAD = 0

Outputs = dict[str, list[int]]


class BaselineFigures(msgspec.Struct, frozen=True):
    """Only wanted tokens count: what a static batch computes for finished rows does not."""

    output_tokens: int
    seconds: float
    output_tokens_per_s: float
    token_ids: dict[str, list[int]]


def naive(model: PreTrainedModel, items: list[WorkItem]) -> Outputs:
    """Every token recomputes the whole sequence: no KV cache."""
    outputs: Outputs = {}
    for item in items:
        ids = torch.tensor([item.prompt_token_ids])
        for _ in range(item.max_tokens):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        outputs[str(item.id)] = ids[0, len(item.prompt_token_ids) :].tolist()
    return outputs


def cached(model: PreTrainedModel, items: list[WorkItem]) -> Outputs:
    """One request at a time, with a KV cache."""
    return {key: output for item in items for key, output in static(model, [item]).items()}


def static_batches(model: PreTrainedModel, items: list[WorkItem]) -> Outputs:
    """Batches of 16 in order of arrival; each runs until its longest member is done."""
    outputs: Outputs = {}
    for start in range(0, len(items), _STATIC_BATCH):
        outputs |= static(model, items[start : start + _STATIC_BATCH])
    return outputs


def static(model: PreTrainedModel, items: list[WorkItem]) -> Outputs:
    """transformers' generate on left-padded prompts."""
    longest = max(len(item.prompt_token_ids) for item in items)
    padding = [longest - len(item.prompt_token_ids) for item in items]
    ids = torch.tensor([[_PAD] * pad + item.prompt_token_ids for pad, item in zip(padding, items, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    generate: Any = model.generate
    out = generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=max(item.max_tokens for item in items),
        eos_token_id=[],
        pad_token_id=_PAD,
    )
    return {
        str(item.id): row[longest : longest + item.max_tokens].tolist() for item, row in zip(items, out, strict=True)
    }


MODES: dict[str, Callable[[PreTrainedModel, list[WorkItem]], Outputs]] = {
    "naive": naive,
    "cached": cached,
    "static": static_batches,
}


@click.command()
@click.argument("mode", type=click.Choice(list(MODES)))
@cli.workload_option
@click.option("--first", type=int, help="Only this many requests.")
@click.option("--model", default=DEMO, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(mode: str, file: Path, first: int | None, model: str, as_json: bool) -> None:
    """Run a workload without any scheduler of ours."""
    path = demo_model() if model == DEMO else Path(model)
    module = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    items = load(file).first(first).requests
    with torch.inference_mode():
        MODES[mode](module, [WorkItem(0, [1, 2, 3], 2)])
        begun = time.perf_counter()
        outputs = MODES[mode](module, items)
        seconds = time.perf_counter() - begun
    tokens = sum(len(output) for output in outputs.values())
    cli.show(BaselineFigures(tokens, seconds, tokens / seconds, outputs), as_json, hidden=("token_ids",))


if __name__ == "__main__":
    main()
