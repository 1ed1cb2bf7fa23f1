"""What narrow weights cost in accuracy: `python -m benchmarks.perplexity [--json]`.

The text is prose that comes with Python itself, the reference pages of `pydoc`.
"""

import math
from pydoc_data.topics import topics
from typing import get_args

import click
import msgspec
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from benchmarks import cli
from protocol.plan import WeightsName
from workers.model import load
from workers.packing import PLAIN, pack

WINDOW = 512


class Perplexities(msgspec.Struct, frozen=True):
    """Of ``tokens`` predicted tokens, by how the weights are held."""

    tokens: int
    perplexity: dict[str, float]
    over_plain: dict[str, float]


@torch.inference_mode()
def perplexity(name: str, weights: WeightsName, windows: int) -> float:
    """Over so many windows of the text, each read from its beginning."""
    model = load(name, "float32", "cpu")
    pack(model.module, weights)
    model.module.set_attn_implementation("sdpa")
    ids = Tokenizer.from_file(str(model.path / "tokenizer.json")).encode("\n".join(topics.values())).ids
    loss = 0.0
    for window in torch.tensor(ids[: windows * WINDOW]).view(windows, WINDOW):
        logits = model.module(input_ids=window[None], use_cache=False).logits[0, :-1]
        loss += float(cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(loss / windows / (WINDOW - 1))


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model.")
@click.option("--windows", default=12, show_default=True, help=f"How many times {WINDOW} tokens of the text are read.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(model: str, windows: int, as_json: bool) -> None:
    """Compare the perplexity of a fixed text between the ways to hold a model's weights."""
    found: dict[str, float] = {
        name: perplexity(model, name, windows) for name in get_args(WeightsName) if name != "auto"
    }
    ratios = {name: value / found[PLAIN] for name, value in found.items()}
    cli.show(Perplexities(windows * (WINDOW - 1), found, ratios), as_json)


if __name__ == "__main__":
    main()
