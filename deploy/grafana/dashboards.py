"""Writes the dashboards as Grafana's JSON: ``python deploy/grafana/dashboards.py``."""  # noqa: INP001 - a script

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("dashboards")

_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_SCHEMA = 39  # Grafana 11
_COLUMNS, _WIDTH, _HEIGHT, _STAT_HEIGHT = 24, 8, 8, 4


@dataclass(frozen=True)
class Panel:
    """``queries`` are PromQL by legend, in which Grafana fills in ``{{labels}}``; ``unit`` is one of Grafana's."""

    title: str
    unit: str
    queries: dict[str, str]
    stat: bool = False


def rate(series: str, *by: str, where: str = "") -> str:
    """Per second, summed over all but these labels."""
    grouped = f"sum by ({', '.join(by)})" if by else "sum"
    return f"{grouped} (rate({series}{where}[$__rate_interval]))"


def quantiles(title: str, histogram: str, *by: str) -> Panel:
    """The median and the 99th percentile of seconds."""
    legend = "".join(f" {{{{{label}}}}}" for label in by)
    buckets = rate(f"{histogram}_bucket", *by, "le")
    queries = {f"p{100 * q:.0f}{legend}": f"histogram_quantile({q}, {buckets})" for q in (0.5, 0.99)}
    return Panel(title, "s", queries)


def stat(title: str, unit: str, query: str) -> Panel:
    """One number."""
    return Panel(title, unit, {"": query}, stat=True)


DASHBOARDS: dict[str, list[Panel]] = {
    "overview": [
        stat("Workers up", "short", "sum(tokenbus_worker_up)"),
        stat("Draining", "short", "sum(tokenbus_draining)"),
        stat("Running", "short", "sum(tokenbus_running_requests)"),
        stat("Waiting", "short", "sum(tokenbus_waiting_requests)"),
        stat("Oldest waiting", "s", "max(tokenbus_oldest_waiting_seconds)"),
        stat("KV usage", "percentunit", "max(tokenbus_kv_usage_ratio)"),
        Panel("Requests ended", "reqps", {"{{outcome}}": rate("tokenbus_requests_total", "outcome")}),
        Panel(
            "Messages refused",
            "reqps",
            {"{{reason}}": rate("tokenbus_rejections_total", "reason") + " > 0 or vector(0)"},
        ),
        Panel("Tokens", "short", {"{{kind}} /s": rate("tokenbus_tokens_total", "kind")}),
        quantiles("Time to first token", "tokenbus_time_to_first_token_seconds", "tier"),
        quantiles("Time between tokens", "tokenbus_inter_token_latency_seconds", "tier"),
        quantiles("End to end", "tokenbus_request_seconds", "tier"),
        quantiles("In the queue", "tokenbus_queue_seconds", "tier"),
        Panel("First tokens that come too late", "percentunit", {"{{tier}}, 1 h": "tokenbus:ttft_misses:ratio_rate1h"}),
        Panel(
            "Firing alerts",
            "short",
            {"{{alertname}}": 'count by (alertname) (ALERTS{alertstate="firing"}) or vector(0)'},
        ),
    ],
    "tenants": [
        Panel("Service", "short", {"{{tenant}} units/s": "tokenbus:service_units:rate5m"}),
        Panel(
            "Tokens generated",
            "short",
            {"{{tenant}} /s": rate("tokenbus_tokens_total", "tenant", where='{kind="generated"}')},
        ),
        Panel(
            "Share of the prompts that was cached",
            "percentunit",
            {
                "{{tenant}}": rate("tokenbus_tokens_total", "tenant", where='{kind="cached"}')
                + " / ("
                + rate("tokenbus_tokens_total", "tenant", where='{kind="prompt"}')
                + " > 0)"
            },
        ),
        Panel(
            "Requests ended", "reqps", {"{{tenant}} {{outcome}}": rate("tokenbus_requests_total", "tenant", "outcome")}
        ),
        Panel("Tenants with something waiting", "short", {"{{instance}}": "tokenbus_backlogged_tenants"}),
        Panel(
            "Behind the most served",
            "short",
            {
                "{{tenant}}": "max by (tenant) (tokenbus_service_gap)",
                "most that may be": "max(tokenbus_service_gap_bound) / 2",
            },
        ),
    ],
    "engine": [
        quantiles("Step", "tokenbus_step_seconds"),
        quantiles("Planning a step", "tokenbus_plan_seconds"),
        Panel(
            "Share of the time the worker waits for a plan",
            "percentunit",
            {"": f"{rate('tokenbus_step_gap_seconds_sum')} / {rate('tokenbus_step_seconds_sum')}"},
        ),
        Panel(
            "Sequences in a step",
            "short",
            {"mean": f"{rate('tokenbus_batch_rows_sum')} / {rate('tokenbus_batch_rows_count')}"},
        ),
        Panel("Tokens computed", "short", {"{{kind}} /s": rate("tokenbus_computed_tokens_total", "kind")}),
        Panel("Tokens computed in vain", "short", {"{{reason}} /s": rate("tokenbus_wasted_tokens_total", "reason")}),
        Panel(
            "KV blocks",
            "short",
            {
                "held, {{instance}}": "tokenbus_kv_blocks - tokenbus_kv_blocks_free",
                "all, {{instance}}": "tokenbus_kv_blocks",
            },
        ),
        Panel("Preemptions", "short", {"/s": rate("tokenbus_preemptions_total")}),
        Panel(
            "Failures",
            "short",
            {
                "worker restarts": "sum(increase(tokenbus_worker_restarts_total[$__rate_interval]))",
                "failed steps": "sum(increase(tokenbus_step_failures_total[$__rate_interval]))",
                "quarantined": "sum(increase(tokenbus_requests_quarantined_total[$__rate_interval]))",
            },
        ),
        Panel(
            "Layout of the KV cache",
            "short",
            {
                "{{num_blocks}} x {{block_size}} {{kv_dtype}}, prefix cache {{prefix_cache}}": "tokenbus_cache_config_info"
            },
        ),
    ],
    "delivery": [
        Panel(
            "Requests",
            "reqps",
            {"accepted": rate("tokenbus_requests_accepted_total"), "ended": rate("tokenbus_requests_total")},
        ),
        Panel("Accepted and not ended", "short", {"{{instance}}": "tokenbus_outstanding_requests"}),
        Panel(
            "Messages without an acknowledgement",
            "short",
            {"by the {{by}}": "sum by (by) (tokenbus_unacknowledged_messages)"},
        ),
        Panel("Replies the broker doesn't have", "short", {"{{instance}}": "tokenbus_undelivered_messages"}),
        Panel(
            "Sent again",
            "reqps",
            {
                "by the broker": rate("tokenbus_redeliveries_total"),
                "by a tenant": rate("tokenbus_duplicate_requests_total"),
            },
        ),
        Panel(
            "Lost",
            "short",
            {
                "{{kind}} not published": "sum by (kind) (increase(tokenbus_publish_failures_total[$__rate_interval]))",
                "dropped by the broker": "sum(increase(tokenbus_broker_dropped_messages_total[$__rate_interval]))",
            },
        ),
        Panel("Writes that wait for the journal", "short", {"{{instance}}": "tokenbus_journal_waiting_writes"}),
        Panel("Requests in the journal", "short", {"{{instance}}": "tokenbus_journal_rows"}),
    ],
}


def dashboard(name: str) -> dict[str, Any]:
    """One dashboard, as Grafana stores it."""
    return {
        "uid": f"tokenbus-{name}",
        "title": f"tokenbus: {name}",
        "tags": ["tokenbus"],
        "schemaVersion": _SCHEMA,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "links": [{"type": "dashboards", "title": "tokenbus", "tags": ["tokenbus"], "asDropdown": True}],
        "panels": _panels(DASHBOARDS[name]),
    }


def _panels(panels: list[Panel]) -> list[dict[str, Any]]:
    """The numbers in a row on top, then the charts in rows of three."""
    stats = [panel for panel in panels if panel.stat]
    charts = [panel for panel in panels if not panel.stat]
    width, top = _COLUMNS // max(len(stats), 1), _STAT_HEIGHT if stats else 0
    places = [(panel, number * width, 0, width, _STAT_HEIGHT) for number, panel in enumerate(stats)]
    in_row = _COLUMNS // _WIDTH
    for number, panel in enumerate(charts):
        row, column = divmod(number, in_row)
        places.append((panel, column * _WIDTH, top + row * _HEIGHT, _WIDTH, _HEIGHT))
    return [
        _panel(number, panel, {"x": x, "y": y, "w": w, "h": h}) for number, (panel, x, y, w, h) in enumerate(places, 1)
    ]


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _DATASOURCE, "expr": expression, "legendFormat": legend}
        for index, (legend, expression) in enumerate(panel.queries.items())
    ]
    return {
        "id": number,
        "type": "stat" if panel.stat else "timeseries",
        "title": panel.title,
        "gridPos": place,
        "datasource": _DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "targets": targets,
    }


def main() -> None:
    """Write them all."""
    FOLDER.mkdir(exist_ok=True)
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(json.dumps(dashboard(name), indent=2) + "\n")


if __name__ == "__main__":
    main()
