"""What narrow weights, keys and values cost in accuracy: `python -m benchmarks.perplexity [--json]`.

The text is prose that comes with Python itself, the reference pages of `pydoc`.
"""

import math
from dataclasses import replace
from pydoc_data.topics import topics
from typing import get_args

import click
import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import cli
from protocol.plan import Admission, Row, Sampling, StepPlan, WeightsName
from workers.attention import choose
from workers.forward import forward
from workers.model import Model, load
from workers.packing import PLAIN, pack
from workers.slots import Slots

WINDOW = 512
BLOCK_SIZE = 16
#: Plain weights with keys and values in half precision.
HALF = "float16 keys and values"


class Perplexities(msgspec.Struct, frozen=True):
    """Of ``tokens`` predicted tokens, by how the weights are held, or keys and values."""

    tokens: int
    perplexity: dict[str, float]
    over_plain: dict[str, float]


@torch.inference_mode()
def perplexity(name: str, weights: WeightsName, kv_dtype: torch.dtype, windows: int) -> float:
    """Over so many windows of the text, each read from its beginning."""
    model = replace(load(name, "float32", "cpu"), kv_dtype=kv_dtype)
    pack(model.module, weights)
    ids = Tokenizer.from_file(str(model.path / "tokenizer.json")).encode("\n".join(topics.values())).ids
    loss = 0.0
    for window in torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW):
        loss += float(cross_entropy(_logits(model, window)[:-1], window[1:], reduction="sum"))
    return math.exp(loss / windows / (WINDOW - 1))


def _logits(model: Model, window: Tensor) -> Tensor:
    """Of every token, ``[WINDOW, V]``, as a worker computes them."""
    blocks = WINDOW // BLOCK_SIZE
    kind = choose("auto", model.device, model.dtype, model.layers, block_size=BLOCK_SIZE, kv_dtype=model.kv_dtype)
    backend = kind(model.layers, blocks, BLOCK_SIZE, model.dtype, model.device, model.kv_dtype)
    slots = Slots(1, blocks, BLOCK_SIZE, model.device)
    slots.admit(Admission(0, window.tolist(), Sampling(), WINDOW))
    whole = Row(0, 0, WINDOW, list(range(blocks)), sample=True)
    slots.extend([whole])
    return forward(model.module, backend, slots.inputs(StepPlan(0, [], [], [whole])))


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--windows", default=12, show_default=True, help=f"How many times {WINDOW} tokens of the text are read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(model: str, windows: int, as_json: bool) -> None:
    """Compare the perplexity of a fixed text between the ways to hold a model's weights, and keys and values."""
    found: dict[str, float] = {
        name: perplexity(model, name, torch.float32, windows) for name in get_args(WeightsName) if name != "auto"
    }
    found[HALF] = perplexity(model, PLAIN, torch.float16, windows)
    ratios = {name: value / found[PLAIN] for name, value in found.items()}
    cli.show(Perplexities(windows * (WINDOW - 1), found, ratios), as_json)


if __name__ == "__main__":
    main()
