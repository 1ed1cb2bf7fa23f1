"""Who gets labels, what is counted, and how many series there may be."""

from prometheus_client import CollectorRegistry, generate_latest

from protocol.plan import Work
from scheduler.core.fairness import FairQueue, Price, service_gap_bound
from scheduler.loop import StepReport
from scheduler.metrics import page
from scheduler.metrics.fairness import FairnessCollector
from scheduler.metrics.labels import Labels
from scheduler.metrics.series import OUTCOMES, Metrics
from tests.scheduler.core.drive import sequence


def report(**given) -> StepReport:
    values = dict.fromkeys(StepReport.__slots__, 0) | {
        "rows": (),
        "work": Work(0, 0, 0, 0),
        "starts": {},
        "accepted": [],
        "events": [],
        "given_up": [],
        "charges": {},
    }
    return StepReport(**values | {"ok": True} | given)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, labels)


def test_the_first_who_are_named_have_labels_and_keep_them():
    labels = Labels({"a": "gold", "b": "default", "c": "gold"}, 2)
    assert labels.tenants == ("a", "b", "other")
    assert [labels.tenant(name) for name in "abcd"] == ["a", "b", "other", "other"]
    assert [labels.tier(name) for name in "abcd"] == ["gold", "default", "gold", "default"]
    labels.take({"c": "silver"})
    assert labels.tenants == ("a", "b", "other")
    assert [labels.tier(name) for name in "abc"] == ["default", "default", "silver"]


def test_a_tenant_that_is_named_later_is_counted_apart_from_then_on():
    metrics = Metrics()
    metrics.of("a").outcomes["stop"].inc()
    metrics.take_tenants({"a": "gold"})
    assert value(metrics.registry, "tokenbus_requests_total", tenant="a", outcome="stop") == 0
    metrics.of("a").outcomes["stop"].inc(2)
    metrics.of("a").ttft.observe(0.001)
    assert value(metrics.registry, "tokenbus_requests_total", tenant="a", outcome="stop") == 2
    assert value(metrics.registry, "tokenbus_requests_total", tenant="other", outcome="stop") == 1
    assert value(metrics.registry, "tokenbus_time_to_first_token_seconds_bucket", tier="gold", le="0.001") == 1


def test_running_totals_become_growth_and_cancels_are_told_from_ends():
    metrics = Metrics({"a": "gold"})
    metrics.observe_step(report(late_tokens=3, cancelled_tokens=1, preemptions=2, recomputed_tokens=9))
    metrics.observe_step(report(late_tokens=7, cancelled_tokens=4, preemptions=2, recomputed_tokens=9, plan_s=0.002))
    wasted = {
        reason: value(metrics.registry, "tokenbus_wasted_tokens_total", reason=reason)
        for reason in ("cancelled", "ended", "recompute")
    }
    assert wasted == {"cancelled": 4, "ended": 3, "recompute": 9}
    assert value(metrics.registry, "tokenbus_preemptions_total") == 2
    assert value(metrics.registry, "tokenbus_plan_seconds_sum") == 0.002


def test_a_failed_step_is_no_step_but_its_charges_count():
    metrics = Metrics({"a": "gold"})
    metrics.observe_step(report(ok=False, charges={"a": 5.0, "b": 2.0, "c": 1.0}))
    assert value(metrics.registry, "tokenbus_step_seconds_count") == 0
    assert value(metrics.registry, "tokenbus_step_failures_total") == 1
    assert value(metrics.registry, "tokenbus_service_units_total", tenant="a") == 5
    assert value(metrics.registry, "tokenbus_service_units_total", tenant="other") == 3


def test_the_gap_is_between_those_who_wait():
    queue = FairQueue({"b": 0.5, "c": 4.0}, Price(1, 2))
    labels = Labels({"a": "default", "c": "default"}, 10)
    registry = CollectorRegistry()
    registry.register(FairnessCollector(queue, labels, longest_prompt=100, kv_tokens=400))

    def gaps() -> list[float | None]:
        return [value(registry, "tokenbus_service_gap", tenant=label) for label in ("a", "c", "other")]

    assert gaps() == [0, 0, 0]
    for name in "abcd":
        queue.push(sequence(f"{name}/1", 10))
    queue.charge_output({"a": 3, "b": 2, "d": 1})
    assert value(registry, "tokenbus_backlogged_tenants") == 4
    assert gaps() == [2, 8, 6], "of those who share a label, d is the furthest behind b"
    (most,) = [head for head in queue.heads(4) if head.tenant == "b"]
    queue.remove(most)
    assert value(registry, "tokenbus_backlogged_tenants") == 3
    assert gaps() == [0, 6, 4]
    assert value(registry, "tokenbus_service_gap_bound") == service_gap_bound(Price(1, 2), 100, 400) / 0.5


def test_a_thousand_tenants_make_fewer_than_3000_series():
    names = [f"tenant-{number}" for number in range(1000)]
    metrics = Metrics({name: f"tier-{number % 8}" for number, name in enumerate(names)})
    queue = FairQueue()
    metrics.registry.register(FairnessCollector(queue, metrics.labels, longest_prompt=100, kv_tokens=400))
    for name in names:
        queue.push(sequence(f"{name}/1", 3))
        series = metrics.of(name)
        for outcome in OUTCOMES:
            series.outcomes[outcome].inc()
        for histogram in (series.queue, series.ttft, series.itl, series.e2e):
            histogram.observe(1.0)
    lines = [line for line in generate_latest(metrics.registry).decode().splitlines() if not line.startswith("#")]
    assert len(lines) < 3000
    ended = sum(float(line.split()[1]) for line in lines if line.startswith("tokenbus_requests_total"))
    assert ended == 1000 * len(OUTCOMES), "nobody is forgotten"


def test_the_pages_tables_are_current():
    text = page.PAGE.read_text()
    assert page.fill(text) == text
    for name in ("series", "vllm"):
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1
