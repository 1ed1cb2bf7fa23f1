"""Writes the tables of docs/metrics.md from the series themselves: ``python -m scheduler.metrics.page``."""

from collections.abc import Iterator
from pathlib import Path

from prometheus_client import Metric

from scheduler.core.fairness import FairQueue
from scheduler.metrics.fairness import FairnessCollector
from scheduler.metrics.series import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"

#: Labels whose values are few and known, so that they can be told.
_CLOSED = ("by", "kind", "outcome", "reason")

#: What vLLM calls the same: https://docs.vllm.ai/en/stable/usage/metrics/.
_VLLM = {
    "tokenbus_running_requests": "vllm:num_requests_running",
    "tokenbus_waiting_requests": "vllm:num_requests_waiting",
    "tokenbus_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "tokenbus_cache_config_info": "vllm:cache_config_info",
    "tokenbus_preemptions_total": "vllm:num_preemptions_total",
    'sum(tokenbus_tokens_total{kind="prompt"})': "vllm:prompt_tokens_total, vllm:prefix_cache_queries_total",
    'sum(tokenbus_tokens_total{kind="cached"})': "vllm:prefix_cache_hits_total",
    'sum(tokenbus_tokens_total{kind="generated"})': "vllm:generation_tokens_total",
    'sum by (outcome) (tokenbus_requests_total{outcome=~"stop|length"})': "vllm:request_success_total",
    "tokenbus_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "tokenbus_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "tokenbus_request_seconds": "vllm:e2e_request_latency_seconds",
    "tokenbus_queue_seconds": "vllm:request_queue_time_seconds",
}


def families() -> list[Metric]:
    """Every family that a service shows, sorted by name."""
    metrics = Metrics()
    metrics.cache_config.labels(1, 1, "float32", True)
    metrics.registry.register(FairnessCollector(FairQueue(), metrics.labels, longest_prompt=1, kv_tokens=1))
    return sorted(metrics.registry.collect(), key=lambda family: family.name)


def series_table() -> str:
    rows = [
        f"| `{_name(family)}` | {_kind(family)} | {_labels(family)} | {family.documentation} |" for family in families()
    ]
    return "\n".join(["| series | type | labels | what it is |", "|---|---|---|---|", *rows])


def vllm_table() -> str:
    rows = [f"| `{theirs}` | `{ours.replace('|', chr(92) + '|')}` |" for ours, theirs in _VLLM.items()]
    return "\n".join(["| vLLM | here |", "|---|---|", *rows])


def fill(page: str) -> str:
    """The page with its tables as they are now."""
    for name, table in (("series", series_table()), ("vllm", vllm_table())):
        before, _, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        page = f"{before}<!-- {name} -->\n{table}\n{end}{after}"
    return page


def _name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name


def _kind(family: Metric) -> str:
    bounds = [float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")]
    return f"histogram, {min(bounds):g} to {sorted(set(bounds))[-2]:g}" if bounds else family.type


def _labels(family: Metric) -> str:
    return "; ".join(_told(family, label) for label in _label_names(family))


def _label_names(family: Metric) -> Iterator[str]:
    return (label for label in family.samples[0].labels if label != "le")


def _told(family: Metric, label: str) -> str:
    if label not in _CLOSED:
        return f"`{label}`"
    values = dict.fromkeys(sample.labels[label] for sample in family.samples)
    return f"`{label}`: {', '.join(values)}"


def main() -> None:
    PAGE.write_text(fill(PAGE.read_text()))


if __name__ == "__main__":
    main()
