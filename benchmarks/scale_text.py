"""The figures of scale.json in words and tables, and with what planning and accepting cost, what a scheduler process carries."""

from collections.abc import Callable, Sequence

from benchmarks.accept import AcceptFigures
from benchmarks.planning import PlanningFigures
from benchmarks.scale import ScaleFigures
from scheduler.simulation.figures import Figures, Percentiles
from scheduler.simulation.replicas import FleetFigures, Targets

_TIMES = "TTFT s, p50 / p99 | ITL s, p50 / p99 | E2E s, p50 / p99"
#: Seconds that a worker's step may take.
_STEPS_S = (0.001, 0.010)

_Column = Callable[[FleetFigures], str]
_FLEET: tuple[_Column, ...] = (
    lambda fleet: _spread(fleet.ttft_s),
    lambda fleet: _spread(fleet.itl_s),
    lambda fleet: _spread(fleet.e2e_s),
    lambda fleet: f"{fleet.output_tokens_per_s:,.0f}",
    lambda fleet: f"{fleet.kv_waste_ratio:.1%}",
)


def load_text(figures: ScaleFigures) -> str:
    load, machine = figures.load, figures.machine
    refused = next(iter(figures.shared.values())).refused
    return (
        f"The first {load.requests:,} requests of `{load.trace}`, which came in {load.seconds / 60:.0f} minutes, with "
        f"{load.prompt_tokens:,.0f} prompt and {load.output_tokens:,.0f} output tokens on average. The trace doesn't say "
        f"whose they are or what they asked for: here each asks for up to {load.max_tokens:,} tokens and stops where the trace "
        f"does, and they belong to {load.tenants} tenants drawn by Zipf's law ({load.zipf:g}). Each replica is a "
        f"`{machine.cost_model}` with a KV cache of {machine.kv_tokens:,} tokens, up to {machine.max_running} sequences at "
        f"once and {machine.max_batch_tokens} tokens in a step. {refused:,} requests could never fit, being longer than "
        f"{machine.max_model_len:,} tokens with what they ask for, and are left out."
    )


def replicas_table(figures: ScaleFigures) -> str:
    target = _target(figures.paces[0].figures.targets)
    rows = []
    for pace in figures.paces:
        by_count = {fleet.replicas: fleet for fleet in pace.figures.tried}
        needed = pace.figures.needed
        assert needed is not None, "bench scale writes no figures without"
        fewer = by_count.get(needed - 1)
        rows.append(
            (
                f"{pace.pace:g}x",
                f"{pace.requests_per_s:.1f}",
                f"**{needed}**",
                f"{pace.requests_per_s / needed:.2f}",
                *(column(by_count[needed]) for column in _FLEET),
                _p99(fewer.ttft_s if fewer else None),
            )
        )
    head = (
        f"pace | requests/s | replicas for {target} | requests/s of each | {_TIMES} | output tokens/s | KV waste | "
        "TTFT p99 s with one fewer"
    )
    return _table(head, rows)


def tried_table(figures: ScaleFigures) -> str:
    slowest = figures.paces[0].figures
    rows = [(f"{fleet.replicas}", *(column(fleet) for column in _FLEET)) for fleet in slowest.tried]
    return _table(f"replicas | {_TIMES} | output tokens/s | KV waste", rows)


def shared_table(figures: ScaleFigures) -> str:
    rows = [(f"`{policy}`", *(column(fleet) for column in _FLEET)) for policy, fleet in figures.shared.items()]
    replicas = figures.shared["fair"].replicas
    return _table(f"policy, {replicas} replicas | {_TIMES} | output tokens/s | KV waste", rows)


def at_once_table(figures: ScaleFigures) -> str:
    rows = [
        (
            f"`{run.policy}`",
            f"{run.output_tokens_per_s:.0f}",
            "" if run.itl_s is None else f"{run.itl_s.p50:.3f} / {run.itl_s.p95:.3f} / {run.itl_s.p99:.3f}",
            f"{run.kv_waste_ratio:.1%}",
            f"{run.preemptions:,}",
            f"{run.max_service_gap:,.0f}",
        )
        for run in figures.at_once
    ]
    return _table(
        f"policy, {figures.at_once[0].requests:,} requests at once | output tokens/s | ITL s, p50 / p95 / p99 | KV waste | "
        "preemptions | largest service gap",
        rows,
    )


def directions_table(figures: ScaleFigures) -> str:
    """What the papers say, and what the simulated machine with all its requests there at once does."""
    by_policy = {run.policy: run for run in figures.at_once}
    fair, chunked, paged, orca, static = (
        by_policy[name] for name in ("fair", "chunked", "prefill_first", "orca", "static")
    )
    rows = [
        (
            "Orca, OSDI'22",
            "scheduling by iteration gives more tokens/s than by batch",
            "`orca` over `static`",
            f"{_factor(orca, static)} the tokens/s",
        ),
        (
            "PagedAttention (vLLM), SOSP'23",
            "paging wastes under 4% of the KV cache, and what it saves becomes tokens/s",
            "`prefill_first` over `orca`",
            f"KV waste {paged.kv_waste_ratio:.1%}, not {orca.kv_waste_ratio:.1%}; {_factor(paged, orca)} the tokens/s",
        ),
        (
            "Sarathi-Serve, OSDI'24",
            "chunks of prompts keep the tail of the time between tokens short, at no loss of tokens/s",
            "`chunked` over `prefill_first`",
            f"ITL p99 {_p99(chunked.itl_s)} s, not {_p99(paged.itl_s)} s; {_factor(chunked, paged)} the tokens/s",
        ),
        (
            "VTC, OSDI'24",
            "fairness between tenants within a bound, at no loss of tokens/s",
            "ours (`fair`) over `chunked`",
            f"{_gap(fair)}, not {chunked.max_service_gap:,.0f}; {_factor(fair, chunked)} the tokens/s",
        ),
    ]
    return _table("paper | what it says | compared | simulated", rows)


def carry_text(figures: ScaleFigures, planning: PlanningFigures, accept: AcceptFigures) -> str:
    """With the most waiting and the most tenants that were measured. A step is planned while the one before it runs."""
    case = max(
        (case for case in planning.cases if case.policy == "fair"), key=lambda case: (case.waiting, case.tenants)
    )
    plan_s = case.step_us.p50 / 1e6
    crowd = next(run for run in figures.at_once if run.policy == "fair")
    full_s = crowd.seconds / crowd.steps
    steps = (
        ("none at all: the scheduler alone", plan_s),
        *((f"{step_s * 1e3:g} ms", max(step_s, plan_s)) for step_s in _STEPS_S),
    )
    rows = [
        (name, f"{1 / step_s:,.0f}", f"{planning.running / step_s:,.0f}", f"{plan_s / step_s:.1%}")
        for name, step_s in steps
    ]
    head = f"the worker's step | steps/s | output tokens/s, {planning.running} running | planning, of one core"
    return (
        f"Planning a step and applying its result takes {case.step_us.p50:.0f} µs (p99 {case.step_us.p99:.0f} µs) with "
        f"{planning.running} running and {case.waiting:,} waiting, of {case.tenants:,} tenants: a worker whose steps are "
        f"shorter than that waits for its scheduler.\n\n{_table(head, rows)}\n\n"
        f"A full machine of those above has steps of {full_s * 1e3:.0f} ms, of which that would be {plan_s / full_s:.1%}. "
        f"{accept.accepts_per_s:,.0f} requests/s are accepted. With the {figures.load.output_tokens:,.0f} output tokens that a "
        f"request of the trace has, that is work for {accept.accepts_per_s * figures.load.output_tokens:,.0f} tokens/s."
    )


def _table(head: str, rows: Sequence[tuple[str, ...]]) -> str:
    """``head``: its columns, with bars between them."""
    lines = [f"| {head} |", "|" + "---|" * (head.count("|") + 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _spread(times: Percentiles | None) -> str:
    return "" if times is None else f"{_seconds(times.p50)} / {_seconds(times.p99)}"


def _p99(times: Percentiles | None) -> str:
    return "" if times is None else _seconds(times.p99)


def _seconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _target(targets: Targets) -> str:
    return f"TTFT p99 ≤ {targets.ttft_p99_s:g} s"


def _gap(figures: Figures) -> str:
    return f"service gap {figures.max_service_gap:,.0f} (bound {figures.service_gap_bound:,.0f})"


def _factor(figures: Figures, base: Figures) -> str:
    return f"{figures.output_tokens_per_s / base.output_tokens_per_s:.2f}x"
