"""How fairly tenants are served just now, read from their queue when somebody asks."""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from scheduler.core.fairness import FairQueue, service_gap_bound
from scheduler.metrics.labels import Labels


class FairnessCollector(Collector):
    """``longest_prompt`` is the longest there may be, ``kv_tokens`` fill all KV blocks. A scrape costs O(waiting tenants)."""

    def __init__(self, queue: FairQueue, labels: Labels, *, longest_prompt: int, kv_tokens: int) -> None:
        self._queue = queue
        self._labels = labels
        self._bound = service_gap_bound(queue.price, longest_prompt, kv_tokens)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        backlog = self._queue.backlog()
        yield GaugeMetricFamily("tokenbus_backlogged_tenants", "Tenants that have something waiting", len(backlog))
        gap = GaugeMetricFamily(
            "tokenbus_service_gap",
            "Service units per weight by which a tenant that has something waiting is behind the most served of those",
            labels=["tenant"],
        )
        for tenant, behind in self._gaps(backlog).items():
            gap.add_metric([tenant], behind)
        yield gap
        yield GaugeMetricFamily(
            "tokenbus_service_gap_bound",
            "Service units per weight by which the service of two tenants that both wait may come to differ",
            self._bound / self._queue.lightest,
        )

    def _gaps(self, backlog: dict[str, float]) -> dict[str, float]:
        """By label; of those who share one, the furthest behind."""
        gaps = dict.fromkeys(self._labels.tenants, 0.0)
        most = max(backlog.values(), default=0.0)
        for tenant, counter in backlog.items():
            label = self._labels.tenant(tenant)
            gaps[label] = max(gaps[label], most - counter)
        return gaps
