"""Writes the measured figures of benchmarks/results/ into README.md, between its markers; no figure there is typed by hand.

``python -m benchmarks.report`` after ``tokenbus bench ladder --json > benchmarks/results/ladder.json`` and
``tokenbus bench serve … --json > benchmarks/results/serve.json``; ``journal.json`` is ``bench serve --against-journal-off``,
``accept.json`` is ``bench accept``.
"""

import re
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks.accept import AcceptFigures
from benchmarks.ladder import Ladder
from benchmarks.serve import ServeFigures

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")

T = TypeVar("T")

_NAMES = {
    "naive": "transformers, no KV cache",
    "cached": "transformers `generate`, one at a time",
    "static": "transformers `generate`, static batches of 16",
    "continuous": "**tokenbus**, continuous batching",
}


def ladder_table(ladder: Ladder) -> str:
    lines = [
        "| same workload, float32 greedy | requests run | output tokens/s | tokens equal to ours |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {_NAMES[rung.name]} | {rung.requests} | {rung.output_tokens_per_s:.1f} | {rung.equal_tokens:.1%} |"
        for rung in ladder.rungs
    ]
    summary = (
        f"A KV cache is worth {ladder.cached_over_naive:.1f}x (literature: 5 to 10x at moderate lengths); continuous batching "
        f"{ladder.continuous_over_cached:.1f}x over one at a time and {ladder.continuous_over_static:.1f}x over static batches."
    )
    return "\n".join([*lines, "", summary])


def serve_line(figures: ServeFigures) -> str:
    return (
        f"Over MQTT, {figures.output_tokens} output tokens of 64 requests at once: {figures.output_tokens_per_s:.1f} tokens/s, "
        f"{figures.share_of_engine:.1%} of the bare engine's beside it; TTFT p50 {figures.ttft_s.p50:.1f} s, "
        f"time between chunks p50 {figures.itl_s.p50:.2f} s, p99 {figures.itl_s.p99:.2f} s."
    )


def journal_line(serve: ServeFigures, accept: AcceptFigures) -> str:
    return (
        f"The journal, on disk and synchronous: the same requests keep {serve.share_of_journal_off:.1%} of the tokens/s they "
        f"have without it; {accept.accepts_per_s:,.0f} requests/s are accepted from {accept.publishers} publishers."
    )


def _read(name: str, kind: type[T]) -> T:
    return msgspec.json.decode((RESULTS / name).read_bytes(), type=kind)


def render(readme: str) -> str:
    """The page with its figures filled in."""
    texts = {
        "ladder": ladder_table(_read("ladder.json", Ladder)),
        "serve": serve_line(_read("serve.json", ServeFigures)),
        "journal": journal_line(_read("journal.json", ServeFigures), _read("accept.json", AcceptFigures)),
    }
    for name, text in texts.items():
        pattern = re.compile(rf"<!-- {name} -->\n.*?\n<!-- /{name} -->", re.DOTALL)
        if len(pattern.findall(readme)) != 1:
            raise ValueError(f"README.md must hold the markers of {name} once")
        start, end = next(pattern.finditer(readme)).span()
        readme = f"{readme[:start]}<!-- {name} -->\n{text}\n<!-- /{name} -->{readme[end:]}"
    return readme


def main() -> None:
    page = ROOT / "README.md"
    page.write_text(render(page.read_text()))


if __name__ == "__main__":
    main()
