"""Prometheus itself accepts the rules; each alert fires in the condition it is for, alone, and not just short of it."""

import json
import re
from pathlib import Path

import pytest

from tests.deploy.prometheus import ALERTS, DEPLOY, RULES, needs_prometheus, promtool, rules

pytestmark = needs_prometheus

Series = dict[str, str]


def misses(share: float, minutes: int) -> Series:
    """A request a second; after 400 minutes this share of them has its first token after more than 2.5 s."""
    name, in_time = "tokenbus_time_to_first_token_seconds", 60 * (1 - share)
    return {
        f'{name}_count{{tier="gold"}}': f"0+60x{400 + minutes}",
        f'{name}_bucket{{tier="gold",le="2.5"}}': f"0+60x400 {24000 + in_time:g}+{in_time:g}x{minutes - 1}",
    }


def gap(units: float) -> Series:
    return {
        'tokenbus_service_gap{tenant="alice"}': f"{units}x10",
        'tokenbus_service_gap{tenant="other"}': "0x10",
        "tokenbus_service_gap_bound": "1000x10",
    }


#: By alert: when to look, what makes it fire, what is just short of that. Samples are a minute apart.
CASES: dict[str, tuple[str, Series, Series]] = {
    "BrokerDropsMessages": (
        "12m",
        {"tokenbus_broker_dropped_messages_total": "7x10 8x10"},
        {"tokenbus_broker_dropped_messages_total": "7x4 8x16"},
    ),
    "RepliesFail": (
        "12m",
        {'tokenbus_publish_failures_total{kind="reply"}': "0x10 1x10"},
        {'tokenbus_publish_failures_total{kind="chunk"}': "0+1x20"},
    ),
    "JournalLags": (
        "9m",
        {"tokenbus_journal_waiting_writes": "500x10"},
        {"tokenbus_journal_waiting_writes": "500 500 500 500 500 500 500 3 500 500"},
    ),
    "BacklogTooOld": (
        "4m",
        {"tokenbus_oldest_waiting_seconds": "0+30x10"},
        {"tokenbus_oldest_waiting_seconds": "0 50 59 61 59 50"},
    ),
    "KvCacheThrashes": (
        "15m",
        {"tokenbus_kv_usage_ratio": "0.99x20", "tokenbus_preemptions_total": "0+30x20"},
        {"tokenbus_kv_usage_ratio": "0.99x20", "tokenbus_preemptions_total": "7x20"},
    ),
    "WorkerDown": ("6m", {"tokenbus_worker_up": "1 1 1 0x10"}, {"tokenbus_worker_up": "1 1 1 1 1 1 0 1"}),
    "WorkerRestarts": (
        "9m",
        {"tokenbus_worker_restarts_total": "0 0 1 2 3 3x10"},
        {"tokenbus_worker_restarts_total": "0 0 1 1 1 1x10"},
    ),
    "PoisonRequest": (
        "9m",
        {"tokenbus_requests_quarantined_total": "0x5 1x10"},
        {"tokenbus_requests_quarantined_total": "4x20"},
    ),
    "TenantStarves": ("8m", gap(501), gap(499)),
}
HOURS: dict[str, tuple[str, Series, Series]] = {
    "TtftBudgetBurnsFast": ("480m", misses(0.2, 80), misses(0.13, 80)),
    "TtftBudgetBurns": ("780m", misses(0.1, 380), misses(0.05, 380)),
}


def scenario(at: str, series: Series, firing: list[str]) -> dict:
    name = re.compile(r"^(\w+)(?:\{(.*)\})?$")
    where = 'job="tokenbus",instance="a"'
    labelled = {
        f"{match[1]}{{{where}{',' if match[2] else ''}{match[2] or ''}}}": values
        for text, values in series.items()
        if (match := name.match(text))
    }
    return {
        "interval": "1m",
        "input_series": [{"series": text, "values": values} for text, values in labelled.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": at,
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in firing],
            }
        ],
    }


def check(folder: Path, *scenarios: dict, every: str = "1m") -> None:
    """``every``: how often the rules are evaluated; within the five minutes that a sample counts as the present one."""
    file = folder / "scenario.yaml"
    test = {"rule_files": [str(RULES), str(ALERTS)], "evaluation_interval": every, "tests": scenarios}
    file.write_text(json.dumps(test))
    promtool("test", "rules", str(file))


@pytest.mark.parametrize(("cases", "every"), [(CASES, "1m"), (HOURS, "4m")])
def test_an_alert_fires_when_it_should_alone_and_not_before(cases: dict, every: str, tmp_path: Path) -> None:
    fires = [scenario(at, condition, [alert]) for alert, (at, condition, _) in cases.items()]
    silent = [scenario(at, short_of_it, []) for at, _, short_of_it in cases.values()]
    check(tmp_path, *fires, *silent, every=every)


def test_both_budget_alerts_tell_of_an_outage_and_only_the_slow_one_of_what_is_over(tmp_path: Path) -> None:
    """An hour in which every request is late, then all are in time."""
    name = "tokenbus_time_to_first_token_seconds"
    outage = {
        f'{name}_count{{tier="gold"}}': "0+60x500",
        f'{name}_bucket{{tier="gold",le="2.5"}}': "0+60x300 18000x60 18060+60x140",
    }
    check(
        tmp_path,
        scenario("332m", outage, ["TtftBudgetBurns", "TtftBudgetBurnsFast"]),
        scenario("372m", outage, ["TtftBudgetBurns"]),
        scenario("420m", outage, []),
        every="4m",
    )


def test_every_alert_has_a_case_and_a_runbook() -> None:
    alerts = rules(ALERTS)
    assert {rule["alert"] for rule in alerts} == {*CASES, *HOURS}
    for rule in alerts:
        assert rule["labels"]["severity"] in {"warning", "critical"}
        runbook = (DEPLOY.parent / rule["annotations"]["runbook_url"]).read_text()
        assert rule["alert"] in runbook.splitlines()[0]


def test_the_rules_are_accepted() -> None:
    told = promtool("check", "rules", str(RULES), str(ALERTS))
    assert f"{len(rules(ALERTS))} rules found" in told
    assert f"{len(rules(RULES))} rules found" in told
    assert "is valid prometheus config" in promtool("check", "config", str(RULES.with_name("prometheus.yaml")))
