"""What the benchmarks of the engine's parts say, in words and tables."""

from itertools import zip_longest

from benchmarks.adapters import AdapterFigures
from benchmarks.blocks import BlockFigures
from benchmarks.floor import FloorFigures
from benchmarks.linears import LinearsFigures
from benchmarks.overhead import OverheadFigures
from benchmarks.overlap import Overlap
from benchmarks.replicas import ReplicaFigures
from benchmarks.speculation import SpeculationFigures
from benchmarks.startup import StartupFigures
from benchmarks.structured import StructuredFigures
from benchmarks.tracing import TracingFigures

#: What the settings of keys and values mean for a model in float32.
_KEPT = {"auto": "float32", "float16": "float16"}


def adapters_line(figures: AdapterFigures) -> str:
    return (
        f"{figures.adapters} adapters of rank {figures.rank} on all projections of attention and MLP: a workload whose requests "
        f"all go through one of them has {figures.used_share:.1%} of the output tokens/s that it has without adapters, "
        f"{figures.used:.1f} of {figures.base:.1f}; one that names none of them {figures.unused_share:.1%}, {figures.unused:.1f} "
        f"(`tokenbus bench adapters`, medians of {figures.rounds} rounds)."
    )


def floor_table(figures: FloorFigures) -> str:
    lines = [
        "| decodes in a step | keys and values | ms | of that the bare products | reading the weights once |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {batch.batch} | {_KEPT[batch.kv_dtype]} | {1000 * batch.step_s:.1f} | {batch.floor_ratio:.1%} "
        f"| {batch.bandwidth_ratio:.0%} |"
        for batch in figures.batches
    ]
    summary = (
        f"{figures.weight_bytes / 1e6:,.0f} MB of {figures.weights} weights, memory read at "
        f"{figures.read_bytes_per_s / 1e9:.1f} GB/s by as many threads; medians of {figures.rounds} rounds "
        "(`tokenbus bench floor`)."
    )
    return "\n".join([*lines, "", summary])


def overhead_line(figures: OverheadFigures) -> str:
    waited_ms, step_ms = 1000 * figures.mean_waited_s, 1000 * figures.mean_step_s
    return (
        f"With {figures.mean_rows:.0f} requests over MQTT the worker waits {figures.waited_share:.1%} of the time that its steps "
        f"take, {waited_ms:.2f} ms after each of {step_ms:.1f} ms; the scheduler's process needs {figures.cores:.1%} of a core "
        "(`tokenbus bench overhead`)."
    )


def overlap_table(figures: Overlap) -> str:
    lines = [
        "| the next step is planned | the worker waits, by step time | a newcomer's first token comes after | a step, ms |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {way.lead} | {way.waited_share:.1%} | {way.newcomer_steps:.2f} steps | {1000 * way.mean_step_s:.1f} |"
        for way in figures.ways
    ]
    return "\n".join(lines)


def linears_table(figures: LinearsFigures) -> str:
    kinds = list(dict.fromkeys(step.weights for step in figures.steps))
    times = {(step.weights, step.rows): step.ms for step in figures.steps}
    lines = [f"| rows | {' | '.join(kinds)} |", "|---|" + "---|" * len(kinds)]
    lines += [
        f"| {rows} | {' | '.join(f'{times[kind, rows]:.1f}' for kind in kinds)} |"
        for rows in dict.fromkeys(step.rows for step in figures.steps)
    ]
    summary = (
        f"Milliseconds of all linear layers of {figures.model}, {figures.threads} threads, medians of {figures.rounds} rounds "
        "(`tokenbus bench linears`)."
    )
    return "\n".join([*lines, "", summary])


def structured_line(figures: StructuredFigures) -> str:
    return (
        f"Of {figures.schemas} schemas {figures.refused} use what can't be enforced and are refused; of the other answers "
        f"{figures.cut} reached their limit, {figures.valid} are valid and {len(figures.invalid)} aren't. A step of "
        f"{figures.rows} rows takes {1000 * figures.structured_step_s:.1f} ms with a grammar for each and "
        f"{1000 * figures.free_step_s:.1f} ms without, {figures.overhead:+.1%} (`tokenbus bench structured`)."
    )


def replicas_line(figures: ReplicaFigures) -> str:
    shares = " and ".join(f"{share:.1%}" for share in figures.shares)
    return (
        f"Two replicas with workers that only sleep, {figures.step_ms:.0f} ms a step of {figures.max_running} requests, give "
        f"{figures.two_tokens_per_s:.0f} tokens/s, one gives {figures.one_tokens_per_s:.0f}: {figures.ratio:.2f}x; the two have "
        f"{shares} of the tokens (`tokenbus bench replicas`, medians of {figures.rounds} rounds)."
    )


def speculation_table(figures: SpeculationFigures) -> str:
    lines = [
        "| at once | requests | steps, without and with | output tokens/s, without and with | right drafts | same tokens |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case.batch} | {case.requests} | {case.off.steps:,} and {case.on.steps:,} ({case.step_ratio:.2f}x fewer) | "
        f"{case.off.output_tokens_per_s:.1f} and {case.on.output_tokens_per_s:.1f} ({case.rate_ratio:.2f}x) | "
        f"{case.on.acceptance:.0%} of {case.on.drafted_tokens:,} | {'all' if case.same_tokens else 'not all'} |"
        for case in figures.batches
    ]
    return "\n".join([*lines, "", f"`{figures.speculation}`, medians of {figures.rounds} rounds in turn."])


def blocks_table(figures: list[BlockFigures]) -> str:
    lines = [
        "| tokens in a block | KV slots without a token | attention of 64 decodes, ms a layer | of one | a prompt of 256, ms |",
        "|---|---|---|---|---|",
    ]
    for each in figures:
        times = (each.decodes_ms, each.decode_ms, each.prefill_ms)
        lines.append(f"| {each.block_size} | {each.waste:.1%} | {' | '.join(f'{ms:.3f}' for ms in times)} |")
    return "\n".join(lines)


def startup_text(figures: StartupFigures) -> str:
    median = figures.median
    summary = (
        "From the start of `tokenbus serve` with the cached demo model to the first token of a prompt over MQTT: "
        f"{median.first_token_s:.1f} s (median of {figures.rounds}; the slowest took {figures.slowest_first_token_s:.1f} s). The "
        f"broker was there after {median.broker_s:.1f} s, the service online after {median.online_s:.1f} s."
    )
    lines = [summary, "", "| the worker | s | the service, meanwhile | s |", "|---|---|---|---|"]
    columns = [
        [f"{name} | {seconds:.2f}" for name, seconds in part.items()] for part in (figures.worker, figures.service)
    ]
    rows = zip_longest(*columns, fillvalue=" | ")
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def tracing_line(figures: TracingFigures) -> str:
    return (
        f"With a collector that takes all {figures.spans:,} spans of {figures.requests:,} requests, tokens/s over MQTT are "
        f"{figures.share:.1%} of what they are without, {figures.on_output_tokens_per_s:.1f} of "
        f"{figures.off_output_tokens_per_s:.1f} (`tokenbus bench tracing`, the median of {figures.rounds} alternating rounds)."
    )
