"""Writes the figures of benchmarks/results/ into README.md and pages of docs/, between their markers; none is typed by hand.

``python -m benchmarks.report`` after ``tokenbus bench ladder --json > benchmarks/results/ladder.json`` and
``tokenbus bench serve … --json > benchmarks/results/serve.json``; ``journal.json`` is ``bench serve --against-journal-off``,
``accept.json`` is ``bench accept``, ``scrape.json`` ``bench scrape``. ``planning.json``, ``fairness.json``, ``prefix.json``,
``determinism.json``, ``blocks.json``, ``startup.json``, ``floor.json``, ``linears.json``, ``overlap.json``, ``overhead.json``,
``structured.json``, ``replicas.json``, ``speculation.json``, ``tracing.json`` and ``adapters.json`` are the benchmarks of those
names, the fairness one with ``--plot docs/fairness.png``. ``scale.json`` is ``bench scale --trace FILE``, ``suites.json``
``tokenbus simulate --suite all --plot docs/suites.png``, both simulated. ``peers.json`` is ``bench peers --workload FILE
--plot docs/peers.png``, ``peers-amx.json`` the same on a CPU that has AMX, ``gpu.json`` is ``bench gpu`` where there is one.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks import engine_text, scale_text
from benchmarks.accept import AcceptFigures
from benchmarks.adapters import AdapterFigures
from benchmarks.blocks import BlocksFigures
from benchmarks.determinism import ConditionFigures, DeterminismFigures, WayName
from benchmarks.fairness import FairnessFigures, TenantFigures
from benchmarks.floor import FloorFigures
from benchmarks.gpu import GpuFigures
from benchmarks.ladder import Ladder
from benchmarks.linears import LinearsFigures
from benchmarks.overhead import OverheadFigures
from benchmarks.overlap import Overlap
from benchmarks.peers.figures import PeerFigures, PeersFigures
from benchmarks.planning import PlanningFigures
from benchmarks.prefix import PrefixFigures
from benchmarks.replicas import ReplicaFigures
from benchmarks.scale import ScaleFigures
from benchmarks.scrape import ScrapeFigures
from benchmarks.serve import ServeFigures
from benchmarks.speculation import SpeculationFigures
from benchmarks.startup import StartupFigures
from benchmarks.structured import StructuredFigures
from benchmarks.tracing import TracingFigures
from scheduler.simulation import figures as simulated
from scheduler.simulation.suites import SuiteFigures, TimeToFirst

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results")

T = TypeVar("T")
#: Writes what stands between two markers.
Text = Callable[[], str]

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


def peers_text(figures: PeersFigures) -> str:
    picture = "![output tokens per second, engine by engine](docs/peers.png)"
    return f"{picture}\n\n{peers_table(figures)} `tokenbus bench peers` repeats it; [how each is run](docs/peers.md)."


def peers_table(figures: PeersFigures) -> str:
    whole = max(figures.peers, key=lambda peer: peer.output_tokens)
    rows = [f"| {' | '.join(_peer_cells(peer))} |" for peer in figures.peers]
    lines = [
        "| engine | version | output tokens/s | slowest to fastest round | ours over it | requests with our greedy tokens |",
        "|---|---|---|---|---|---|",
    ]
    summary = (
        f"{whole.requests} requests at once, {whole.prompt_tokens:,} prompt and {whole.output_tokens:,} output tokens, greedy; "
        f"{figures.cpu}, {figures.threads} threads each, medians of {figures.rounds} alternating rounds."
    )
    return "\n".join([*lines, *rows, "", summary])


def _peer_cells(peer: PeerFigures) -> list[str]:
    title = f"{peer.title}, outputs 1/{peer.shortened} as long" if peer.shortened > 1 else peer.title
    rate = peer.output_tokens_per_s
    if rate is None:
        return [title, "", "did not run", "", "", ""]
    over = "" if peer.ours_over is None or peer.name == peer.beside else f"{peer.ours_over:.2f}x"
    equal = "" if peer.equal_requests is None else f"{peer.equal_requests} of {peer.requests}"
    version = next(iter(peer.versions.values()), "")
    return [title, version, f"{rate.median:.1f}", f"{rate.min:.1f} to {rate.max:.1f}", over, equal]


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


def scrape_line(figures: ScrapeFigures) -> str:
    return (
        f"With {figures.tenants:,} tenants, all named and all waiting, there are {figures.series:,} series; a scrape takes "
        f"{1000 * figures.scrape_s:.0f} ms at the median, {1000 * figures.cpu_s:.0f} ms of CPU time "
        f"(`tokenbus bench scrape`)."
    )


def planning_table(figures: PlanningFigures) -> str:
    waiting = sorted({case.waiting for case in figures.cases})
    rows: dict[tuple[str, int], list[str]] = {}
    for case in sorted(figures.cases, key=lambda case: case.waiting):
        cell = f"{case.step_us.p50:.0f} ({case.step_us.p99:.0f})"
        rows.setdefault((case.policy, case.tenants), []).append(cell)
    lines = [
        f"| µs to plan a step and apply it, {figures.running} running: median (p99) | "
        + " | ".join(f"{count:,} waiting" for count in waiting)
        + " |",
        "|---|" + "---|" * len(waiting),
    ]
    lines += [
        f"| `{policy}`, {tenants:,} tenants | " + " | ".join(cells) + " |" for (policy, tenants), cells in rows.items()
    ]
    return "\n".join(lines)


def fairness_text(figures: FairnessFigures) -> str:
    suite, (ours, theirs) = figures.suite, figures.runs
    half_per_min = 60 * ours.output_tokens_per_s / suite.output_tokens / 2
    asked = " and ".join(f"{tenant.requests_per_min / half_per_min:.1f}" for tenant in ours.tenants)
    return (
        "![service of two tenants](docs/fairness.png)\n\n"
        f"Two tenants, live over MQTT for {suite.minutes:g} minutes, one sending twice as fast: {asked} times its half of what "
        f"is served, in requests of {suite.prompt_tokens} prompt and {suite.output_tokens} output tokens. While both had "
        f"something waiting, their service differed by at most {ours.largest_change:,.0f} units with our policy and "
        f"{theirs.largest_change:,.0f} with first come, first served; the bound is {figures.bound:,.0f}. Output tokens/s: "
        f"{ours.output_tokens_per_s:.1f} and {theirs.output_tokens_per_s:.1f}. TTFT p50, slow and fast tenant: "
        f"{_ttft(ours.tenants)}, and {_ttft(theirs.tenants)}."
    )


def _ttft(tenants: list[TenantFigures]) -> str:
    return " / ".join("none" if tenant.ttft_s is None else f"{tenant.ttft_s.p50:.1f} s" for tenant in tenants)


def suites_table(suites: list[SuiteFigures]) -> str:
    lines = [
        "| suite | largest difference | bound | first come, first served | output tokens/s to its |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {suite.name} | {suite.max_service_gap:,.0f} | {suite.service_gap_bound:,.0f} | {suite.fcfs_max_service_gap:,.0f} "
        f"| {suite.throughput_ratio:.1%} |"
        for suite in suites
    ]
    return "\n".join([*lines, "", *(_victim(suite.ttft_s) for suite in suites if suite.ttft_s is not None)])


def _victim(first: TimeToFirst) -> str:
    def seconds(times: simulated.Percentiles | None) -> str:
        return "none" if times is None else f"{times.p50:.2f} s / {times.p99:.2f} s"

    return (
        f"TTFT of the flood's {first.tenant}, p50 / p99: alone {seconds(first.alone)}, ours {seconds(first.fair)}, "
        f"first come, first served {seconds(first.fcfs)}."
    )


def prefix_line(figures: PrefixFigures) -> str:
    burst, cached, uncached, isolation = figures.burst, figures.cached, figures.uncached, figures.isolation
    return (
        f"{burst.requests} requests at once that share {burst.shared_tokens} of {burst.prompt_tokens} prompt tokens: the prefix "
        f"cache spares {figures.saved:.1%} of the prompt tokens, TTFT p50 is {cached.ttft_s.p50:.1f} s instead of "
        f"{uncached.ttft_s.p50:.1f} s ({figures.ttft_ratio:.1f}x), output tokens/s {figures.rate_ratio:.1f}x. Another tenant "
        f"gains nothing from it: of a prompt that the first tenant had cached it computes "
        f"{isolation.other.computed_prompt_tokens:.0f} of {isolation.prompt_tokens} tokens, and waits "
        f"{isolation.other.ttft_s:.2f} s (the first tenant: {isolation.cold.ttft_s:.2f} s at first, "
        f"{isolation.warm.ttft_s:.2f} s when cached)."
    )


_WAYS: dict[WayName, str] = {
    "packed": "float32 on the CPU",
    "packed-invariant": "the same, `batch_invariant`",
    "plain": "torch's own layers",
    "plain-invariant": "the same, `batch_invariant`",
}
_HAPPENED = {
    "batch": "{} requests at once",
    "preempted": "{} preemptions",
    "worker killed": "`kill -9`, {} restart",
    "service killed": "`kill -9`, {} requests resumed",
    "prefix cache": "{} tokens found",
    "speculation": "{} drafts accepted",
}


def determinism_table(figures: DeterminismFigures) -> str:
    def cell(found: ConditionFigures) -> str:
        tokens = found.greedy + found.sampled
        return f"{tokens}" if found.bits is None else f"{tokens}; {found.bits} to the bit"

    titles = " | ".join(_WAYS[way.way] for way in figures.ways)
    lines = [f"| equal to alone | what happened | {titles} |", "|---|---|" + "---|" * len(figures.ways)]
    for found in zip(*(way.conditions for way in figures.ways), strict=True):
        first = found[0]
        happened = _HAPPENED[first.condition].format(f"{first.happened:,}")
        lines.append(f"| {first.condition} | {happened} | {' | '.join(map(cell, found))} |")
    rates = " | ".join(f"{way.output_tokens_per_s:.1f}" for way in figures.ways)
    summary = (
        f"Of {figures.greedy} greedy and {figures.sampled} sampled requests, {figures.prompt_tokens:,} prompt and "
        f"{figures.output_tokens:,} output tokens, how many had the same tokens, and how many the same log probabilities to the "
        "last bit. What happened: in the first column's runs."
    )
    return "\n".join([*lines, f"| output tokens/s | | {rates} |", "", summary])


def gpu_table(figures: GpuFigures) -> str:
    batches = [decode.batch for decode in figures.executions[0].decodes]
    lines = [
        "| `model.execution` | "
        + " | ".join(f"{batch} at once" for batch in batches)
        + " | all requests | worker's start |",
        "|---|" + "---|" * (len(batches) + 2),
    ]
    for each in figures.executions:
        cells = [f"{decode.output_tokens_per_s:,.0f} ({decode.floor_ratio:.0%})" for decode in each.decodes]
        cells += [f"{each.all.output_tokens_per_s:,.0f}", f"{each.start_s:.0f} s"]
        lines.append(f"| `{each.execution}` | {' | '.join(cells)} |")
    every = figures.executions[-1].all
    text = (
        "Output tokens/s; in brackets, where nothing but decodes is done, the share of the bandwidth floor: how long it takes to "
        f"read {figures.weight_bytes / 1e9:.2f} GB of weights once, and {figures.kv_bytes_per_token:,} bytes a token of context, "
        f"at {figures.copy_bytes_per_s / 1e12:.2f} TB/s, the rate of a copy on the device. {every.requests} requests at once: "
        f"{every.prompt_tokens:,} prompt and {every.output_tokens:,} output tokens. {figures.device}, torch "
        f"{figures.versions['torch']}."
    )
    lines += ["", text]
    if (peer := figures.peer) is not None:
        ours = figures.executions[-1].some
        beside = (
            f"{peer.requests} of them: {ours.output_tokens_per_s:,.0f} output tokens/s, and {peer.output_tokens_per_s:,.0f} with "
            f"transformers {figures.versions['transformers']}'s continuous batching and SDPA attention "
            f"({ours.output_tokens_per_s / peer.output_tokens_per_s:.1f}x)."
        )
        lines += ["", beside]
    return "\n".join(lines)


def _read(name: str, kind: type[T]) -> T:
    return msgspec.json.decode((RESULTS / name).read_bytes(), type=kind)


def _when_measured(name: str, kind: type[T], write: Callable[[T], str]) -> str:
    """Nothing until there are results."""
    return write(_read(name, kind)) if (RESULTS / name).exists() else ""


def _carry() -> str:
    def write(planning: PlanningFigures) -> str:
        return scale_text.carry_text(_read("scale.json", ScaleFigures), planning, _read("accept.json", AcceptFigures))

    return _when_measured("planning.json", PlanningFigures, write)


def _simulated(write: Callable[[ScaleFigures], str]) -> Text:
    return lambda: write(_read("scale.json", ScaleFigures))


#: What stands between the markers of each page.
PAGES: dict[str, dict[str, Text]] = {
    "README.md": {
        "ladder": lambda: ladder_table(_read("ladder.json", Ladder)),
        "peers": lambda: _when_measured("peers.json", PeersFigures, peers_text),
        "serve": lambda: serve_line(_read("serve.json", ServeFigures)),
        "journal": lambda: journal_line(_read("journal.json", ServeFigures), _read("accept.json", AcceptFigures)),
        "fairness": lambda: _when_measured("fairness.json", FairnessFigures, fairness_text),
        "prefix": lambda: _when_measured("prefix.json", PrefixFigures, prefix_line),
        "planning": lambda: _when_measured("planning.json", PlanningFigures, planning_table),
        "directions": _simulated(scale_text.directions_table),
    },
    "docs/operations/install.md": {
        "startup": lambda: _when_measured("startup.json", StartupFigures, engine_text.startup_text),
    },
    "docs/metrics.md": {
        "scrape": lambda: _when_measured("scrape.json", ScrapeFigures, scrape_line),
    },
    "docs/scheduling.md": {
        "suites": lambda: suites_table(_read("suites.json", list[SuiteFigures])),
    },
    "docs/peers.md": {
        "amx": lambda: _when_measured("peers-amx.json", PeersFigures, peers_table),
    },
    "docs/adapters.md": {
        "adapters": lambda: _when_measured("adapters.json", AdapterFigures, engine_text.adapters_line),
    },
    "docs/determinism.md": {
        "determinism": lambda: _when_measured("determinism.json", DeterminismFigures, determinism_table),
    },
    "docs/gpu.md": {
        "gpu": lambda: _when_measured("gpu.json", GpuFigures, gpu_table),
    },
    "docs/speculation.md": {
        "speculation": lambda: _when_measured("speculation.json", SpeculationFigures, engine_text.speculation_table),
    },
    "docs/decisions/0008-packed-linears.md": {
        "linears": lambda: _when_measured("linears.json", LinearsFigures, engine_text.linears_table),
        "floor": lambda: _when_measured("floor.json", FloorFigures, engine_text.floor_table),
    },
    "docs/decisions/0007-planning-ahead.md": {
        "overlap": lambda: _when_measured("overlap.json", Overlap, engine_text.overlap_table),
        "overhead": lambda: _when_measured("overhead.json", OverheadFigures, engine_text.overhead_line),
    },
    "docs/decisions/0011-structured-output.md": {
        "structured": lambda: _when_measured("structured.json", StructuredFigures, engine_text.structured_line),
    },
    "docs/operations/trace.md": {
        "tracing": lambda: _when_measured("tracing.json", TracingFigures, engine_text.tracing_line),
    },
    "docs/replicas.md": {
        "replicas": lambda: _when_measured("replicas.json", ReplicaFigures, engine_text.replicas_line),
    },
    "docs/decisions/0015-block-size.md": {
        "blocks": lambda: _when_measured(
            "blocks.json", BlocksFigures, lambda figures: engine_text.blocks_table(figures.sizes)
        ),
    },
    "docs/scale.md": {
        "load": _simulated(scale_text.load_text),
        "replicas": _simulated(scale_text.replicas_table),
        "tried": _simulated(scale_text.tried_table),
        "shared": _simulated(scale_text.shared_table),
        "directions": _simulated(scale_text.directions_table),
        "at-once": _simulated(scale_text.at_once_table),
        "carry": _carry,
    },
}


def render(name: str) -> str:
    """The page with its figures filled in."""
    page = (ROOT / name).read_text()
    for marker, text in PAGES[name].items():
        pattern = re.compile(rf"<!-- {marker} -->\n.*?\n<!-- /{marker} -->", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"{name} must hold the markers of {marker} once")
        start, end = next(pattern.finditer(page)).span()
        page = f"{page[:start]}<!-- {marker} -->\n{text()}\n<!-- /{marker} -->{page[end:]}"
    return page


def main() -> None:
    for name in PAGES:
        (ROOT / name).write_text(render(name))


if __name__ == "__main__":
    main()
