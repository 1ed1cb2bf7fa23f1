"""The figures as tables."""

from collections.abc import Iterable, Sequence

from rich.table import Table

from scheduler.simulation.cost import CostModel
from scheduler.simulation.figures import Figures, Percentiles
from scheduler.simulation.replicas import ReplicaFigures
from scheduler.simulation.suites import SuiteFigures

#: So many tenants have a line of their own.
_MOST_TENANTS = 32


def of_run(figures: Figures) -> Iterable[Table]:
    """All of one run; then its tenants."""
    yield of_runs([figures])
    table = Table("tenant", "requests", "tokens/s", "service", *_heads(), title=_title(figures))
    for name, tenant in list(figures.tenants.items())[:_MOST_TENANTS]:
        table.add_row(
            name,
            str(tenant.requests),
            f"{tenant.output_tokens_per_s:.1f}",
            f"{tenant.service:.0f}",
            _times(tenant.ttft_s),
            _times(tenant.itl_s),
            _times(tenant.e2e_s),
        )
    yield table


def of_runs(runs: Sequence[Figures]) -> Table:
    """A line for each; throughput also as a multiple of the last one's."""
    table = Table("policy", "output tokens/s", "factor", *_heads(), "KV waste", "preempted", "service gap (bound)")
    for figures in runs:
        table.add_row(
            figures.policy,
            f"{figures.output_tokens_per_s:.1f}",
            f"{factor(figures, runs[-1]):.2f}",
            _times(figures.ttft_s),
            _times(figures.itl_s),
            _times(figures.e2e_s),
            f"{figures.kv_waste_ratio:.1%}",
            str(figures.preemptions),
            f"{figures.max_service_gap:.0f} ({figures.service_gap_bound:.0f})",
        )
    return table


def of_suites(suites: Iterable[SuiteFigures]) -> Table:
    """A line for each suite."""
    table = Table(
        "suite", "service gap", "bound", "gap of FCFS", "tokens/s of FCFS's", "victim's TTFT p99: alone, fair, FCFS"
    )
    for suite in suites:
        first = suite.ttft_s
        table.add_row(
            suite.name,
            f"{suite.max_service_gap:.0f}",
            f"{suite.service_gap_bound:.0f}",
            f"{suite.fcfs_max_service_gap:.0f}",
            f"{suite.throughput_ratio:.1%}",
            "" if first is None else ", ".join(_p99(times) for times in (first.alone, first.fair, first.fcfs)),
        )
    return table


def of_replicas(figures: ReplicaFigures) -> Table:
    """A line for each count that was tried; below them, what is needed."""
    first = figures.tried[0]
    table = Table(
        "replicas",
        *_heads(),
        "output tokens/s",
        "KV waste",
        "",
        title=f"{first.requests} requests, {first.refused} refused; {figures.policy}, {figures.cost_model}",
        caption=_verdict(figures),
    )
    for fleet in figures.tried:
        table.add_row(
            str(fleet.replicas),
            _times(fleet.ttft_s),
            _times(fleet.itl_s),
            _times(fleet.e2e_s),
            f"{fleet.output_tokens_per_s:.1f}",
            f"{fleet.kv_waste_ratio:.1%}",
            "holds" if figures.targets.hold(fleet) else "",
        )
    return table


def of_model(model: CostModel) -> Table:
    """Its coefficients, and how good they are."""
    table = Table("", "", show_header=False, title=model.name)
    for name in ("step_s", "row_s", "token_s", "context_s", "attended_s"):
        table.add_row(name, f"{getattr(model, name):.3g}")
    if model.quality is not None:
        table.add_row("steps, held out of them", f"{model.quality.steps}, {model.quality.held_out}")
        table.add_row("R²", f"{model.quality.r_squared:.4f}")
        table.add_row("median, p95 of the error", f"{model.quality.median_error:.1%}, {model.quality.p95_error:.1%}")
        table.add_row("error of the whole", f"{model.quality.total_error:+.1%}")
    return table


def factor(figures: Figures, base: Figures) -> float:
    """Output tokens/s as a multiple of another run's."""
    return figures.output_tokens_per_s / base.output_tokens_per_s if base.output_tokens_per_s else 0.0


def _verdict(figures: ReplicaFigures) -> str:
    targets, last = figures.targets, figures.tried[-1]
    asked = f"TTFT p99 {targets.ttft_p99_s:g} s"
    if targets.itl_p99_s is not None:
        asked += f", ITL p99 {targets.itl_p99_s:g} s"
    if figures.needed is not None:
        return f"{asked}: {figures.needed} needed"
    if last.replicas >= last.requests + last.refused:
        return f"{asked}: no number of replicas holds it, even one for each request doesn't"
    return f"{asked}: not held by {last.replicas} replicas, the most that were allowed"


def _title(figures: Figures) -> str:
    hidden = len(figures.tenants) - _MOST_TENANTS
    more = f"; {hidden} more tenants" if hidden > 0 else ""
    return f"{figures.requests} requests in {figures.seconds:.1f} s, {figures.refused} refused{more}"


def _heads() -> tuple[str, str, str]:
    return "TTFT s (p50 p95 p99)", "ITL s", "E2E s"


def _times(times: Percentiles | None) -> str:
    return "" if times is None else f"{times.p50:.3g} {times.p95:.3g} {times.p99:.3g}"


def _p99(times: Percentiles | None) -> str:
    return "" if times is None else f"{times.p99:.2f} s"
