"""A real Prometheus on a real service under load: what it scrapes is what clients counted, and all of ours evaluates on it."""

import asyncio
import math
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime

import pytest
import pytest_asyncio

from deploy.grafana.dashboards import DASHBOARDS
from protocol.client import Client
from protocol.errors import RequestError
from protocol.replies import Result
from protocol.request import Request
from scheduler.metrics.page import families
from scheduler.mqtt.broker import EmbeddedBroker
from tests.deploy.prometheus import ALERTS, RULES, Prometheus, needs_prometheus, prometheus, promtool, rules
from tests.faults.load import ask, requests
from tests.faults.service import ServiceProcess
from tests.workers.models import servable

pytestmark = [needs_prometheus, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

CONFIG = """
[tenants.alice]
tier = "gold"
weight = 2

[tenants.bob]
"""
TENANTS = ("alice", "bob", "eve", "mallory")
LABELS = {"alice": "alice", "bob": "bob", "eve": "other", "mallory": "other"}
ASKED = requests(24, shortest=10, longest=80)


@dataclass
class Run:
    """A service after its load, Prometheus beside it, and what came back by tenant."""

    service: ServiceProcess
    prometheus: Prometheus
    results: dict[str, list[Result]]

    async def totals(self, expression: str, label: str) -> dict[str, float]:
        samples = await self.prometheus.query(expression)
        return {sample["metric"][label]: float(sample["value"][1]) for sample in samples if sample["value"][1] != "0"}

    def counted(self, tokens) -> dict[str, float]:
        """Summed by the label that the tenant has."""
        sums: defaultdict[str, float] = defaultdict(float)
        for tenant, results in self.results.items():
            sums[LABELS[tenant]] += sum(map(tokens, results))
        return {label: total for label, total in sums.items() if total}


async def load(url: str) -> dict[str, list[Result]]:
    """All at once; then one that is known already, one whose prompt is cached, and one that is refused."""
    clients = [Client(url, tenant=name) for name in TENANTS]
    async with clients[0], clients[1], clients[2], clients[3]:
        answers = list((await ask(clients, ASKED)).values())
        results = {name: answers[number :: len(TENANTS)] for number, name in enumerate(TENANTS)}
        first = next(iter(ASKED.values()))
        again = await clients[0].complete(first, model="tiny", request_id=next(iter(ASKED)))
        assert again.text == answers[0].text
        long = Request(prompt=[*range(5, 45)], max_tokens=4, temperature=0.0, ignore_eos=True)
        results["alice"] += [await clients[0].complete(long, model="tiny") for _ in range(2)]
        with pytest.raises(RequestError, match="not served here"):
            await clients[1].complete(first, model="large")
    return results


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def run(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    folder = tmp_path_factory.mktemp("live")
    model = servable(folder / "model")
    async with EmbeddedBroker(data_dir=folder / "broker") as broker:
        service = ServiceProcess(folder, model, broker.url)
        service.config.write_text(CONFIG)
        async with service, prometheus(folder, service.http.removeprefix("http://")) as watching:
            await until_scraped(watching)
            run = Run(service, watching, await load(broker.url))
            await service.settled()
            await until_all_is_scraped(run)
            yield run


async def until_scraped(watching: Prometheus) -> None:
    """Wait for Prometheus to have seen the beginning, so that what comes has grown in its eyes."""
    async with asyncio.timeout(30):
        while not await watching.query("tokenbus_worker_up"):
            await asyncio.sleep(0.1)


async def until_all_is_scraped(run: Run) -> None:
    """Wait until Prometheus has seen the end, and its rules have."""
    ended = sum(len(results) for results in run.results.values())
    async with asyncio.timeout(30):
        while (await run.totals("sum by (job) (tokenbus_requests_total)", "job")).get("tokenbus") != ended:
            await asyncio.sleep(0.1)
        (end,) = await run.prometheus.query("max(timestamp(tokenbus_requests_total))")
        since = float(end["value"][1])
        for _ in range(2):  # rules of one group read what those of another one recorded
            while min(evaluated := await evaluations(run)) <= since:
                await asyncio.sleep(0.1)
            since = max(evaluated)


async def evaluations(run: Run) -> list[float]:
    """When each group of rules was last evaluated."""
    groups = (await run.prometheus.ask("/api/v1/rules"))["groups"]
    return [datetime.fromisoformat(group["lastEvaluation"]).timestamp() for group in groups]


async def test_prometheus_counts_what_clients_count(run: Run) -> None:
    def tokens(kind: str) -> str:
        return f'sum by (tenant) (tokenbus_tokens_total{{kind="{kind}"}})'

    assert run.counted(lambda result: 1) == await run.totals(
        'sum by (tenant) (tokenbus_requests_total{outcome="length"})', "tenant"
    )
    outcomes = await run.totals("sum by (outcome) (tokenbus_requests_total)", "outcome")
    assert outcomes == Counter(result.finish_reason for results in run.results.values() for result in results)
    generated = run.counted(lambda result: result.usage.completion_tokens)
    prompt = run.counted(lambda result: result.usage.prompt_tokens)
    cached = run.counted(lambda result: result.usage.prompt_tokens_details.cached_tokens)
    assert await run.totals(tokens("generated"), "tenant") == generated
    assert await run.totals(tokens("prompt"), "tenant") == prompt
    assert await run.totals(tokens("cached"), "tenant") == cached
    assert cached["alice"] > 0
    units = {label: prompt[label] - cached.get(label, 0) + 2 * generated[label] for label in prompt}
    assert await run.totals("tokenbus_service_units_total", "tenant") == units


async def test_latencies_are_counted_by_tier(run: Run) -> None:
    results = {"gold": run.results["alice"], "default": [r for t in TENANTS[1:] for r in run.results[t]]}
    ended = {tier: len(them) for tier, them in results.items()}
    for name in ("queue_seconds", "time_to_first_token_seconds", "request_seconds"):
        assert await run.totals(f"tokenbus_{name}_count", "tier") == ended
    later = {tier: sum(r.usage.completion_tokens - len(r.choices) for r in them) for tier, them in results.items()}
    assert await run.totals("tokenbus_inter_token_latency_seconds_count", "tier") == later


async def test_what_came_again_or_was_refused_is_counted_apart(run: Run) -> None:
    metrics = await run.service.metrics()
    assert metrics["tokenbus_duplicate_requests_total"] == 1
    assert metrics['tokenbus_rejections_total{reason="model_not_found"}'] == 1
    assert metrics["tokenbus_requests_accepted_total"] == metrics["tokenbus_journal_rows"] == len(ASKED) + 2
    assert metrics["tokenbus_service_gap_bound"] > 0
    assert metrics["tokenbus_plan_seconds_count"] == metrics["tokenbus_step_seconds_count"] > 0


async def test_promtool_finds_no_fault_with_the_page(run: Run) -> None:
    _, page = await run.service.ask("/metrics")
    promtool("check", "metrics", stdin=page)
    shown = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE ")}
    assert shown == {family.name + "_total" * (family.type == "counter") for family in families()}


QUERIES = [
    pytest.param(query, id=f"{name}: {panel.title} {legend}")
    for name, panels in DASHBOARDS.items()
    for panel in panels
    for legend, query in panel.queries.items()
]


@pytest.mark.parametrize("query", QUERIES)
async def test_every_panel_has_data(query: str, run: Run) -> None:
    samples = await run.prometheus.query(query.replace("$__rate_interval", "5m"))
    assert any(not math.isnan(float(sample["value"][1])) for sample in samples)


async def test_every_rule_evaluates_and_nothing_is_wrong(run: Run) -> None:
    groups = (await run.prometheus.ask("/api/v1/rules"))["groups"]
    evaluated = {rule["name"]: rule for group in groups for rule in group["rules"]}
    slow = {rule["name"] for group in groups if group["name"] == "latency" for rule in group["rules"]}
    assert evaluated.keys() == {rule.get("alert") or rule["record"] for file in (RULES, ALERTS) for rule in rules(file)}
    for name, rule in evaluated.items():
        assert rule["health"] == "ok", (name, rule.get("lastError"))
        # How late first tokens come is this machine's affair.
        assert name in slow or rule.get("state", "inactive") == "inactive", name


@pytest.mark.parametrize("record", [rule["record"] for rule in rules(RULES)])
async def test_every_recording_has_data(record: str, run: Run) -> None:
    samples = await run.prometheus.query(record)
    assert any(not math.isnan(float(sample["value"][1])) for sample in samples)


@pytest.mark.parametrize("rule", rules(ALERTS), ids=lambda rule: rule["alert"])
async def test_every_series_that_an_alert_looks_at_is_there(rule: dict, run: Run) -> None:
    names = series_of(rule["expr"])
    assert names
    for name in names:
        assert await run.prometheus.query(f'{{__name__="{name}"}}'), name


def series_of(expression: str) -> set[str]:
    """The series that an expression names: all of ours begin alike."""
    words = "".join(character if character.isalnum() or character in "_:" else " " for character in expression)
    return {word for word in words.split() if word.startswith("tokenbus")}
