"""Every Prometheus series, defined once. Names follow https://prometheus.io/docs/practices/naming/."""

from collections.abc import Mapping
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from protocol.errors import ErrorCode
from scheduler.loop import StepReport
from scheduler.metrics.labels import Labels

# From a millisecond, as vLLM's. An objective's limit must be among them (deploy/prometheus/rules.yaml).
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_LONG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SHORT_SECONDS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_DRAFTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)

#: How an accepted request may end.
OUTCOMES = ("stop", "length", "computed", "cancelled", "expired", "error", "taken_over")
_WASTED = ("recompute", "cancelled", "ended", "speculation")


class TenantSeries:
    """The series of a tenant and of its tier, looked up once."""

    def __init__(self, metrics: "Metrics", tenant: str, tier: str) -> None:
        self.outcomes = {outcome: metrics.requests.labels(tenant, outcome) for outcome in OUTCOMES}
        self.prompt, self.cached, self.generated = (
            metrics.tokens.labels(tenant, kind) for kind in ("prompt", "cached", "generated")
        )
        self.service = metrics.service.labels(tenant)
        self.queue, self.ttft, self.itl, self.e2e = (
            histogram.labels(tier) for histogram in (metrics.queue, metrics.ttft, metrics.itl, metrics.e2e)
        )


class Metrics:
    """One set of series in a registry of its own, so that several services may live in one process.

    ``tiers`` are those of the tenants that the configuration names, of which the first ``most_tenants`` get labels.
    """

    def __init__(self, tiers: Mapping[str, str] | None = None, most_tenants: int = 100) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, of which nobody makes anything
        self.registry = CollectorRegistry()
        self.labels = Labels(tiers or {}, most_tenants)
        self._define_gauges(self.registry)
        self._define_request_counters(self.registry)
        self._define_engine_counters(self.registry)
        self._define_histograms(self.registry)
        self._totals: dict[str, int] = {}
        self._of: dict[tuple[str, str], TenantSeries] = {}
        self._show_zeros()

    def _define_gauges(self, registry: CollectorRegistry) -> None:
        self.running = Gauge("tokenbus_running_requests", "Sequences in the running batch", registry=registry)
        self.waiting = Gauge("tokenbus_waiting_requests", "Sequences waiting to run", registry=registry)
        self.oldest_waiting = Gauge(
            "tokenbus_oldest_waiting_seconds",
            "Since when the first of the accepted requests that never ran has been waiting",
            registry=registry,
        )
        self.outstanding = Gauge(
            "tokenbus_outstanding_requests", "Accepted requests that haven't ended", registry=registry
        )
        self.kv_usage = Gauge("tokenbus_kv_usage_ratio", "Share of KV blocks in use", registry=registry)
        self.kv_blocks_free = Gauge("tokenbus_kv_blocks_free", "KV blocks nobody holds", registry=registry)
        self.kv_blocks = Gauge("tokenbus_kv_blocks", "KV blocks in all", registry=registry)
        self.cache_config = Gauge(
            "tokenbus_cache_config_info",
            "How the KV cache is laid out; the value is always 1",
            ["block_size", "num_blocks", "kv_dtype", "prefix_cache"],
            registry=registry,
        )
        self.worker_up = Gauge("tokenbus_worker_up", "1 while the worker process serves", registry=registry)
        self.unacknowledged = Gauge(
            "tokenbus_unacknowledged_messages",
            "QoS 1 messages waiting for an acknowledgement, by who owes it",
            ["by"],
            registry=registry,
        )
        self.undelivered = Gauge(
            "tokenbus_undelivered_messages", "Replies the broker hasn't acknowledged", registry=registry
        )
        self.journal_lag = Gauge("tokenbus_journal_waiting_writes", "Writes queued for the journal", registry=registry)
        self.journal_rows = Gauge(
            "tokenbus_journal_rows", "Requests in the journal, with the results that are kept", registry=registry
        )
        self.replicas = Gauge(
            "tokenbus_replicas", "Replicas that share the journal and live, this one included", registry=registry
        )
        self.draining = Gauge("tokenbus_draining", "1 while nothing new is taken up", registry=registry)

    def _define_request_counters(self, registry: CollectorRegistry) -> None:
        self.accepted = Counter(
            "tokenbus_requests_accepted", "Requests taken up, those of earlier processes included", registry=registry
        )
        self.requests = Counter(
            "tokenbus_requests", "Requests by how they ended", ["tenant", "outcome"], registry=registry
        )
        self.rejections = Counter(
            "tokenbus_rejections", "Messages refused, by error code", ["reason"], registry=registry
        )
        self.quarantined = Counter(
            "tokenbus_requests_quarantined", "Requests given up because a process died of them", registry=registry
        )
        self.redeliveries = Counter(
            "tokenbus_redeliveries", "QoS 1 messages that the broker sent once more", registry=registry
        )
        self.duplicates = Counter(
            "tokenbus_duplicate_requests", "Requests that joined or replayed one of the same id", registry=registry
        )
        self.publish_failures = Counter(
            "tokenbus_publish_failures",
            "Messages that couldn't be published as they were: refused, too large, or chunks while nothing is connected",
            ["kind"],
            registry=registry,
        )
        self.broker_dropped = Counter(
            "tokenbus_broker_dropped_messages", "Messages the broker dropped for full queues", registry=registry
        )
        self.tokens = Counter(
            "tokenbus_tokens",
            "Tokens by kind: of prompts that began to run, of these found in the prefix cache, generated",
            ["tenant", "kind"],
            registry=registry,
        )
        self.service = Counter(
            "tokenbus_service_units",
            "Service that tenants were charged, whatever their weight",
            ["tenant"],
            registry=registry,
        )

    def _define_engine_counters(self, registry: CollectorRegistry) -> None:
        self.computed = Counter(
            "tokenbus_computed_tokens", "Tokens that went through the model", ["kind"], registry=registry
        )
        self.forked = Counter(
            "tokenbus_forked_prompt_tokens",
            "Prompt tokens that a choice of a request had from another one instead of computing them",
            registry=registry,
        )
        self.wasted = Counter(
            "tokenbus_wasted_tokens",
            "Tokens computed in vain: before a preemption, after a cancel, after an end not known yet, as rejected drafts",
            ["reason"],
            registry=registry,
        )
        self.preemptions = Counter("tokenbus_preemptions", "Sequences preempted for want of blocks", registry=registry)
        self.worker_restarts = Counter("tokenbus_worker_restarts", "Worker processes replaced", registry=registry)
        self.step_failures = Counter("tokenbus_step_failures", "Steps that failed and were repeated", registry=registry)

    def _define_histograms(self, registry: CollectorRegistry) -> None:
        def by_tier(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"tokenbus_{name}", documentation, ["tier"], buckets=buckets, registry=registry)

        def of_steps(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"tokenbus_{name}", documentation, buckets=buckets, registry=registry)

        self.queue = by_tier("queue_seconds", "From acceptance to the first step", _LONG_SECONDS)
        self.ttft = by_tier("time_to_first_token_seconds", "From acceptance to the first token", _LONG_SECONDS)
        self.itl = by_tier("inter_token_latency_seconds", "Between two tokens of a request", _SECONDS)
        self.e2e = by_tier("request_seconds", "From acceptance to the end", _LONG_SECONDS)
        self.step = of_steps("step_seconds", "Worker time of a step", _SECONDS)
        self.plan = of_steps("plan_seconds", "What it took to plan a step", _SHORT_SECONDS)
        self.gap = of_steps(
            "step_gap_seconds", "How long the worker waited for its next step while there was work", _SHORT_SECONDS
        )
        self.batch_size = of_steps("batch_rows", "Sequences in a step", _ROWS)
        self.accepted_drafts = of_steps(
            "accepted_draft_tokens", "Drafted tokens that were accepted, of those of a sequence in a step", _DRAFTS
        )

    def take_tenants(self, tiers: Mapping[str, str]) -> None:
        """From now on the configuration names these tenants, of these tiers."""
        self.labels.take(tiers)
        self._show_tenants()

    def of(self, tenant: str) -> TenantSeries:
        """Where what concerns a tenant is counted."""
        key = self.labels.tenant(tenant), self.labels.tier(tenant)
        series = self._of.get(key)
        if series is None:
            series = self._of[key] = TenantSeries(self, *key)
        return series

    def observe_step(self, report: StepReport) -> None:
        """Take in one iteration."""
        if report.ok:
            self._observe_work(report)
        else:
            self.step_failures.inc()
        for tenant, units in report.charges.items():
            self.of(tenant).service.inc(units)
        cancelled = self._growth("cancelled", report.cancelled_tokens)
        self.forked.inc(self._growth("forked", report.forked_tokens))
        self.preemptions.inc(self._growth("preemptions", report.preemptions))
        self.wasted.labels("recompute").inc(self._growth("recompute", report.recomputed_tokens))
        self.wasted.labels("cancelled").inc(cancelled)
        self.wasted.labels("ended").inc(self._growth("late", report.late_tokens) - cancelled)
        self.wasted.labels("speculation").inc(self._growth("rejected", report.rejected_tokens))
        self.worker_restarts.inc(self._growth("restarts", report.worker_restarts))

    def _observe_work(self, report: StepReport) -> None:
        self.batch_size.observe(len(report.rows))
        self.step.observe(report.seconds)
        self.plan.observe(report.plan_s)
        self.gap.observe(report.waited_s)
        self.computed.labels("prefill").inc(report.prefill_tokens)
        self.computed.labels("decode").inc(report.decode_tokens)
        for accepted in report.accepted:
            self.accepted_drafts.observe(accepted)

    def _growth(self, name: str, total: int) -> int:
        """How far a running total of the batcher has grown since the last report."""
        growth = total - self._totals.get(name, 0)
        self._totals[name] = total
        return growth

    def _show_zeros(self) -> None:
        """A series that first shows when it is 1 has never grown in the eyes of ``increase()``."""
        for family, values in (
            (self.rejections, get_args(ErrorCode)),
            (self.wasted, _WASTED),
            (self.computed, ("prefill", "decode")),
            (self.publish_failures, ("reply", "chunk")),
            (self.unacknowledged, ("broker", "service")),
        ):
            for value in values:
                family.labels(value)
        self._show_tenants()

    def _show_tenants(self) -> None:
        for tenant in self.labels.tenants:
            self.of(tenant)
