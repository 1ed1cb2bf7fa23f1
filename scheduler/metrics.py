"""Every Prometheus series, defined once. Names follow https://prometheus.io/docs/practices/naming/."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from scheduler.loop import StepReport

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_GAP_SECONDS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_TTFT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_DRAFTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16)


class Metrics:
    """One set of series in a registry of its own, so that several services may live in one process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.running = Gauge("tokenbus_running_requests", "Sequences in the running batch", registry=registry)
        self.waiting = Gauge("tokenbus_waiting_requests", "Sequences waiting to run", registry=registry)
        self.kv_usage = Gauge("tokenbus_kv_usage_ratio", "Share of KV blocks in use", registry=registry)
        self.worker_up = Gauge("tokenbus_worker_up", "1 while the worker process serves", registry=registry)
        self.accepted = Counter(
            "tokenbus_requests_accepted", "Requests taken up, those of earlier processes included", registry=registry
        )
        self.requests = Counter("tokenbus_requests", "Requests by how they ended", ["outcome"], registry=registry)
        self.rejections = Counter(
            "tokenbus_rejections", "Messages refused, by error code", ["reason"], registry=registry
        )
        self.quarantined = Counter(
            "tokenbus_requests_quarantined", "Requests given up because the worker died of them", registry=registry
        )
        self.outstanding = Gauge(
            "tokenbus_outstanding_requests", "Accepted requests that haven't ended", registry=registry
        )
        self.kv_blocks_free = Gauge("tokenbus_kv_blocks_free", "KV blocks nobody holds", registry=registry)
        self.kv_blocks = Gauge("tokenbus_kv_blocks", "KV blocks in all", registry=registry)
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
        self.draining = Gauge("tokenbus_draining", "1 while nothing new is taken up", registry=registry)
        self.tokens = Counter("tokenbus_tokens", "Tokens by kind", ["kind"], registry=registry)
        self.wasted = Counter("tokenbus_wasted_tokens", "Tokens computed in vain", ["reason"], registry=registry)
        self.preemptions = Counter("tokenbus_preemptions", "Sequences preempted for want of blocks", registry=registry)
        self.worker_restarts = Counter("tokenbus_worker_restarts", "Worker processes replaced", registry=registry)
        self.step_failures = Counter("tokenbus_step_failures", "Steps that failed and were repeated", registry=registry)
        self.broker_dropped = Counter(
            "tokenbus_broker_dropped_messages", "Messages the broker dropped for full queues", registry=registry
        )
        self.ttft = Histogram(
            "tokenbus_time_to_first_token_seconds",
            "From acceptance to the first token",
            buckets=_TTFT_SECONDS,
            registry=registry,
        )
        self.itl = Histogram(
            "tokenbus_inter_token_latency_seconds",
            "Between two tokens of a request",
            buckets=_SECONDS,
            registry=registry,
        )
        self.e2e = Histogram(
            "tokenbus_request_seconds", "From acceptance to the end", buckets=_TTFT_SECONDS, registry=registry
        )
        self.step = Histogram("tokenbus_step_seconds", "Worker time of a step", buckets=_SECONDS, registry=registry)
        self.gap = Histogram(
            "tokenbus_step_gap_seconds",
            "How long the worker waited for its next step while there was work",
            buckets=_GAP_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram("tokenbus_batch_rows", "Sequences in a step", buckets=_ROWS, registry=registry)
        self.accepted_drafts = Histogram(
            "tokenbus_accepted_draft_tokens",
            "Drafted tokens that were accepted, of those of a sequence in a step",
            buckets=_DRAFTS,
            registry=registry,
        )
        self._totals = dict.fromkeys(("preemptions", "recompute", "ended", "speculation", "cached", "restarts"), 0)

    def observe_step(self, report: StepReport) -> None:
        """Take in one iteration."""
        if report.ok:
            self._observe_work(report)
        else:
            self.step_failures.inc()
        self.preemptions.inc(self._growth("preemptions", report.preemptions))
        self.wasted.labels("recompute").inc(self._growth("recompute", report.recomputed_tokens))
        self.wasted.labels("ended").inc(self._growth("ended", report.late_tokens))
        self.wasted.labels("speculation").inc(self._growth("speculation", report.rejected_tokens))
        self.tokens.labels("cached").inc(self._growth("cached", report.cached_tokens))
        self.worker_restarts.inc(self._growth("restarts", report.worker_restarts))

    def _observe_work(self, report: StepReport) -> None:
        self.batch_size.observe(len(report.rows))
        self.step.observe(report.seconds)
        self.gap.observe(report.waited_s)
        self.tokens.labels("prefill").inc(report.prefill_tokens)
        self.tokens.labels("decode").inc(report.decode_tokens)
        self.tokens.labels("generated").inc(len(report.events))
        for accepted in report.accepted:
            self.accepted_drafts.observe(accepted)

    def _growth(self, name: str, total: int) -> int:
        """How far a running total of the batcher has grown since the last report."""
        growth = total - self._totals[name]
        self._totals[name] = total
        return growth
