"""The Prometheus metrics of the queue and the workers. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mindspeed_mm.serve.engine import Engine
from mindspeed_mm.serve.jobs import JobStore


class _Collector:
    """Reads the queue on each scrape, so that counts stay exact when a process dies."""

    def __init__(self, store: JobStore, engine: Engine) -> None:
        self.store, self.engine = store, engine

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        jobs = GaugeMetricFamily("vace_videos", "Number of videos by status", labels=["status"])
        for status, count in self.store.counts().items():
            jobs.add_metric([status], count)
        yield jobs
        state, _ = self.engine.state()
        yield GaugeMetricFamily("vace_ready", "1 when the models are loaded", value=float(state == "ready"))
        yield CounterMetricFamily(
            "vace_worker_restarts", "Number of restarts of the workers", value=self.engine.restarts
        )


def exposition(store: JobStore, engine: Engine) -> tuple[bytes, str]:
    """Return the metrics as text, and their media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(store, engine))
    return generate_latest(registry), CONTENT_TYPE_LATEST
